"""A whole run of exit-head training: data, the target's own text, training, measuring, saving beside the target."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert.checkpoint import DTYPES, check_dtype
from pipedec_jax.config import LlamaConfig
from pipedec_jax.exit_store import description_path, fingerprint, load_exit_head, save_exit_head
from pipedec_jax.loading import Model, load
from pipedec_jax.model.exit_head import ExitHeadConfig
from pipedec_jax.model.int8 import plain
from pipedec_jax.model.parameters import Parameters, read_tree
from pipedec_jax.training.evaluate import EvaluationConfig
from pipedec_jax.training.exit_data import ExitData, begin_token, encode_documents, open_data, read_files
from pipedec_jax.training.exit_evaluate import check_documents, exit_agreement, target_texts
from pipedec_jax.training.exits import ExitPlan, Heads, train_exit_heads
from pipedec_jax.training.loop import Log
from pipedec_jax.training.teacher import Portion, TeacherWindows, write_records
from pipedec_jax.training.trainer import Batches
from pipedec_jax.whole_files import write_whole

Agreement = dict[str, dict[str, float]]
"""For every head's name, the agreement with the target by shortlist size."""


def to_float32(tree: Parameters) -> Parameters:
    """A tree of arrays in float32."""
    return jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), tree)


def trained_geometry(target: Model) -> LlamaConfig:
    """The target as its heads learn from it: of plain matrices, and without the vocabulary's padding rows."""
    return dataclasses.replace(target.config, int8=False, vocab_size=target.vocab_size)


def read_float32(target: Model) -> Parameters:
    """A model's whole parameter tree in float32, of its `trained_geometry`."""
    return cut_vocabulary(read_tree(plain(target.source, np.float32), jnp.float32), target.vocab_size)


def cut_vocabulary(tree: Parameters, tokens: int) -> Parameters:
    """The tree of a model, or of a head, without the vocabulary's rows from `tokens` on: they are never chosen."""
    cut = dict(tree)
    if "embedding" in tree:
        cut["embedding"] = tree["embedding"][:tokens]
    if "head" in tree:
        cut["head"] = tree["head"][:, :tokens]
    return cut


def pad_vocabulary(head: Parameters, rows: int) -> Parameters:
    """A head's tree with as many rows of the vocabulary as its target has; those added are zero."""
    if "head" not in head:
        return head
    matrix = np.asarray(head["head"])
    return head | {"head": np.pad(matrix, ((0, 0), (0, rows - matrix.shape[1])))}


