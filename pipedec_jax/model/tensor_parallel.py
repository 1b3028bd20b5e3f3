"""A layer split over T devices by attention heads and feed-forward width: what each of them holds and computes.

Query, gate and up are split by their outputs, output and down by their inputs, so that a layer needs two sums over the
devices and nothing else (Megatron-LM, arXiv 1909.08053, section 3); biases of output and down are added to these sums.
Where T is more than the KV heads, each of these is on several devices; where it does not divide the feed-forward width,
the last devices have columns of zeros.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.parameters import ParameterSource, Part, device_axis, input_axes, layer_shapes, matrix_and_end


def check_parts(config: LlamaConfig, parts: int) -> None:
    """Raise `ValueError` unless a layer can be split over so many devices."""
    if not divides(config, parts):
        raise ValueError(
            f"{config.heads} heads, {config.kv_heads} KV heads cannot be split over {parts} devices (tensor_parallel): "
            "their number must divide the heads, and divide the KV heads or be a multiple of them"
        )


def divides(config: LlamaConfig, parts: int) -> bool:
    """Whether a layer can be split over so many devices."""
    groups = config.kv_heads % parts == 0 or parts % config.kv_heads == 0
    return config.heads % parts == 0 and groups


def part_config(config: LlamaConfig, parts: int) -> LlamaConfig:
    """The geometry of what one device has of each layer.

    Raises:
        ValueError: when layers cannot be split so.
    """
    check_parts(config, parts)
    return dataclasses.replace(
        config,
        heads=config.heads // parts,
        kv_heads=max(1, config.kv_heads // parts),
        feed_forward=-(-config.feed_forward // parts),
    )


def tensor_share(config: LlamaConfig, parts: int) -> float:
    """What one device has of a layer's weights, as a share of all.

    Raises:
        ValueError: when layers cannot be split so.
    """
    part, whole = (
        sum(math.prod(shape) for shape in layer_shapes(dataclasses.replace(geometry, int8=False)).values())
        for geometry in (part_config(config, parts), config)
    )
    return part / whole


def layer_part(config: LlamaConfig, name: str, parts: int, index: int) -> Part | None:
    """The part of a layer's array `name` that device `index` of `parts` has; `None` for all of it."""
    axis = _split_axis(name)
    if axis is None or parts == 1:
        return None
    shape = layer_shapes(config)[name]
    if matrix_and_end(name)[0] in ("key", "value"):
        size = max(1, shape[axis] // parts)
        start = index * config.kv_heads // parts
    else:
        size = -(-shape[axis] // parts)
        start = min(index * size, shape[axis])
    return tuple(
        slice(start, min(start + size, length)) if place == axis else slice(0, length)
        for place, length in enumerate(shape)
    )


def read_layer_part(source: ParameterSource, layer: int, name: str, parts: int, index: int) -> np.ndarray:
    """That part of an array, read from its source, as wide on every device: zeros stand where there is no more."""
    found = source.read(f"layers/{layer}/{name}", layer_part(source.config, name, parts, index))
    shape = layer_shapes(part_config(source.config, parts))[name]
    if found.shape == shape:
        return found
    return np.pad(found, [(0, size - have) for size, have in zip(shape, found.shape, strict=True)])


def _split_axis(name: str) -> int | None:
    """The axis along which an array is split; norms, and what goes with outputs that all devices share, are not."""
    matrix, end = matrix_and_end(name)
    if name.endswith("norm") or (end and matrix in ("output", "down")):
        return None
    return device_axis(f"/{matrix}") - (input_axes(matrix) if end else 0)
