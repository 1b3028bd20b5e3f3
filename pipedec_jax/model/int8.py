"""Weight-only int8: the matrices of a model's layers as int8 with a float32 scale for every output channel.

Symmetric: `weight = int8 * scale`, where `scale` is the largest magnitude of the channel's weights / 127. Embedding,
head and norms keep their dtype, as do all activations: products run in the activations' dtype (see
`pipedec_jax.model.llama.project`). Source: absolute maximum per column, as for the weights in LLM.int8()
(arXiv 2208.07339); activations and outliers are not touched here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.parameters import SCALE, ParameterSource, Part, fixed_dtype, input_axes, parameter_shapes

MOST = 127
"""Largest magnitude: -128 stays unused, so that the range is symmetric."""
BLOCK_BYTES = 2**24
"""Bytes of float32 weights that are worked on at a time."""


def channel_scales(weight: np.ndarray, path: str) -> np.ndarray:
    """The scale of every output channel of matrix `path`, float32; 1 where all its weights are (next to) zero.

    Raises:
        ValueError: when a weight is not finite.
    """
    inputs = input_axes(path)
    largest = np.empty(weight.shape[inputs:], np.float32)
    for block in _blocks(weight.shape, inputs):
        part = weight[(*(slice(None) for _ in range(inputs)), block)].astype(np.float32)
        largest[block] = np.abs(part, out=part).max(axis=tuple(range(inputs)), initial=0)
    if not np.isfinite(largest).all():
        raise ValueError(f"array {path!r} has values that are not finite numbers, which int8 cannot hold")
    scale = largest / np.float32(MOST)
    return np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)


def quantize(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The int8 matrix of `weight` under the `scale` of its channels: the nearest, ties to even."""
    quantized = np.empty(weight.shape, np.int8)
    inputs = weight.ndim - scale.ndim
    for block in _blocks(weight.shape, inputs):
        place = (*(slice(None) for _ in range(inputs)), block)
        part = weight[place].astype(np.float32)
        np.divide(part, scale[block], out=part)
        quantized[place] = np.clip(np.rint(part, out=part), -MOST, MOST, out=part)
    return quantized


def dequantize(quantized: np.ndarray, scale: np.ndarray, dtype: Any) -> np.ndarray:
    """The weights that int8 values and scales stand for, rounded once to `dtype` (float32 at least inside)."""
    wide = np.promote_types(np.float32, dtype) if np.dtype(dtype).kind == "f" else np.float32
    return (quantized.astype(wide) * scale.astype(wide)).astype(dtype, copy=False)


class Int8Source:
    """A model whose layers become int8 while they are read; of a model that is int8 already, itself.

    Args:
        source: the model in bfloat16, float16 or float32.
    """

    def __init__(self, source: ParameterSource) -> None:
        self.config = dataclasses.replace(source.config, int8=True)
        self._source = source
        self._scales: dict[str, np.ndarray] = {}

    def read(self, path: str, part: Part | None = None) -> np.ndarray:
        """The array under `path`, or a part of it alone: matrices as int8, and `{matrix}_scale`.

        Raises:
            ValueError: as the source does, and when a weight of a matrix is not finite.
        """
        if fixed_dtype(self.config, path) is None or self._source.config.int8:
            return self._source.read(path, part)
        matrix = path.removesuffix(SCALE)
        if path != matrix:
            if matrix not in self._scales:
                self._scales[matrix] = channel_scales(self._source.read(matrix), matrix)
            return self._scales[matrix][part or ...]
        if part is None:
            weight = self._source.read(path)
            # The scale is asked for next.
            self._scales[path] = channel_scales(weight, path)
            return quantize(weight, self._scales[path])
        # A channel's scale takes all its inputs.
        inputs = input_axes(path)
        shape = parameter_shapes(self.config)[path]
        weight = self._source.read(path, (*(slice(0, size) for size in shape[:inputs]), *part[inputs:]))
        quantized = quantize(weight, channel_scales(weight, path))
        return quantized[(*part[:inputs], *(slice(None) for _ in part[inputs:]))]


def unrounded(source: ParameterSource) -> ParameterSource:
    """What an `Int8Source` reads from; any other source itself."""
    return source._source if isinstance(source, Int8Source) else source


class DequantizedSource:
    """The opposite: a model of int8 layers as one of plain arrays, for whoever takes no scales.

    Args:
        source: the int8 model.
        dtype: of the matrices.
    """

    def __init__(self, source: ParameterSource, dtype: Any) -> None:
        self.config = dataclasses.replace(source.config, int8=False)
        self._source = source
        self._dtype = np.dtype(dtype)

    def read(self, path: str, part: Part | None = None) -> np.ndarray:
        """The array under `path`, or a part of it alone."""
        found = self._source.read(path, part)
        if fixed_dtype(self._source.config, path) is None:
            return found
        scale = self._source.read(path + SCALE, None if part is None else part[input_axes(path) :])
        return dequantize(found, scale, self._dtype)


def plain(source: ParameterSource, dtype: Any) -> ParameterSource:
    """`source` itself, or dequantized to `dtype` where it is int8."""
    return DequantizedSource(source, dtype) if source.config.int8 else source


def as_int8(config: LlamaConfig) -> LlamaConfig:
    """The same geometry with int8 layers."""
    return dataclasses.replace(config, int8=True)


def _blocks(shape: tuple[int, ...], axis: int) -> list[slice]:
    """Slices of an axis whose parts of the array take `BLOCK_BYTES` in float32, or one index."""
    row = int(np.prod(shape, dtype=object)) // max(shape[axis], 1) * 4
    step = max(1, BLOCK_BYTES // max(row, 1))
    return [slice(start, min(start + step, shape[axis])) for start in range(0, shape[axis], step)]
