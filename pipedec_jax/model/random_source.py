"""Random weights of any geometry, made as they are read: to time a model's shape without its checkpoint."""

from __future__ import annotations

import math
import zlib

import ml_dtypes
import numpy as np

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.parameters import BIAS, Part, parameter_shapes

POOL = 2**24 - 3
"""Numbers drawn once; odd, so that the rows of a matrix that repeats them differ."""
TURNS = 8
"""How often they are laid out in memory: matrices up to as large need no array of their own."""


class RandomSource:
    """A `ParameterSource` of bfloat16 noise: standard deviation 0.02 (less for output projections), norms of ones.

    Matrices and biases repeat one pool of noise, each from a place of its own, so that reading 8 billion weights takes
    seconds. Good for times, bytes and shapes; the text it decodes means nothing.

    Args:
        config: the geometry; not one of int8 layers (`pipedec_jax.model.int8.Int8Source` makes those of it).
        seed: of the pool.
    """

    def __init__(self, config: LlamaConfig, seed: int = 0) -> None:
        if config.int8:
            raise ValueError("random weights are plain ones: give a geometry without int8, and round it afterwards")
        self.config = config
        self._shapes = parameter_shapes(config)
        noise = 0.02 * np.random.default_rng(seed).standard_normal(POOL, dtype=np.float32)
        depth = np.float32((2 * config.layers) ** -0.5)
        self._noise, self._small = (np.tile(x.astype(ml_dtypes.bfloat16), TURNS) for x in (noise, noise * depth))
        self._last: tuple[str, np.ndarray] | None = None

    def read(self, path: str, part: Part | None = None) -> np.ndarray:
        """The array under `path`, or a part of it, in bfloat16."""
        if self._last is None or self._last[0] != path:  # large arrays are read in parts, one after the other
            self._last = path, self._make(path)
        array = self._last[1]
        return array if part is None else array[part]

    def _make(self, path: str) -> np.ndarray:
        shape = self._shapes[path]
        if len(shape) == 1 and not path.endswith(BIAS):
            return np.ones(shape, ml_dtypes.bfloat16)
        if path == "head":  # its columns are read; they shall lie in one piece
            return self._matrix(path, shape[::-1]).T
        return self._matrix(path, shape)

    def _matrix(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        start, count = zlib.crc32(path.encode()) % POOL, math.prod(shape)
        noise = self._small if path.endswith(("output", "down")) else self._noise
        if start + count > len(noise):
            noise = np.tile(noise, -(-(start + count) // len(noise)))
        return noise[start : start + count].reshape(shape)
