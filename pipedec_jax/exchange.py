"""The small broadcasts of a tick: sums and gathers over the ranks, whole pytrees packed into one collective each.

A collective's cost on small arrays is its latency, so everything that is ready at the same point of a tick travels
together. Call these only at the top level of a tick: a collective in a branch that some ranks skip hangs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

AXIS = "stage"
"""Name of the mesh axis over which stages and drafters are spread."""


def vary(tree: Any) -> Any:
    """Type a pytree as differing between ranks, as branches that depend on the rank need (jax issue 40823).

    A select between a value and itself does it in every supported JAX version (`lax.pcast` refuses what varies
    already, and how to ask has changed); XLA removes it.
    """
    here = lax.axis_index(AXIS) >= 0
    return jax.tree.map(lambda x: jnp.where(here, x, x), tree)


def sum_over_ranks(tree: Any) -> Any:
    """Sum every leaf over the ranks: one collective per dtype. With one nonzero contribution it is a broadcast."""
    leaves, structure = jax.tree.flatten(tree)
    summed: list[Any] = list(leaves)
    for dtype in sorted({str(leaf.dtype) for leaf in leaves}):
        members = [i for i, leaf in enumerate(leaves) if str(leaf.dtype) == dtype]
        flat = lax.psum(jnp.concatenate([vary(leaves[i]).ravel() for i in members]), AXIS)
        start = 0
        for i in members:
            summed[i] = flat[start : start + leaves[i].size].reshape(leaves[i].shape)
            start += leaves[i].size
    return jax.tree.unflatten(structure, summed)


def broadcast(parts: Sequence[tuple[Any, jax.Array]]) -> list[Any]:
    """Pytrees that one rank each knows, to all ranks: one collective for them together, exact to the bit.

    Args:
        parts: each a pytree and whether this rank is the one that knows it.
    """
    leaves, structure = jax.tree.flatten([tree for tree, _ in parts])
    known = [knows for tree, knows in parts for _ in jax.tree.leaves(tree)]
    if not leaves:
        return [tree for tree, _ in parts]
    words = [jnp.where(knows, _to_words(leaf), 0) for leaf, knows in zip(leaves, known, strict=True)]
    everyone = lax.psum(jnp.concatenate([vary(word).ravel() for word in words]), AXIS)
    received, start = [], 0
    for leaf, word in zip(leaves, words, strict=True):
        received.append(_from_words(everyone[start : start + word.size].reshape(word.shape), leaf.dtype))
        start += word.size
    return jax.tree.unflatten(structure, received)


def gather_over_ranks(tree: Any, ranks: int) -> Any:
    """Every rank's leaves, stacked in front `[R, ...]` and known to all: one collective, exact to the bit.

    The leaves (bool, int32 or floats) travel as the int32 words they are made of.
    """
    leaves, structure = jax.tree.flatten(tree)
    if not leaves:
        return tree
    words = [_to_words(leaf) for leaf in leaves]
    mine = vary(jnp.concatenate([word.ravel() for word in words]))
    place = (jnp.arange(ranks, dtype=jnp.int32) == lax.axis_index(AXIS))[:, None]
    everyone = lax.psum(jnp.where(place, mine[None, :], 0), AXIS)
    gathered, start = [], 0
    for leaf, word in zip(leaves, words, strict=True):
        part = everyone[:, start : start + word.size].reshape(ranks, *word.shape)
        gathered.append(_from_words(part, leaf.dtype))
        start += word.size
    return jax.tree.unflatten(structure, gathered)


def _to_words(x: jax.Array) -> jax.Array:
    """An array as int32 words: two each of 64 bits (along a new last axis), a whole one each of 16 or fewer."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.int32)
    if x.dtype.itemsize == 2:
        return lax.bitcast_convert_type(x, jnp.int16).astype(jnp.int32)
    return x if x.dtype == jnp.int32 else lax.bitcast_convert_type(x, jnp.int32)


def _from_words(words: jax.Array, dtype: Any) -> jax.Array:
    if dtype == jnp.bool_:
        return words != 0
    if jnp.dtype(dtype).itemsize == 2:
        return lax.bitcast_convert_type(words.astype(jnp.int16), dtype)
    return words if dtype == jnp.int32 else lax.bitcast_convert_type(words, dtype)
