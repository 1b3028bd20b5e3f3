"""A decoder layer as devices hold it: matrices as inputs by outputs, those that multiply the same rows side by side.

    attention_norm [D]   query_key_value [D, (H + 2 G) A]   output [H A, D]
    feed_forward_norm [D]   gate_up [D, 2 F]   down [F, D]

Query, key and value are then one product, gate and up another: two products a layer instead of five. Scales of int8
matrices and biases are vectors and lie side by side likewise. A split layer's devices have their own parts side by
side.

Two axes, and no heads in an axis of their own, are also what a TPU wants: it keeps the last two axes of an array in
tiles of 8 x 128, so that nothing is wasted on heads of 64, and no program has to lay them out anew.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import struct

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.parameters import MATRICES, Parameters, input_axes, layer_shapes, matrix_and_end

JOINED = {"query_key_value": ("query", "key", "value"), "gate_up": ("gate", "up")}
"""Arrays that hold several matrices, and which."""


class HeldModel(struct.PyTreeNode):
    """A model's weights as a device holds them: some of its layers, and some rows of its vocabulary."""

    layers: tuple[Parameters, ...]
    """Arrays of `held_shapes` by name."""
    final_norm: jax.Array
    """[D]"""
    embedding: jax.Array
    """[rows, D]"""
    head: jax.Array | None
    """[rows, D]; `None` when the embedding serves (tied)."""

    @property
    def output(self) -> jax.Array:
        """[rows, D]: the head, or the embedding where that serves."""
        return self.embedding if self.head is None else self.head


def held_names(config: LlamaConfig) -> dict[str, list[str]]:
    """The arrays of a held layer, in the order they are used, and the stored ones (`layer_shapes`) that each is of."""
    held: dict[str, list[str]] = {}
    for name in layer_shapes(config):
        matrix, end = matrix_and_end(name)
        joined = next((joined for joined, matrices in JOINED.items() if matrix in matrices), matrix)
        held.setdefault(joined + end, []).append(name)
    return held


def flat_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A stored array's shape without heads: a matrix as inputs by outputs, all others as vectors."""
    if name not in MATRICES:
        return (math.prod(shape),)
    inputs = input_axes(name)
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])


def held_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of a held layer, in the order they are used."""
    stored = {name: flat_shape(name, shape) for name, shape in layer_shapes(config).items()}
    return {
        held: (*stored[names[0]][:-1], sum(stored[name][-1] for name in names))
        for held, names in held_names(config).items()
    }


def hold(config: LlamaConfig, layer: Parameters) -> Parameters:
    """A stored layer (`layer_shapes`), whole and in memory, as devices hold it."""

    def flat(name: str) -> jax.Array:
        return layer[name].reshape(flat_shape(name, layer[name].shape))

    return {
        held: jnp.concatenate([flat(name) for name in names], axis=-1) for held, names in held_names(config).items()
    }
