"""The small broadcasts of a tick: sums and gathers over all devices, whole pytrees packed into one collective each.

A collective's cost on small arrays is its latency, so everything that is ready at the same point of a tick travels
together. Call these only at the top level of a tick: a collective in a branch that some ranks skip hangs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

AXIS = "stage"
"""Name of the mesh axis over which stages and drafters are spread."""
TENSOR = "tensor"
"""Name of the mesh axis over which the layers of a stage are split."""
AXES = (AXIS, TENSOR)
"""All devices, those of a stage one after the other."""
SMALL = 64 * 1024
"""Bytes of all stages' activations up to which they travel in a broadcast (`pass_on`)."""


def vary(tree: Any) -> Any:
    """Type a pytree as differing between devices, as branches that depend on the rank need (jax issue 40823).

    A select between a value and itself does it in every supported JAX version (`lax.pcast` refuses what varies
    already, and how to ask has changed); XLA removes it.
    """
    here = lax.axis_index(AXES) >= 0
    return jax.tree.map(lambda x: jnp.where(here, x, x), tree)


def leads() -> jax.Array:
    """Whether this device is the first of its stage's: what all of them know alike, it says."""
    return lax.axis_index(TENSOR) == 0


def sum_over_parts(x: jax.Array) -> jax.Array:
    """Sum over the devices of a stage. A branch that depends on the stage alone may hold it: all of them take it."""
    return lax.psum(x, TENSOR)


def sum_over_devices(x: jax.Array) -> jax.Array:
    """Sum over all devices. With one nonzero contribution it is a broadcast."""
    return lax.psum(vary(x), AXES)


def broadcast(parts: Sequence[tuple[Any, jax.Array]]) -> list[Any]:
    """Pytrees that one device each knows, to all: one collective for them together, exact to the bit.

    Args:
        parts: each a pytree and whether this device is the one that knows it; one array at least in all of them.
    """
    leaves, structure = jax.tree.flatten([tree for tree, _ in parts])
    known = [knows for tree, knows in parts for _ in jax.tree.leaves(tree)]
    words = [jnp.where(knows, _to_words(leaf), 0) for leaf, knows in zip(leaves, known, strict=True)]
    everyone = lax.psum(_packed(words), AXES)
    return jax.tree.unflatten(structure, _unpacked(everyone, words, leaves))


def to_next_stage(x: jax.Array, stages: int) -> jax.Array:
    """What the stage before has given; the first stage and ranks that are none get zeros."""
    return lax.ppermute(x, AXIS, [(k, k + 1) for k in range(stages - 1)]) if stages > 1 else jnp.zeros_like(x)


def pass_on(
    x: jax.Array, stages: int, parts: Sequence[tuple[Any, jax.Array]]
) -> tuple[jax.Array, jax.Array, list[Any]]:
    """Activations one stage on, those of the last stage to all, and with them what else one device each knows.

    Where all stages' rows together are small (`SMALL`), sending them costs nothing but a collective's latency, so they
    travel in the broadcast that there is in any case, and each stage takes the ones it needs.

    Args:
        x: `[W, D]`, what this rank's stage has given.
        stages: how many there are (N).
        parts: as `broadcast` takes them.

    Returns:
        `[W, D]` of the stage before (`to_next_stage`), `[W, D]` of the last stage, and the parts.
    """
    rank = lax.axis_index(AXIS)
    together = stages * _to_words(x).size * 4 <= SMALL
    senders = range(stages) if together else (stages - 1,)
    rows = [(x, leads() & (rank == k)) for k in senders]
    known = broadcast([*rows, *parts])
    rows, parts = known[: len(rows)], known[len(rows) :]
    if not together:
        return to_next_stage(x, stages), rows[-1], parts
    before = jnp.where((rank > 0) & (rank < stages), rank - 1, stages)
    return vary(jnp.stack(rows).at[before].get(mode="fill", fill_value=0)), rows[-1], parts


def gather_over_devices(tree: Any) -> Any:
    """Every device's leaves, stacked in front `[devices, ...]` and known to all: one collective, exact to the bit.

    The leaves (bool, int32 or floats) travel as the int32 words they are made of.
    """
    leaves, structure = jax.tree.flatten(tree)
    if not leaves:
        return tree
    words = [_to_words(leaf) for leaf in leaves]
    mine = _packed(words)
    place = (jnp.arange(lax.axis_size(AXES), dtype=jnp.int32) == lax.axis_index(AXES))[:, None]
    everyone = lax.psum(jnp.where(place, mine[None, :], 0), AXES)
    return jax.tree.unflatten(structure, _unpacked(everyone, words, leaves))


def _packed(words: Sequence[jax.Array]) -> jax.Array:
    """Arrays of words one behind the other."""
    return jnp.concatenate([vary(word).ravel() for word in words])


def _unpacked(packed: jax.Array, words: Sequence[jax.Array], like: Sequence[jax.Array]) -> list[jax.Array]:
    """Arrays like these, of what `_packed` made of their words; further axes in front stay there."""
    ends = list(itertools.accumulate(word.size for word in words))
    parts = jnp.split(packed, ends[:-1], axis=-1)
    return [
        _from_words(part.reshape(*packed.shape[:-1], *word.shape), leaf)
        for part, word, leaf in zip(parts, words, like, strict=True)
    ]


def _to_words(x: jax.Array) -> jax.Array:
    """An array as int32 words: two each of 64 bits (along a new last axis), one each of 16 bits, one for 32 bools."""
    if x.dtype == jnp.bool_:
        bits = jnp.pad(x.ravel(), (0, -x.size % 32)).reshape(-1, 32).astype(jnp.int32)
        return jnp.sum(bits << lax.broadcasted_iota(jnp.int32, bits.shape, 1), axis=1, dtype=jnp.int32)
    if x.dtype.itemsize == 2:
        return lax.bitcast_convert_type(x, jnp.int16).astype(jnp.int32)
    return x if x.dtype == jnp.int32 else lax.bitcast_convert_type(x, jnp.int32)


def _from_words(words: jax.Array, like: jax.Array) -> jax.Array:
    """The array, or with more axes in front several, of which these are the words; each is as large as `like`."""
    if like.dtype == jnp.bool_:
        ahead, place = words.shape[:-1], lax.broadcasted_iota(jnp.int32, (*words.shape, 32), words.ndim)
        bits = ((words[..., None] >> place) & 1).reshape(*ahead, 32 * words.shape[-1])
        return bits[..., : like.size].reshape(*ahead, *like.shape) != 0
    if like.dtype.itemsize == 2:
        return lax.bitcast_convert_type(words.astype(jnp.int16), like.dtype)
    return words if like.dtype == jnp.int32 else lax.bitcast_convert_type(words, like.dtype)
