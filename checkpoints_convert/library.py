"""What lies in a directory of checkpoints: which models, how large, complete or not, and which serve as drafts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from checkpoints_convert.config_json import Json, read_json
from checkpoints_convert.detection import is_source, open_any
from checkpoints_convert.paths import inside, is_cloud
from checkpoints_convert.report import binary, printable
from checkpoints_convert.source import SourceCheckpoint, tokenizer_files
from checkpoints_convert.store import ARRAYS, ConvertedCheckpoint, first_missing, is_converted
from checkpoints_convert.workplace import SUFFIX
from pipedec_jax.config import Llama3Scaling, LlamaConfig
from pipedec_jax.model.parameters import parameter_count


@dataclasses.dataclass(frozen=True)
class Entry:
    """One checkpoint of a library."""

    name: str
    state: str
    """`complete`; `source` for a model as it was published; else what is wrong."""
    family: str = ""
    parameters: int = 0
    dtype: str = ""
    bytes: int = 0
    vocabulary: str | None = None
    """The same for two models with the same map from tokens to ids."""

    @property
    def usable(self) -> bool:
        """Whether the model can be loaded."""
        return self.state in ("complete", "source")


def library(directory: str | Path) -> list[Entry]:
    """The checkpoints directly in `directory`, by name; reads no weights.

    Raises:
        FileNotFoundError: when there is no such directory.
        ValueError: for a path of an object store.
    """
    if is_cloud(directory):
        raise ValueError(f"{directory} is not on this machine; `inspect` shows a single checkpoint anywhere")
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory; give one that holds checkpoints")
    found = (_entry(path) for path in sorted(directory.iterdir()) if path.is_dir())
    return [entry for entry in found if entry is not None]


def drafts(entry: Entry, entries: list[Entry]) -> list[str]:
    """Names of the smaller models that have the vocabulary of `entry`, largest first."""
    if not entry.usable or entry.vocabulary is None:
        return []
    smaller = [
        other
        for other in entries
        if other.usable and other.vocabulary == entry.vocabulary and other.parameters < entry.parameters
    ]
    return [other.name for other in sorted(smaller, key=lambda other: -other.parameters)]


def table(entries: list[Entry]) -> str:
    """The entries as aligned lines under a heading."""
    rows = [("name", "family", "parameters", "dtype", "size", "state", "drafts")]
    for entry in entries:
        known = entry.parameters > 0
        rows.append(
            (
                entry.name,
                entry.family,
                _count(entry.parameters) if known else "",
                entry.dtype,
                binary(entry.bytes) if known else "",
                entry.state,
                ", ".join(drafts(entry, entries)),
            )
        )
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def as_json(entries: list[Entry]) -> list[Json]:
    """The entries, JSON-ready, each with its drafts."""
    return [dataclasses.asdict(entry) | {"drafts": drafts(entry, entries)} for entry in entries]


def family(config: LlamaConfig) -> str:
    """The LLaMA generation, or other family, that a geometry looks like; `LLaMA` when it is like none of these."""
    scaling = config.rope_scaling
    if config.attention_bias and config.vocab_size >= 151000:
        return "Qwen2"
    if (config.heads, config.kv_heads) == (32, 8) and config.vocab_size in (*range(32000, 32769), 131072):
        return "Mistral"
    if config.vocab_size >= 128000 and config.rope_theta == 500000.0:
        if scaling is None:
            return "LLaMA 3"
        if isinstance(scaling, Llama3Scaling):
            return "LLaMA 3.2" if scaling.factor == 32.0 else "LLaMA 3.1"
    if 32000 <= config.vocab_size <= 32256 and scaling is None:
        if config.rope_theta == 1000000.0:
            return "Code Llama"
        if config.rope_theta == 10000.0:
            return "LLaMA 1" if config.norm_eps < 5e-6 or config.context <= 2048 else "LLaMA 2"
    return "LLaMA"


def vocabulary(directory: str | Path) -> str | None:
    """A digest of a model's map from tokens to ids; None when it cannot be told.

    `tokenizer.json` is read as JSON, which takes a tenth of the time of loading the tokenizer.
    """
    try:
        files = tokenizer_files(directory)
        if "tokenizer.json" in files:
            tokens = _json_tokens(files["tokenizer.json"])
        else:
            from pipedec_jax.tokenizer import Tokenizer

            tokens = Tokenizer.load(files["tokenizer.model"].parent).vocabulary
    except (ValueError, OSError, KeyError, TypeError, AttributeError):
        return None
    if not tokens:
        return None
    return hashlib.sha256(json.dumps(sorted(tokens.items())).encode()).hexdigest()[:32]


def _json_tokens(file: Path) -> dict[str, int]:
    values = read_json(inside(file, file.parent))
    tokens = dict(values["model"]["vocab"])
    tokens.update({token["content"]: token["id"] for token in values.get("added_tokens", [])})
    return tokens


def _entry(path: Path) -> Entry | None:
    if path.name.startswith(".") and path.name.endswith(SUFFIX):
        return Entry(path.name.removeprefix(".").removesuffix(SUFFIX), "incomplete: its conversion was interrupted")
    if path.name.startswith("."):
        return None
    try:
        if not is_converted(path) and not is_source(path):
            return Entry(path.name, "incomplete: it has no manifest") if (path / ARRAYS).is_dir() else None
        checkpoint = open_any(path)
        state = "complete"
        if isinstance(checkpoint, SourceCheckpoint):
            state = "source"
        elif isinstance(checkpoint, ConvertedCheckpoint) and (missing := first_missing(checkpoint)):
            state = f"incomplete: {missing}"
    except (ValueError, OSError, ImportError) as error:
        return Entry(path.name, f"unreadable: {error}")
    return Entry(
        name=path.name,
        state=state,
        family=family(checkpoint.config),
        parameters=parameter_count(checkpoint.config),
        dtype=f"int8, {checkpoint.dtype}" if checkpoint.config.int8 else checkpoint.dtype,
        bytes=checkpoint.nbytes,
        vocabulary=vocabulary(path),
    )


def _count(number: float) -> str:
    for unit in ("", "K", "M", "B"):
        if number < 1000 or unit == "B":
            return f"{number:.4g}{unit}"
        number /= 1000
    raise AssertionError
