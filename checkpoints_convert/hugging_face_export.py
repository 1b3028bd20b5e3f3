"""The way back: a converted checkpoint as Hugging Face safetensors, bit for bit the tensors it was made from."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tqdm import tqdm

from checkpoints_convert.checkpoint import DTYPES
from checkpoints_convert.config_json import config_json
from checkpoints_convert.hugging_face import tensor_name, to_hugging_face
from checkpoints_convert.layout import contiguous
from checkpoints_convert.paths import is_cloud, remove_tree
from checkpoints_convert.report import binary
from checkpoints_convert.store import ConvertedCheckpoint, open_checkpoint
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.int8 import plain
from pipedec_jax.model.parameters import ParameterSource, parameter_count, parameter_shapes
from pipedec_jax.small_files import read_small

SHARD_BYTES = 2**30
"""Most bytes of a file, unless a single tensor has more. One file is in memory at a time."""
SUFFIX = ".export"
"""What the name of a directory ends in that an export is written to before it has its own name."""


def export(converted: str | Path, directory: str | Path) -> Path:
    """Write a converted checkpoint as a Hugging Face directory; shows progress where standard error is a terminal.

    `directory` appears complete or not at all. Int8 layers are multiplied out in the checkpoint's dtype: what is
    exported then are not the tensors that it was made from.

    Args:
        converted: what `convert` wrote.
        directory: to create.

    Returns:
        `directory`.

    Raises:
        FileExistsError: when `directory` is in use.
        FileNotFoundError: when `converted` is no converted checkpoint.
        OSError: when it cannot be written.
        ValueError: when `converted` is damaged, or `directory` a path of an object store.
    """
    checkpoint = open_checkpoint(converted)
    if is_cloud(directory):
        raise ValueError(f"{directory} is not on this machine; export to a local directory and copy that")
    directory = Path(directory).resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists; choose another directory")
    checkpoint.check_files()
    weights = plain(checkpoint, DTYPES[checkpoint.dtype])
    _remove_left(directory)
    need = parameter_count(checkpoint.config) * DTYPES[checkpoint.dtype].itemsize
    free = shutil.disk_usage(_existing(directory)).free
    if free < need:
        raise OSError(
            f"the export needs {binary(need)} in {directory.parent}, which has {binary(free)} free; "
            "make room or choose another directory"
        )
    partial = directory.with_name(f".{directory.name}.{os.getpid()}{SUFFIX}")
    remove_tree(partial)
    partial.mkdir(parents=True)
    held = _hold(partial)
    try:
        _write_weights(weights, DTYPES[checkpoint.dtype].itemsize, partial)
        _write_others(checkpoint, partial)
        partial.rename(directory)
    except BaseException:
        remove_tree(partial)
        raise
    finally:
        if held is not None:
            os.close(held)
    return directory


def _remove_left(directory: Path) -> None:
    """Remove what exports to `directory` wrote that were killed: a model's size of files that nobody sees."""
    name = re.compile(rf"\.{re.escape(directory.name)}\.\d+{re.escape(SUFFIX)}")
    for left in directory.parent.glob(".*") if directory.parent.is_dir() else ():
        if name.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
            held = _hold(left)
            if held is not None:
                remove_tree(left)
                os.close(held)


def _hold(directory: Path) -> int | None:
    """Mark a directory as in use; the mark is gone with the file that is returned, or with the process.

    Returns:
        None when another process has marked it, and where there are no such marks (on Windows).
    """
    try:
        import fcntl
    except ImportError:
        return None
    opened = None
    try:
        opened = os.open(directory, os.O_RDONLY)
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if opened is not None:
            os.close(opened)
        return None
    return opened


def _write_weights(weights: ParameterSource, item_bytes: int, directory: Path) -> None:
    shards = _shards(weights.config, item_bytes)
    total = parameter_count(weights.config) * item_bytes
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    weight_map: dict[str, str] = {}
    with tqdm(desc="export", total=total, unit="B", unit_scale=True, disable=None) as bar:
        for name, paths in zip(names, shards, strict=True):
            tensors: dict[str, np.ndarray] = {}
            for path in paths:
                tensors[tensor_name(path)] = contiguous(to_hugging_face(path, weights.read(path)))
            try:
                save_file(tensors, directory / name, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"{name} cannot be written to {directory.parent}: {error}") from error
            # safetensors lets the owner alone read what it writes.
            (directory / name).chmod(0o666 & ~_umask())
            weight_map |= dict.fromkeys(tensors, name)
            bar.update(sum(tensor.nbytes for tensor in tensors.values()))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_others(checkpoint: ConvertedCheckpoint, directory: Path) -> None:
    ends = checkpoint.eos_token_ids
    values = config_json(checkpoint.config, checkpoint.dtype) | {
        "bos_token_id": checkpoint.bos_token_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None,
    }
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    for name in checkpoint.manifest.files:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(read_small(checkpoint.directory / name))


def _shards(config: LlamaConfig, item_bytes: int) -> list[list[str]]:
    """Paths in model order, cut into files of at most `SHARD_BYTES`."""
    shards: list[list[str]] = [[]]
    size = 0
    for path, shape in parameter_shapes(config).items():
        bytes_ = math.prod(shape) * item_bytes
        if shards[-1] and size + bytes_ > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(path)
        size += bytes_
    return shards


def _existing(path: Path) -> Path:
    """The nearest directory above `path` that exists."""
    return next(parent for parent in path.parents if parent.is_dir())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
