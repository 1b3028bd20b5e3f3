"""Random weights of any geometry, made as they are read: to time a model's shape without its checkpoint."""

from __future__ import annotations

import math
import zlib

import ml_dtypes
import numpy as np

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.parameters import Part, parameter_shapes

POOL = 2**24 - 3
"""Numbers drawn once, from which every matrix is laid out; odd, so that rows of a matrix differ."""


class RandomSource:
    """A `ParameterSource` of bfloat16 noise: standard deviation 0.02 (less for output projections), norms of ones.

    Matrices repeat one pool of noise, each from a place of its own, so that reading 8 billion weights takes seconds
    and holds one array at a time. Good for times, bytes and shapes; the text it decodes means nothing.

    Args:
        config: the geometry; not one of int8 layers (`pipedec_jax.model.int8.Int8Source` makes those of it).
        seed: of the pool.
    """

    def __init__(self, config: LlamaConfig, seed: int = 0) -> None:
        if config.int8:
            raise ValueError("random weights are plain ones: give a geometry without int8, and round it afterwards")
        self.config = config
        self._shapes = parameter_shapes(config)
        noise = np.random.default_rng(seed).standard_normal(POOL, dtype=np.float32)
        self._pool = (0.02 * noise).astype(ml_dtypes.bfloat16)
        self._last: tuple[str, np.ndarray] | None = None

    def read(self, path: str, part: Part | None = None) -> np.ndarray:
        """The array under `path`, or a part of it, in bfloat16."""
        if self._last is None or self._last[0] != path:  # large arrays are read in parts, one after the other
            self._last = path, self._make(path)
        array = self._last[1]
        return array if part is None else array[part]

    def _make(self, path: str) -> np.ndarray:
        shape = self._shapes[path]
        if len(shape) == 1:
            return np.ones(shape, ml_dtypes.bfloat16)
        start, count = zlib.crc32(path.encode()) % POOL, math.prod(shape)
        pool = self._pool
        if path.endswith(("output", "down")):
            depth = np.float32((2 * self.config.layers) ** -0.5)
            pool = (pool.astype(np.float32) * depth).astype(ml_dtypes.bfloat16)
        return np.tile(pool, -(-(start + count) // POOL))[start : start + count].reshape(shape)
