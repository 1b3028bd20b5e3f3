"""Files of named tensors, whatever their format: headers first, then the tensors mapped into memory one by one."""

from __future__ import annotations

import dataclasses
import mmap
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor without its data."""

    shape: tuple[int, ...]
    dtype: str
    """`bfloat16`, `float16`, `float32`, or as the file spells it where it is none of these."""
    file: Path
    offset: int
    """Place in the file, or a number that grows with it: reading in this order reads the file from front to end."""


class TensorFiles(Protocol):
    """All tensors of a checkpoint, from one file or several."""

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """The tensors by name."""
        ...

    @property
    def files(self) -> list[Path]:
        """The files that hold them."""
        ...

    def view(self, name: str) -> np.ndarray:
        """One tensor, mapped: pages are read when they are touched, and given back with the last reference.

        Raises:
            ValueError: when its file is damaged.
        """
        ...


def map_tensor(file: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """A tensor that lies in a file as plain bytes, mapped for reading.

    Raises:
        ValueError: when the file ends before the tensor does.
    """
    count = int(np.prod(shape, dtype=object))
    end = offset + count * dtype.itemsize
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if size < end:
            raise ValueError(f"{file} has {size} bytes, the tensor ends at {end}; fetch the file again")
        mapped = mmap.mmap(opened.fileno(), end - start, access=mmap.ACCESS_READ, offset=start)
    return np.frombuffer(mapped, np.uint8, count * dtype.itemsize, offset - start).view(dtype).reshape(shape)
