"""What `inspect` tells of a checkpoint, converted or not: geometry, parameters, dtype, size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from checkpoints_convert.config_json import Json
from checkpoints_convert.detection import open_any
from checkpoints_convert.source import SourceCheckpoint, tokenizer_files
from checkpoints_convert.store import ConvertedCheckpoint
from checkpoints_convert.tokenizer_check import padding, read_tokenizer
from pipedec_jax.model.parameters import parameter_count
from pipedec_jax.small_files import read_small


def describe(path: str | Path) -> Json:
    """Facts about the checkpoint at `path`, JSON-ready; reads no weights. Raises as `open_any` does.

    `tokens` are ids of the tokenizer, `None` where that cannot be read.
    """
    checkpoint = open_any(path)
    facts: Json = {"format": checkpoint.format if isinstance(checkpoint, SourceCheckpoint) else "converted"}
    if isinstance(checkpoint, ConvertedCheckpoint):
        facts |= {"tool": checkpoint.manifest.tool, "source": checkpoint.manifest.source}
        files = {name: checkpoint.directory / name for name in checkpoint.manifest.files}
    else:
        files = tokenizer_files(path)
    model = checkpoint.config.to_dict()
    if (scaling := checkpoint.config.rope_scaling) is not None:
        model["rope_scaling"] = {"kind": scaling.kind} | model["rope_scaling"]
    return facts | {
        "parameters": parameter_count(checkpoint.config),
        "dtype": checkpoint.dtype,
        "bytes": checkpoint.nbytes,
        "model": model,
        "bos_token_id": checkpoint.bos_token_id,
        "eos_token_ids": checkpoint.eos_token_ids,
        "tokens": _tokens(files, checkpoint.directory),
        "files": sorted(files),
    }


def _tokens(files: Mapping[str, Path], directory: Path) -> int | None:
    try:
        return read_tokenizer({name: read_small(file) for name, file in files.items()}, directory).size
    except (ValueError, OSError):
        return None


def as_text(facts: Json) -> str:
    """The facts of `describe` as aligned lines; `bytes` counts the arrays, not the files beside them."""
    lines = dict(facts)
    lines["parameters"] = f"{facts['parameters']:,}"
    lines["bytes"] = f"{facts['bytes']:,} ({binary(facts['bytes'])})"
    lines["files"] = " ".join(facts["files"])
    rows, tokens = facts["model"]["vocab_size"], facts["tokens"]
    lines["tokens"] = padding(rows, tokens) or ("the tokenizer cannot be read" if tokens is None else tokens)
    if "source" in facts:
        lines["source"] = f"{facts['source']['format']} {facts['source']['name']}"
    model = {f"  {name}": value for name, value in lines.pop("model").items()}
    width = max(map(len, (*lines, *model)))
    rows = (*lines.items(), ("model", ""), *model.items())
    return "\n".join(f"{name:<{width}}  {printable(str(value))}" for name, value in rows)


def printable(text: str) -> str:
    """`text` in one line of a terminal: a name may hold line breaks and what steers one."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def binary(size: float) -> str:
    """A number of bytes in KiB, MiB and so on."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