class ExitRun:
    """Training exit heads for one target. Making one checks everything that can be checked without weights.

    Args:
        target: The target's directory.
        plan: Heads and training.
        data: Text files, lists (`@LIST`) or one directory of records; see `exit_data.open_data`.
        held_out: Text files or lists to measure on; the last training documents when empty.
        root: Where the files of lists lie.
        portions: What the target writes from the text before training, which then learns from that; nothing when
            empty (heads learn from the text itself).
        directory: The run's folder; a killed run goes on when it is started with the same folder again.
        settings: What is measured at the end; by default as `EvaluationConfig`, in a short context half of it each.
        store_dtype: What the heads are stored in; what the target is stored in when not given.
        save_seconds: Time between checkpoints; 0 saves after every step.

    Raises:
        FileNotFoundError: when target or data are missing.
        ValueError: for an exit layer outside the target, unfitting data, or a folder of another run.
    """

    def __init__(
        self,
        target: str | Path,
        plan: ExitPlan,
        data: Sequence[str],
        held_out: Sequence[str] = (),
        *,
        root: Path | None = None,
        portions: Sequence[Portion] = (),
        directory: Path | None = None,
        settings: EvaluationConfig | None = None,
        store_dtype: str | None = None,
        save_seconds: float = 180.0,
    ) -> None:
        self.target: Model = load(target)
        if not Path(self.target.name).is_dir():
            raise ValueError(f"heads are stored beside their target, and {self.target.name} is no local directory")
        self.geometry = trained_geometry(self.target)
        self.plan = plan
        for head in plan.heads:
            head.check(self.target.config)
        self.store_dtype = check_dtype(store_dtype or self.target.dtype)
        half = self.target.config.context // 2
        usual = EvaluationConfig()
        self.settings = settings or dataclasses.replace(usual, prompt=min(usual.prompt, half), new=min(usual.new, half))
        self.save_seconds = save_seconds
        end = self.target.end_tokens
        self.data: ExitData = open_data(
            self.target.tokenizer, end[0] if end else None, data, held_out, root, plan.training.seed
        )
        self.portions = list(portions)
        self._check_lengths()
        self.identity = {
            "target": str(Path(target).resolve()),
            "plan": plan.to_dict(),
            "data": self.data.digest,
            "portions": [dataclasses.asdict(portion) for portion in self.portions],
        }
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:8]
        self.directory = directory or Path("runs") / f"exits-{digest}"
        self._check_directory()

    def train(self, log: Log | None = None, every: int = 0, stop_after: int | None = None) -> Heads:
        """Train the heads, or go on where the run was killed.

        Args:
            log: Called with the run's figures.
            every: Steps between measurements on held-out text; 0 for none.
            stop_after: Save and stop after this step, as if killed there.

        Raises:
            ValueError: when the target's weights changed since the run began, or a loss is not finite.
        """
        self._begin()
        own = self.own
        texts = (
            self._texts(dataclasses.replace(self.settings, prompts=min(32, self.settings.prompts))) if every else None
        )

        def report(done: int, heads: Heads) -> dict[str, Any]:
            if texts is None or done % every:
                return {}
            return {"agreement": self._agreement(heads, texts)}

        return train_exit_heads(
            self.plan, self.geometry, own, self._batches(), self.directory / "checkpoints", self.save_seconds,
            stop_after, log, report,
        )  # fmt: skip

    def measure(self, heads: Heads) -> Agreement:
        """Agreement of the heads as they will be stored, and of the untrained head at each exit, on held-out text."""
        stored = jax.tree.map(lambda value: np.asarray(value).astype(DTYPES[self.store_dtype]), heads)
        return self._agreement(to_float32(stored), self._texts(self.settings), untrained=True)

    @property
    def replaced(self) -> list[Path]:
        """Folders of stored heads in whose place `save` puts those of the same names."""
        descriptions = [description_path(self.target, head) for head in self.plan.heads]
        return [path.parent for path in descriptions if path.exists()]

    def save(self, heads: Heads, agreement: Agreement) -> list[Path]:
        """Store the heads beside the target; returns their folders."""
        known = fingerprint(self.target.source)
        plan = self.plan.to_dict()
        about = {"plan": plan["training"], "data": self.identity["data"], "portions": self.identity["portions"]}
        measured = {"measured": dataclasses.asdict(self.settings)}
        return [
            save_exit_head(
                self.target.name, head, self.target.config,
                pad_vocabulary(heads[head.name], self.target.config.vocab_size), known, self.store_dtype,
                about | measured, agreement[head.name],
            )
            for head in self.plan.heads
        ]  # fmt: skip

    @functools.cached_property
    def own(self) -> Parameters:
        """The target's parameters in float32; read when first used."""
        return read_float32(self.target)

    @property
    def _identity_file(self) -> Path:
        return self.directory / "run.json"

    def _begin(self) -> None:
        """Note in the folder whose run it is; raise `ValueError` when the target's weights changed since it began."""
        weights = fingerprint(self.target.source)
        if self._identity_file.is_file():
            if self._found().get("fingerprint") != weights:
                raise ValueError(
                    f"{self.directory} holds a run for other weights than {self.target.name} has; name another (--run)"
                )
            return
        values = self.identity | {"fingerprint": weights}
        write_whole(self._identity_file, json.dumps(values, indent=1) + "\n")

    def _found(self) -> dict[str, Any]:
        """Whose run the folder holds."""
        try:
            found = json.loads(self._identity_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self._identity_file} is damaged ({error}); name another folder (--run)") from error
        return found if isinstance(found, dict) else {}

    def _check_directory(self) -> None:
        """Raise `ValueError` when the folder holds another run."""
        if not self._identity_file.is_file():
            return
        found = self._found()
        here = json.loads(json.dumps(self.identity))  # Tuples become lists.
        differing = sorted(key for key in here if found.get(key) != here[key])
        if differing:
            raise ValueError(
                f"{self.directory} holds a run with another {' and '.join(differing)}; name another folder (--run)"
            )

    def _check_lengths(self) -> None:
        """Raise `ValueError` when some step could not get its sequences, or nothing could be measured after them."""
        training, context = self.plan.training, self.target.config.context
        if self.portions and self.data.windows is None:
            raise ValueError("the target writes its text from text files: name some with --data, not records")
        for stretch in training.stretches:
            if stretch.length > context:
                raise ValueError(
                    f"length {stretch.length} exceeds the target's context of {context} tokens; choose at most that "
                    "many (--length)"
                )
            if self.portions:
                rows = sum(portion.sequences for portion in self.portions if portion.length == stretch.length)
                if rows < stretch.batch * training.accumulate:
                    lengths = sorted({portion.length for portion in self.portions})
                    raise ValueError(
                        f"the target is to write {rows} sequences of length {stretch.length}, fewer than one step's "
                        f"{stretch.batch * training.accumulate}; it writes lengths {lengths} (choose one of them with "
                        "--length, or change --records)"
                    )
            else:
                self.data.batches(0, stretch.batch * training.accumulate, stretch.length)
            for portion in self.portions:
                if portion.length == stretch.length and self.data.windows is not None:
                    self.data.windows(0, 1, portion.prompt)
        if self.settings.prompt + self.settings.new > context:
            raise ValueError(
                f"measuring takes {self.settings.prompt} tokens of a prompt and {self.settings.new} after it, more "
                f"than the target's context of {context}"
            )
        check_documents(self.data.held_out, self.settings)

    def _batches(self) -> Batches:
        if not self.portions:
            return self.data.batches
        folder = self.directory / "records"
        assert self.data.windows is not None
        lengths = {stretch.length for stretch in self.plan.training.stretches}
        write_records(self.geometry, self.own, self.data.windows, self.portions, folder, lengths=lengths)
        return TeacherWindows(folder, self.plan.training.seed)

    def _texts(self, settings: EvaluationConfig) -> np.ndarray:
        return target_texts(self.geometry, self.own, self.data.held_out, self.data.begin, settings)

    def _agreement(self, heads: Heads, texts: np.ndarray, untrained: bool = False) -> Agreement:
        exits = sorted({head.exit_layer for head in self.plan.heads})
        configs = [*self.plan.heads, *(ExitHeadConfig(number, "target") for number in exits if untrained)]
        batch = min(self.settings.batch, len(texts))
        return exit_agreement(
            configs, self.geometry, heads, self.own, texts, self.settings.prompt, self.target.end_tokens, batch
        )


