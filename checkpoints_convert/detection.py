"""Which format a directory is in, told from its files."""

from __future__ import annotations

from pathlib import Path

from checkpoints_convert.checkpoint import Checkpoint
from checkpoints_convert.hugging_face_source import has_weights, is_hugging_face, open_hugging_face
from checkpoints_convert.meta import is_meta, open_meta
from checkpoints_convert.paths import any_path, is_cloud
from checkpoints_convert.source import SourceCheckpoint
from checkpoints_convert.store import is_converted, open_checkpoint


def is_source(path: str | Path) -> bool:
    """Whether `path` looks like a model directory in Hugging Face's or Meta's format."""
    return not is_cloud(path) and (is_hugging_face(path) or is_meta(path))


def open_source(path: str | Path) -> SourceCheckpoint:
    """Open a model directory in Hugging Face's or Meta's format; reads configuration and headers, no weights.

    Raises:
        FileNotFoundError: when it is neither, or one of its files does not exist.
        ImportError: when its weights are pickled and torch is not installed.
        ValueError: when it is damaged or unsupported.
    """
    directory = any_path(path)
    if not directory.is_dir() or is_cloud(path):
        raise FileNotFoundError(f"{directory} is not a directory; give one that holds a model's files")
    # Some keep a config.json of Hugging Face's beside Meta's weights.
    if is_meta(directory) and not (is_hugging_face(directory) and has_weights(directory)):
        return open_meta(directory)
    if is_hugging_face(directory):
        return open_hugging_face(directory)
    if is_converted(directory):
        raise FileNotFoundError(f"{directory} is a converted checkpoint; give the model that it was made from")
    inner = directory / "original"
    hint = f" (but {inner} is one)" if is_meta(inner) else ""
    raise FileNotFoundError(
        f"{directory} is no model directory: it has neither config.json nor params.json with consolidated.00.pth{hint}"
    )


def open_any(path: str | Path) -> Checkpoint:
    """Open a converted checkpoint or a source, whichever `path` is.

    Raises:
        FileNotFoundError: when it is neither.
        ImportError: when it is a pickled source and torch is not installed.
        ValueError: when it is damaged or unsupported.
    """
    if is_source(path) and not is_converted(path):
        return open_source(path)
    return open_checkpoint(path)
