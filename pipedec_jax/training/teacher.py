"""What the smaller models learn from: text with the target's choices, source text and text the target wrote itself.

The draft is judged along the target's own greedy text, which is more regular than source text, so most of what it
sees is such text: continuations of training prompts, greedy and sampled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pipedec_jax.config import LlamaConfig, check_keys
from pipedec_jax.model.parameters import Parameters
from pipedec_jax.training.batches import TextWindows
from pipedec_jax.training.generate import Record, generate, score
from pipedec_jax.training.trainer import Batch


@dataclasses.dataclass(frozen=True)
class Portion:
    """Sequences of one kind."""

    sequences: int
    batch: int
    """Sequences made at a time."""
    prompt: int
    """Tokens of training text at the start of each (P)."""
    new: int = 0
    """Tokens that the target writes after them; with 0 the sequence is source text alone."""
    greedy: float = 0.0
    """Share of the sequences written greedily; the others are drawn at temperature 1."""

    def __post_init__(self) -> None:
        for name, least in (("sequences", 1), ("batch", 1), ("prompt", 1), ("new", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} of a portion must be a whole number of at least {least}, not {value!r}")
        if not isinstance(self.greedy, int | float) or not 0 <= self.greedy <= 1:
            raise ValueError(f"greedy of a portion must lie between 0 and 1, not {self.greedy!r}")

    @property
    def length(self) -> int:
        """Tokens fed to a student (T). The last token of a continuation has no successor and is left out."""
        return self.prompt + self.new

    @classmethod
    def from_dict(cls, values: dict) -> Portion:
        """Build from a dictionary; unknown and missing keys and bad values raise `ValueError`."""
        check_keys(values, cls, "portion")
        return cls(**values)


def record_portion(
    config: LlamaConfig, params: Parameters, windows: TextWindows, portion: Portion, first: int, K: int, seed: int
) -> Iterator[Record]:
    """Make the sequences of a portion, a batch at a time; `first` numbers its first window of training text."""
    greedy = round(portion.greedy * portion.batch)
    temperature = jnp.asarray([0.0] * greedy + [1.0] * (portion.batch - greedy), jnp.float32)
    for start in range(0, portion.sequences, portion.batch):
        prompt = windows(first + start, portion.batch, portion.prompt)["token"]
        if portion.new:
            key = jax.random.fold_in(jax.random.key(seed), first + start)
            # One token more than is kept, so that the last kept one has the teacher's choices too.
            token, choice, log_prob = generate(config, params, prompt, portion.new + 1, temperature, K, key)
            token = token[:, :-1]
        else:
            token, (choice, log_prob) = prompt, score(config, params, prompt, K)
        yield Record(*(np.asarray(x) for x in (token, choice, log_prob)))


def join(records: Sequence[Record]) -> Record:
    """All sequences of several records of one length."""
    fields = [field.name for field in dataclasses.fields(Record)]
    return Record(*(np.concatenate([getattr(record, name) for record in records]) for name in fields))


def write_records(
    config: LlamaConfig,
    params: Parameters,
    windows: TextWindows,
    portions: Sequence[Portion],
    directory: Path,
    K: int = 16,
    seed: int = 0,
    lengths: Collection[int] | None = None,
) -> None:
    """Write one `.npz` file per portion; those that exist are left, so that a killed run goes on.

    Given `lengths`, portions of other lengths are left out.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for number, portion in enumerate(portions):
        path = directory / f"{number:02d}-{portion.length}.npz"
        if path.exists() or (lengths is not None and portion.length not in lengths):
            continue
        started = time.monotonic()
        # Portions start far apart in the sequence of windows, so that their prompts differ.
        batches = record_portion(config, params, windows, portion, 1_000_000 * (number + 1), K, seed)
        total = -(-portion.sequences // portion.batch)
        joined = join(list(tqdm(batches, total=total, desc=path.stem, disable=not sys.stderr.isatty())))
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, token=joined.token, choice=joined.choice, log_prob=joined.log_prob)
        partial.rename(path)
        speed = joined.token.size / (time.monotonic() - started)
        print(f"{path.name}: {joined.token.size} tokens, {speed:.0f} tokens/s", flush=True)


class TeacherWindows:
    """Training sequences out of records: every length draws from all records of that length, in shuffled rounds."""

    def __init__(self, directory: Path, seed: int = 0) -> None:
        by_length: dict[int, list[Record]] = {}
        for path in sorted(directory.glob("*.npz")):
            with np.load(path) as arrays:
                record = Record(arrays["token"], arrays["choice"], arrays["log_prob"])
            by_length.setdefault(record.token.shape[1], []).append(record)
        if not by_length:
            raise FileNotFoundError(f"no records in {directory}; let the target write them first")
        self._records = {length: join(records) for length, records in by_length.items()}
        self._seed = seed

    @property
    def digest(self) -> str:
        """A hash of all recorded tokens."""
        tokens = (self._records[length].token.tobytes() for length in sorted(self._records))
        return hashlib.sha256(b"".join(tokens)).hexdigest()

    @property
    def highest(self) -> int:
        """The highest token in them, written or chosen."""
        return max(int(max(record.token.max(), record.choice.max())) for record in self._records.values())

    def __call__(self, window: int, B: int, T: int) -> Batch:
        """Sequences number `window .. window + B - 1` of length `T`, with the teacher's choices."""
        if T not in self._records:
            raise ValueError(f"no records of length {T}; there are {sorted(self._records)}")
        record = self._records[T]
        rounds = {number // len(record) for number in (window, window + B - 1)}
        order = {one: np.random.default_rng([self._seed, T, one]).permutation(len(record)) for one in rounds}
        if len(record) < B:
            raise ValueError(f"a batch of {B} needs more sequences of length {T} than the {len(record)} recorded")
        rows = np.asarray([order[one // len(record)][one % len(record)] for one in range(window, window + B)])
        return {
            "token": record.token[rows],
            "choice": record.choice[rows].astype(np.int32),
            "log_prob": record.log_prob[rows],
        }
