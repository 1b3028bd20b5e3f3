"""Conversion of a source: all checks, then all writing aside, array by array, then one rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from checkpoints_convert import manifest
from checkpoints_convert.checkpoint import DTYPES, array_dtype, check_dtype
from checkpoints_convert.config_json import Json
from checkpoints_convert.detection import open_source
from checkpoints_convert.hashing import BackgroundChecksums, file_facts
from checkpoints_convert.hub import local_directory
from checkpoints_convert.layout import contiguous
from checkpoints_convert.manifest import VERSION, FileFacts, Manifest, StoredArray
from checkpoints_convert.paths import any_path, is_cloud
from checkpoints_convert.report import binary
from checkpoints_convert.source import SourceCheckpoint, tokenizer_files
from checkpoints_convert.store import (
    ARRAYS,
    chunked,
    is_converted,
    metadata_files,
    open_checkpoint,
    write_array,
    write_tree_metadata,
)
from checkpoints_convert.tokenizer_check import check_tokenizer
from checkpoints_convert.workplace import Workplace, boot, workplace, workplace_of
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.int8 import as_int8, channel_scales, quantize
from pipedec_jax.model.parameters import SCALE, Part, fixed_dtype, input_axes, parameter_shapes
from pipedec_jax.small_files import read_small


def convert(
    source: str | Path,
    destination: str | Path,
    dtype: str | None = None,
    *,
    int8: bool = False,
    overwrite: bool = False,
    wait: bool = False,
) -> Path:
    """Convert a published LLaMA checkpoint; shows progress where standard error is a terminal.

    `destination` appears complete or not at all. A conversion that was interrupted or killed goes on where it was when
    it is started again, and ends with the same bytes; one that is done is left as it is. After an error, what was
    written is removed.

    Args:
        source: directory of a model in Hugging Face's or Meta's format, or a repository of the Hugging Face hub
            (`org/name`).
        destination: directory of the converted checkpoint; may be a path of an object store that Orbax takes
            (`gs://...`), which is then written in place, its manifest last.
        dtype: `bfloat16`, `float16` or `float32`; the source's when not given.
        int8: store the layers' matrices as int8 with a scale per output channel, made from the source's values; `dtype`
            is then that of all else (see `pipedec_jax.model.int8`).
        overwrite: replace a converted checkpoint at `destination`, if there is nothing else in it.
        wait: wait while another process converts to `destination`.

    Returns:
        `destination`.

    Raises:
        FileExistsError: when `destination` is in use.
        FileNotFoundError: when something that belongs to a source is not there.
        ImportError: when the source is pickled and torch is not installed.
        OSError: when the disk is full, or something cannot be read or written.
        ValueError: for a source that cannot be converted, or a dtype that it cannot be stored in.
    """
    target = destination_path(destination)
    if not workplace_of(target).exists() and (overwrite or not is_converted(target)):
        _check_free(target, overwrite)
    checkpoint = open_source(local_directory(source))
    others = {name: read_small(file) for name, file in tokenizer_files(checkpoint.directory).items()}
    dtype = _stored_dtype(checkpoint, dtype)
    check_tokenizer(checkpoint, others)
    checkpoint.check_tied_head()

    config = as_int8(checkpoint.config) if int8 else checkpoint.config
    if not overwrite and _is_done(target, checkpoint, config, dtype, others):
        return target
    plan = _plan(checkpoint, config, dtype, others)
    with workplace(target, plan, wait=wait) as place:
        if place.finished:
            place.remove()
            return target
        if not (place.in_place and (place.resumed or place.clearing)):
            if place.in_place and place.begun and not is_converted(target):
                # Nothing tells whether it still runs.
                raise FileExistsError(
                    f"{target} holds part of a conversion with other options, which was stopped or is still running: "
                    f"convert with those to go on with it, or remove it and {place.root}, or choose another destination"
                )
            _check_free(target, overwrite)
        try:
            place.prepare()
            _check_space(config, dtype, place)
            for name, data in others.items():
                (place.checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
                (place.checkpoint / name).write_bytes(data)
            facts = {name: FileFacts.of(data) for name, data in others.items()}
            found = _write(checkpoint, config, dtype, facts, place)
            if _plan(checkpoint, config, dtype, others) != plan:
                raise ValueError(f"{checkpoint.directory} changed while it was converted; start again")
            found.write(place.checkpoint / manifest.FILE)
            place.finish()
        except Exception:
            # Interrupts and signals pass: whoever starts again goes on.
            place.remove()
            raise
    return target


def destination_path(destination: str | Path) -> Path:
    """The path of a destination in full: `convert` works beside it."""
    return any_path(destination) if is_cloud(destination) else Path(destination).resolve()


def read_as(checkpoint: SourceCheckpoint, path: str, dtype: str) -> np.ndarray:
    """An array of the source in the dtype it is to be stored in.

    Raises:
        ValueError: when a finite value is too large for the dtype (float16 ends at 65504).
    """
    return cast(contiguous(checkpoint.view(path)), path, dtype)


def cast(array: np.ndarray, path: str, dtype: str) -> np.ndarray:
    """`array` in `dtype`; `ValueError`, naming `path`, when a finite value is too large for it."""
    if array.dtype == DTYPES[dtype]:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(DTYPES[dtype])
    if not np.array_equal(np.isfinite(result), np.isfinite(array)):
        raise ValueError(f"array {path!r} has values too large for {dtype}; choose --dtype bfloat16 or float32")
    return result


def _write(
    checkpoint: SourceCheckpoint, config: LlamaConfig, dtype: str, others: dict[str, FileFacts], place: Workplace
) -> Manifest:
    """Write all arrays but what an earlier run has finished."""
    layout = _layout(config, dtype)
    parameters = place.checkpoint / ARRAYS
    parameters.mkdir(exist_ok=True)
    arrays = {path: found for path, stored in layout.items() if (found := _recorded(place, path, stored)) is not None}
    known = {file: FileFacts(**facts) for file in checkpoint.files if (facts := place.recorded("source", file.name))}

    def hashed(file: Path, facts: FileFacts) -> None:
        place.record("source", file.name, {"bytes": facts.bytes, "checksum": facts.checksum})

    with (
        BackgroundChecksums(checkpoint.files, known, hashed) as checksums,
        tqdm(
            desc="convert",
            total=sum(stored.nbytes for stored in layout.values()),
            initial=sum(array.nbytes for array in arrays.values()),
            unit="B",
            unit_scale=True,
            disable=None,
        ) as bar,
    ):
        for path in checkpoint.reading_order():
            # An int8 matrix and its scales; else one array.
            missing = [name for name in (path, path + SCALE) if name in layout and name not in arrays]
            if not missing:
                continue
            readers = _readers(checkpoint, config, path, dtype)
            for name in missing:
                arrays[name] = write_array(parameters, name, layout[name], readers[name], bar.update)
                place.record("array", name, arrays[name].to_json())
        source_files = {file.name: facts for file, facts in checksums.result().items()}
    write_tree_metadata(parameters, config)
    metadata = {f"{ARRAYS}/{name}": FileFacts.of((parameters / name).read_bytes()) for name in metadata_files(config)}
    source = {
        "format": checkpoint.format,
        "name": checkpoint.directory.resolve().name,
        "files": {name: vars(source_files[name]) for name in sorted(source_files)},
    }
    return Manifest(config, dtype, checkpoint.bos_token_id, checkpoint.eos_token_ids, source, others, metadata, arrays)


def _readers(
    checkpoint: SourceCheckpoint, config: LlamaConfig, path: str, dtype: str
) -> dict[str, Callable[[Part], np.ndarray]]:
    """What reads the parts of the arrays that are stored for one array of the source."""
    array = checkpoint.view(path)
    if fixed_dtype(config, path) is None:
        return {path: lambda part: cast(contiguous(array[part]), path, dtype)}
    scale = channel_scales(array, path)
    inputs = input_axes(path)
    return {
        path: lambda part: quantize(contiguous(array[part]), scale[part[inputs:]]),
        path + SCALE: lambda part: scale[part],
    }


def _layout(config: LlamaConfig, dtype: str) -> dict[str, StoredArray]:
    """How every array is to be stored."""
    shapes = parameter_shapes(config)
    return {path: chunked(path, shape, array_dtype(config, path, dtype).name) for path, shape in shapes.items()}


def _recorded(place: Workplace, path: str, stored: StoredArray) -> StoredArray | None:
    found = place.recorded("array", path)
    return None if found is None else StoredArray.from_json(found, path, stored.shape, stored.dtype)


def _plan(checkpoint: SourceCheckpoint, config: LlamaConfig, dtype: str, others: dict[str, bytes]) -> Json:
    """All that the result's bytes depend on; the weights by name, size and time, so that nothing is read for it."""
    weights = {file.name: [(facts := file.stat()).st_size, facts.st_mtime_ns] for file in checkpoint.files}
    return {
        "version": VERSION,
        "boot": boot(),
        "tool": manifest.TOOL,
        "source": os.path.realpath(checkpoint.directory),
        "model": config.to_dict(),
        "special": [checkpoint.bos_token_id, checkpoint.eos_token_ids],
        "dtype": dtype,
        "weights": weights,
        "others": {name: FileFacts.of(data).checksum for name, data in others.items()},
    }


