"""Conversions made on first use and kept."""

from __future__ import annotations

import hashlib
from pathlib import Path

from checkpoints_convert.conversion import convert
from checkpoints_convert.detection import is_source, open_source
from checkpoints_convert.manifest import VERSION
from checkpoints_convert.store import is_converted
from pipedec_jax.disk_cache import cache_directory


def convert_cached(source: str | Path, cache_dir: str | Path | None = None) -> Path:
    """The converted checkpoint of a source directory, made on first use and kept in a cache.

    A changed source is converted anew. Several processes may ask at once: one converts, the others wait.

    Args:
        source: directory in Hugging Face's or Meta's format.
        cache_dir: where conversions are kept; by default `$PIPEDEC_JAX_CACHE`, else `~/.cache/pipedec_jax`.

    Raises:
        As `convert` does.
    """
    source = Path(source).resolve()
    if not is_source(source):
        raise FileNotFoundError(f"{source} is no Hugging Face directory: it has no config.json (and none of Meta's)")
    destination = cache_directory(cache_dir) / f"{source.name}-{stamp(source)}"
    if not is_converted(destination):
        try:
            # The widest dtype of the source, where it has several: keeps every value.
            convert(source, destination, open_source(source).dtype, wait=True)
        except OSError:
            # Another process was first: its conversion is as good.
            if not is_converted(destination):
                raise
    return destination


def stamp(source: Path) -> str:
    """Identifies a model's directory by its path and the names, sizes and times of its files; reads no weights."""
    digest = hashlib.sha256(f"{VERSION}\0{source}\0".encode())
    for path in sorted(source.iterdir()):
        if path.is_file():
            facts = path.stat()
            digest.update(f"{path.name}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]
