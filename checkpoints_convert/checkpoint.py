"""What a checkpoint is to its users, wherever it lies: geometry, dtype, end tokens, arrays read one by one."""

from __future__ import annotations

import abc
import dataclasses
import difflib
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.parameters import Parameters, Part, fixed_dtype, nest, parameter_shapes

DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
"""The dtypes that a checkpoint may be stored in, by name."""
STORED = DTYPES | {"int8": np.dtype(np.int8)}
"""Those of its arrays: the layers' matrices may be int8, with scales."""


def check_dtype(name: str) -> str:
    """`name` itself when a checkpoint may be stored in it, else `ValueError`."""
    if name not in DTYPES:
        hint = " (the layers' matrices become int8 with --int8)" if name == "int8" else ""
        raise ValueError(f"dtype {name!r} is not supported; choose one of {', '.join(DTYPES)}{hint}")
    return name


def array_dtype(config: LlamaConfig, path: str, dtype: str) -> np.dtype[Any]:
    """What an array is stored as in a checkpoint of `dtype`: that, or int8 or float32 in int8 layers."""
    return fixed_dtype(config, path) or DTYPES[dtype]


def bounds(part: Part | None, shape: tuple[int, ...]) -> Part:
    """`part` of an array of `shape` with both ends of every slice given; all of the array for None.

    Raises:
        ValueError: unless there is a slice of step 1 for every axis.
    """
    if part is None:
        return tuple(slice(0, size) for size in shape)
    if len(part) != len(shape) or any(index.step not in (None, 1) for index in part):
        raise ValueError(f"a part of an array of shape {shape} takes {len(shape)} slices of step 1, not {part!r}")
    return tuple(slice(*index.indices(size)[:2]) for index, size in zip(part, shape, strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint(abc.ABC):
    """An opened checkpoint: a `ParameterSource` that also knows its dtype, place and special tokens."""

    directory: Path
    config: LlamaConfig
    dtype: str
    """Dtype that arrays are read in: `bfloat16`, `float16` or `float32` (int8 layers aside)."""
    bos_token_id: int | None
    eos_token_ids: list[int]
    """Tokens that end a text (LLaMA-3 Instruct has several); empty when the checkpoint names none."""

    def read(self, path: str, part: Part | None = None) -> np.ndarray:
        """The array under `path` (see `parameter_shapes`), or a part of it, as it is stored. Reads no other array.

        Args:
            path: such as `layers/3/query`.
            part: a slice for every axis; what lies outside is not read.

        Raises:
            ValueError: for an unknown path, or when the array on disk is missing, damaged or of another shape.
        """
        shapes = parameter_shapes(self.config)
        if path not in shapes:
            near = difflib.get_close_matches(path, shapes, n=1)
            raise ValueError(f"unknown array {path!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return self._read(path, bounds(part, shapes[path]))

    def read_all(self) -> Parameters:
        """The whole parameter tree in memory."""
        return nest({path: self.read(path) for path in parameter_shapes(self.config)})

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(
            math.prod(shape) * array_dtype(self.config, path, self.dtype).itemsize
            for path, shape in parameter_shapes(self.config).items()
        )

    @abc.abstractmethod
    def _read(self, path: str, part: Part) -> np.ndarray:
        """Read a part of a path that exists; raises as `read` does."""