def _check_space(config: LlamaConfig, dtype: str, place: Workplace) -> None:
    """Raise `OSError` when the disk cannot hold what is still to be written."""
    if place.in_place:
        return
    layout = _layout(config, dtype).items()
    need = sum(stored.chunks * stored.chunk_bytes for path, stored in layout if place.recorded("array", path) is None)
    free = shutil.disk_usage(place.root).free
    if free < need:
        raise OSError(
            f"the conversion needs {binary(need)} more in {place.root.parent}, which has {binary(free)} free; "
            "make room or choose another destination"
        )


def _stored_dtype(checkpoint: SourceCheckpoint, dtype: str | None) -> str:
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
    foreign = sorted({entry.name for entry in destination.iterdir()} - _written(destination))
    if foreign:
        raise FileExistsError(
            f"{destination} also holds {', '.join(foreign[:5])}, which no conversion wrote and which would be lost: "
            "move that away, or choose another destination"
        )


def _written(destination: Path) -> set[str]:
    """The names in a converted checkpoint's directory that a conversion has written."""
    try:
        files = open_checkpoint(destination).manifest.files
    except (ValueError, OSError):  # Damaged: what a checkpoint may have.
        files = tokenizer_files(destination)
    return {manifest.FILE, ARRAYS, *(name.split("/")[0] for name in files)}


def _is_done(
    destination: Path, checkpoint: SourceCheckpoint, config: LlamaConfig, dtype: str, others: dict[str, bytes]
) -> bool:
    """Whether `destination` is this very source converted so: by its manifest and the source files' checksums."""
    if not is_converted(destination) or workplace_of(destination).exists():
        return False
    try:
        found = open_checkpoint(destination).manifest
    except (ValueError, OSError):
        return False
    facts = {name: FileFacts.of(data) for name, data in others.items()}
    sizes = {file.name: file.stat().st_size for file in checkpoint.files}
    known = found.source["files"]
    return (
        (found.model, found.dtype, found.files) == (config, dtype, facts)
        and (found.bos_token_id, found.eos_token_ids) == (checkpoint.bos_token_id, checkpoint.eos_token_ids)
        and {name: known[name]["bytes"] for name in known} == sizes
        and all(vars(file_facts(file)) == known[file.name] for file in checkpoint.files)
    )
