"""The safetensors files of a directory as one set of named tensors."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from checkpoints_convert.checkpoint import DTYPES
from checkpoints_convert.shard_index import check_index, weight_files
from checkpoints_convert.tensor_files import TensorInfo, map_tensor
from pipedec_jax.small_files import check_json

SINGLE = "model.safetensors"
HEADER_BYTES = 2**24
"""Most bytes of a file's header; a tensor takes about a hundred."""
SPELLINGS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Dtypes that are converted, as safetensors spells them and as we do."""


class SafetensorsDirectory:
    """All tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names."""

    def __init__(self, directory: Path) -> None:
        """Read the headers only.

        Raises:
            FileNotFoundError: when there are no such files, or the index names a shard that is not there.
            ValueError: for a damaged file, a tensor in two shards, or an index that contradicts the shards.
        """
        self.tensors: dict[str, TensorInfo] = {}
        self.files, weight_map = weight_files(directory, SINGLE)
        for file in self.files:
            self._add(file)
        if weight_map is not None:
            check_index(directory, SINGLE, weight_map, self.tensors)

    def view(self, name: str) -> np.ndarray:
        """One tensor, mapped (see `TensorFiles`). Its dtype must be one of `DTYPES`."""
        info = self.tensors[name]
        try:
            return map_tensor(info.file, info.offset, info.shape, DTYPES[info.dtype])
        except ValueError as error:
            raise ValueError(f"cannot read tensor {name!r}: {error}") from error

    def _add(self, file: Path) -> None:
        try:
            header = _read_header(file)
        except (SafetensorError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{file} is no complete safetensors file ({error}); it is damaged or its download was cut short, "
                "fetch it again"
            ) from error
        for name, (shape, dtype, offset) in header.items():
            if name in self.tensors:
                raise ValueError(f"tensor {name!r} is in two files, {self.tensors[name].file.name} and {file.name}")
            self.tensors[name] = TensorInfo(shape, dtype, file, offset)


def _read_header(file: Path) -> dict[str, tuple[tuple[int, ...], str, int]]:
    """Shape, dtype and absolute offset of every tensor of a file whose sizes and offsets are all consistent."""
    with file.open("rb") as opened:
        start = opened.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if size > HEADER_BYTES:
            raise ValueError(f"its header is said to have {size:,} bytes; at most {HEADER_BYTES:,} are read")
        text = opened.read(size)
    check_json(text, "its header")
    header: dict[str, Any] = json.loads(text)
    try:
        ends = (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        said = 8 + size + max(ends, default=0)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError("its header is malformed") from error
    # First, as the library maps a file of any size.
    if said != (found := file.stat().st_size):
        raise ValueError(f"it has {found:,} bytes, its header asks for {said:,}")
    # The library checks the whole header, but does not tell where the data lies; mapping it ourselves lets each
    # tensor's pages go again.
    with safe_open(file, framework="numpy") as checked:
        names = set(checked.keys())
    header.pop("__metadata__", None)
    if set(header) != names:
        raise ValueError("its header is ambiguous")
    tensors = {}
    for name, entry in header.items():
        shape, dtype = tuple(entry["shape"]), SPELLINGS.get(entry["dtype"], entry["dtype"])
        begin, end = entry["data_offsets"]
        if dtype in DTYPES and end - begin != int(np.prod(shape, dtype=object)) * DTYPES[dtype].itemsize:
            raise ValueError(f"tensor {name!r} does not have the bytes that its shape takes")
        tensors[name] = shape, dtype, 8 + size + begin
    return tensors
