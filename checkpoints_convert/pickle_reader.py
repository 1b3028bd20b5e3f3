"""PyTorch's pickled tensor files, read with its weights-only loader: no code in them can run.

The one module that needs torch, which is imported when such a file is opened.
"""

from __future__ import annotations

import os
import struct
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from checkpoints_convert.checkpoint import DTYPES
from checkpoints_convert.shard_index import check_index, weight_files
from checkpoints_convert.tensor_files import TensorInfo

if TYPE_CHECKING:
    import torch

SINGLE = "pytorch_model.bin"

RELOAD_BYTES = 2**28
"""Bytes that may stay mapped from tensors already read; then the file is mapped anew, which drops them."""

DIRECTORY_BYTES = 2**21
"""Most bytes of a file that are not tensor data, and of its archive's table; a thousand tensors take about a tenth of a
megabyte of each. What is made of them in memory may take two hundred times as much."""


class PickledFiles:
    """All tensors of some pickled files, no name twice."""

    def __init__(self, files: Sequence[Path], readers: int = 1) -> None:
        """Read everything but the tensors' data. Of `readers` at a time, each keeps a small share of pages mapped.

        Raises:
            ImportError: when torch is not installed.
            ValueError: for a damaged file, one that would run code, or a tensor in two files.
        """
        self.files = list(files)
        self.tensors: dict[str, TensorInfo] = {}
        self._opened: tuple[Path, dict[str, Any]] | None = None
        self._touched = 0
        self._readers = readers
        for file in self.files:
            for offset, (name, tensor) in enumerate(self._load(file).items()):
                if name in self.tensors:
                    raise ValueError(f"tensor {name!r} is in two files, {self.tensors[name].file.name} and {file.name}")
                dtype = str(tensor.dtype).removeprefix("torch.")
                self.tensors[name] = TensorInfo(tuple(tensor.shape), dtype, file, offset)
        self._opened = None

    def view(self, name: str) -> np.ndarray:
        """One tensor, mapped (see `TensorFiles`). Its dtype must be one of `DTYPES`."""
        info = self.tensors[name]
        tensor = self._load(info.file).get(name)
        if tensor is None or tuple(tensor.shape) != info.shape or str(tensor.dtype) != f"torch.{info.dtype}":
            raise ValueError(f"cannot read tensor {name!r}: {info.file} has changed since it was opened")
        self._touched += _span(tensor)
        import torch

        # NumPy knows no bfloat16 of torch's, so the bits travel as integers.
        bits = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
        return tensor.detach().view(bits).numpy().view(DTYPES[info.dtype])

    def let_go(self) -> None:
        """Give pages of tensors already read back, where they have become many; no view of them may be in use."""
        if self._touched > RELOAD_BYTES // self._readers**2:
            self._opened = None

    def _load(self, file: Path) -> dict[str, Any]:
        """The tensors of a file by name, mapped."""
        if self._opened is not None and self._opened[0] != file:
            self._opened = None
        self.let_go()
        if self._opened is None:
            self._touched = 0
            self._opened = (file, _load_tensors(file))
        return self._opened[1]


class PickledDirectory(PickledFiles):
    """All tensors of `pytorch_model.bin`, or of the shards that `pytorch_model.bin.index.json` names."""

    def __init__(self, directory: Path) -> None:
        """Read everything but the tensors' data; raises as `PickledFiles` does, and for a wrong index."""
        files, weight_map = weight_files(directory, SINGLE)
        super().__init__(files)
        if weight_map is not None:
            check_index(directory, SINGLE, weight_map, self.tensors)


def _load_tensors(file: Path) -> dict[str, Any]:
    _check_archive(file)
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{file} is a pickled PyTorch file, which only PyTorch reads safely: pip install 'pipedec_jax[torch]', or "
            "take the model's safetensors files"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # The loader raises errors of many kinds for a damaged file.
        raise ValueError(f"{file} was refused by PyTorch's weights-only loader: {_reason(error)}") from error
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise ValueError(f"{file} must hold a dictionary of named tensors, not a {type(loaded).__name__}")
    for name, tensor in loaded.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_neg():
            raise ValueError(f"{file} holds something other than a plain tensor under {name!r}")
        # A view that repeats its data could be of any size.
        if tensor.nbytes > _span(tensor):
            raise ValueError(f"{file}: tensor {name!r} repeats what is stored; save it with .contiguous()")
    return loaded


def _span(tensor: torch.Tensor) -> int:
    """Bytes of the file from a tensor's first element to its last; more than its own where it is a view with gaps."""
    if tensor.numel() == 0:
        return 0
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


def _check_archive(file: Path) -> None:
    """Raise `ValueError` unless `file` is a zip archive, nothing compressed, of little beside tensor data."""
    try:
        table = _table_bytes(file)
        if table > DIRECTORY_BYTES:
            raise ValueError(f"its table is said to have {table:,} bytes")
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise ValueError(
            f"{file} is no complete PyTorch file ({error}); it is damaged or its download was cut short (files of "
            "PyTorch before 1.6: load and save them again with torch.save)"
        ) from error
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries):
        raise ValueError(f"{file} is compressed; PyTorch does not write such files")
    if sum(entry.file_size for entry in entries if "/data/" not in entry.filename) > DIRECTORY_BYTES:
        raise ValueError(f"{file} has more than {DIRECTORY_BYTES >> 20} MiB that are not tensor data")
    size = file.stat().st_size
    if any(entry.header_offset + entry.file_size > size for entry in entries):
        raise ValueError(f"{file} is shorter than its directory says; fetch it again")


def _table_bytes(file: Path) -> int:
    """The size that a zip archive says its table of entries has; 0 when no end of an archive is found."""
    with file.open("rb") as opened:
        length = opened.seek(0, os.SEEK_END)
        # At the end, before a comment of at most 2**16 bytes; for large archives its last field says "see elsewhere".
        opened.seek(max(length - 2**16 - 22 - 20, 0))
        tail = opened.read()
        end = tail.rfind(b"PK\5\6", 0, len(tail) - 18)
        if end < 0:
            return 0
        (size,) = struct.unpack_from("<L", tail, end + 12)
        locator = end - 20
        if locator < 0 or tail[locator : locator + 4] != b"PK\6\7":
            return size
        (place,) = struct.unpack_from("<Q", tail, locator + 8)
        opened.seek(min(place, length))
        record = opened.read(56)
    return struct.unpack_from("<Q", record, 40)[0] if len(record) == 56 and record[:4] == b"PK\6\6" else size


def _reason(error: Exception) -> str:
    """The part of torch's message that says what is wrong; the others advise to load the file unsafely."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    unsafe = [line for line in lines if "nsupported" in line or "GLOBAL" in line]
    first = (unsafe or lines or [type(error).__name__])[0]
    if unsafe:
        first = first.split(" Please use")[0][:200]
        return f"it would run code or holds more than tensors ({first})"
    return first[:300]
