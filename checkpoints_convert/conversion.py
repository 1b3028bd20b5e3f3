"""Conversion of a Hugging Face directory: all checks, then all writing aside, then one rename."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from checkpoints_convert.checkpoint import DTYPES, check_dtype
from checkpoints_convert.source import HuggingFaceCheckpoint, is_hugging_face, open_hugging_face, tokenizer_files
from checkpoints_convert.store import VERSION, is_converted, write_arrays, write_config

CACHE_VARIABLE = "PIPEDEC_JAX_CACHE"


def convert(source: str | Path, destination: str | Path, dtype: str | None = None, *, overwrite: bool = False) -> Path:
    """Convert a Hugging Face LLaMA directory; shows progress where standard error is a terminal.

    `destination` appears complete or not at all: on any error or interrupt, what was written is removed.

    Args:
        source: directory with `config.json`, safetensors and tokenizer files.
        destination: directory of the converted checkpoint.
        dtype: `bfloat16`, `float16` or `float32`; the source's when not given.
        overwrite: replace a converted checkpoint at `destination`.

    Returns:
        `destination`.

    Raises:
        FileExistsError: when `destination` is in use.
        FileNotFoundError: when something that belongs to a source is not there.
        ValueError: for a source that cannot be converted, or a dtype that it cannot be stored in.
    """
    destination = Path(destination).resolve()
    _check_free(destination, overwrite)
    checkpoint = open_hugging_face(source)
    others = tokenizer_files(source)
    dtype = _stored_dtype(checkpoint, dtype)
    checkpoint.check_tied_head()

    with _appearing(destination, overwrite) as partial:
        for file in others:
            (partial / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(checkpoint.directory / file, partial / file)
        total = checkpoint.nbytes // DTYPES[checkpoint.dtype].itemsize * DTYPES[dtype].itemsize
        with tqdm(desc="convert", total=total, unit="B", unit_scale=True, disable=None) as bar:
            write_arrays(partial, checkpoint.config, lambda path: read_as(checkpoint, path, dtype), bar.update)
        facts = {"format": "huggingface-safetensors", "name": checkpoint.directory.resolve().name}
        write_config(partial, checkpoint, dtype, facts)
    return destination


def convert_cached(source: str | Path, cache_dir: str | Path | None = None) -> Path:
    """The converted checkpoint of a Hugging Face directory, made on first use and kept in a cache.

    A changed source is converted anew. Several processes may ask at once: each gets a complete checkpoint.

    Args:
        source: Hugging Face directory.
        cache_dir: where conversions are kept; by default `$PIPEDEC_JAX_CACHE`, else `~/.cache/pipedec_jax`.

    Raises:
        As `convert` does.
    """
    source = Path(source).resolve()
    if not is_hugging_face(source):
        raise FileNotFoundError(f"{source} is no Hugging Face directory: it has no config.json")
    cache = Path(cache_dir or os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "pipedec_jax")
    destination = cache / f"{source.name}-{_fingerprint(source)}"
    if not is_converted(destination):
        try:
            # The widest dtype of the source, where it has several: keeps every value.
            convert(source, destination, open_hugging_face(source).dtype)
        except OSError:
            # Another process was first: its conversion is as good.
            if not is_converted(destination):
                raise
    return destination


def read_as(checkpoint: HuggingFaceCheckpoint, path: str, dtype: str) -> np.ndarray:
    """An array of the source in the dtype it is to be stored in.

    Raises:
        ValueError: when a finite value is too large for the dtype (float16 ends at 65504).
    """
    array = checkpoint.read(path)
    if dtype == checkpoint.dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(DTYPES[dtype])
    if not np.array_equal(np.isfinite(cast), np.isfinite(array)):
        raise ValueError(f"array {path!r} has values too large for {dtype}; choose --dtype bfloat16 or float32")
    return cast


def _stored_dtype(checkpoint: HuggingFaceCheckpoint, dtype: str | None) -> str:
    if dtype is not None:
        return check_dtype(dtype)
    if len(checkpoint.stored_dtypes) > 1:
        raise ValueError(
            f"{checkpoint.directory} holds tensors of several dtypes ({', '.join(checkpoint.stored_dtypes)}); "
            "choose one with --dtype (float32 keeps every value)"
        )
    return checkpoint.dtype


def _check_free(destination: Path, overwrite: bool) -> None:
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not is_converted(destination):
        raise FileExistsError(f"{destination} exists and is no converted checkpoint; choose another destination")
    if not overwrite:
        raise FileExistsError(f"{destination} exists; pass --overwrite to replace it, or choose another destination")


@contextlib.contextmanager
def _appearing(destination: Path, overwrite: bool) -> Iterator[Path]:
    """A new directory beside `destination`, renamed to it at the end of the block, or removed if the block fails."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    stem = f".{destination.name}.{uuid.uuid4().hex[:12]}"
    partial, old = destination.with_name(f"{stem}.partial"), destination.with_name(f"{stem}.old")
    partial.mkdir()
    try:
        yield partial
        if overwrite and destination.exists():
            destination.rename(old)
        try:
            # Fails when another process has put its own directory there in the meantime.
            partial.rename(destination)
        except BaseException:
            if old.exists():
                old.rename(destination)
            raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _fingerprint(source: Path) -> str:
    """Identifies a source by path, config, and the names, sizes and times of its files; reads no weights."""
    digest = hashlib.sha256(f"{VERSION}\0{source}\0".encode())
    for path in sorted(source.iterdir()):
        if path.is_file():
            facts = path.stat()
            digest.update(f"{path.name}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]