def worse_than_untrained(agreement: Agreement) -> list[str]:
    """Trained heads whose first guess is the target's less often than that of the untrained head at the same exit."""
    return [
        name
        for name, shares in agreement.items()
        if shares["1"] < agreement.get(f"{name.split('-')[0]}-target", shares)["1"]
    ]


def measure_stored(
    target: Model,
    heads: Sequence[ExitHeadConfig],
    held_out: Sequence[str],
    settings: EvaluationConfig,
    root: Path | None = None,
) -> Agreement:
    """Agreement of heads that are stored beside a target, and of untrained ones (`target`), on held-out text.

    Args:
        target: The target.
        heads: Heads of it.
        held_out: Text files or lists, as `exit_data.read_files` takes them.
        settings: What is measured.
        root: Where the files of lists lie.

    Raises:
        FileNotFoundError: when a file or a head is missing.
        ValueError: for a head of another target, or unfitting text.
    """
    end = target.end_tokens
    documents = encode_documents(target.tokenizer, read_files(held_out, root), end[0] if end else None)
    params = {head.name: load_exit_head(target, head.exit_layer, head.kind).params for head in heads}
    params = {name: cut_vocabulary(tree, target.vocab_size) for name, tree in to_float32(params).items()}
    own, geometry = read_float32(target), trained_geometry(target)
    texts = target_texts(geometry, own, documents, begin_token(target.tokenizer), settings)
    batch = min(settings.batch, len(texts))
    return exit_agreement(heads, geometry, params, own, texts, settings.prompt, target.end_tokens, batch)
