"""The output buffers of a hierarchy: fixed-capacity arrays; rollback is a length and a mask, and nothing is moved.

M_i writes the buffer O_i alone. Others read it as it was published, perhaps long ago; what such a reader may believe of
it is decided by comparing texts, not by who was asked last: a model's own buffer follows those above it, and a buffer
below is worth verifying where it continues one's own. So no message between models can make a wrong token, however late
it comes. Source: PipeSpec (arXiv 2505.01572).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

FIGURES = ("length", "passes", "rollbacks", "undone", "stuck")
"""The numbers in front of a published buffer's tokens."""


class Buffer(struct.PyTreeNode):
    """What one model holds: the prompt and its own continuation. T is the capacity."""

    token: jax.Array
    """[T] int32: tokens by absolute position; stale from `length` on."""
    length: jax.Array
    """[] int32"""


def difference(one: Buffer, two: Buffer) -> jax.Array:
    """The first position that both hold and differ at, `[]` int32; T for none."""
    T = one.token.shape[0]
    position = jnp.arange(T, dtype=jnp.int32)
    differs = (one.token != two.token) & (position < jnp.minimum(one.length, two.length))
    return jnp.min(jnp.where(differs, position, T))


def follow(mine: Buffer, upper: Buffer) -> Buffer:
    """A buffer after a look at the one above it.

    Where they differ it is rolled back to that; where it is the shorter one, it takes over what it lacks.
    """
    rolled = difference(mine, upper) < mine.token.shape[0]
    position = jnp.arange(mine.token.shape[0], dtype=jnp.int32)
    return Buffer(
        token=jnp.where(position < upper.length, upper.token, mine.token),
        length=jnp.where(rolled, upper.length, jnp.maximum(mine.length, upper.length)),
    )


def aligned(buffers: Sequence[Buffer]) -> list[Buffer]:
    """Buffers, the smallest model's first, each after it has followed the one above, from the target down."""
    found = [buffers[-1]]
    for buffer in reversed(buffers[:-1]):
        found.append(follow(buffer, found[-1]))
    return found[::-1]


def continuation(own: Buffer, below: Buffer) -> Buffer:
    """What a model reads: the buffer below where that continues its own, else its own alone."""
    continues = (difference(own, below) == own.token.shape[0]) & (below.length > own.length)
    return Buffer(
        token=jnp.where(continues, below.token, own.token), length=jnp.where(continues, below.length, own.length)
    )


def complete(buffer: Buffer, prompt_length: jax.Array, limit: jax.Array, end_token_E: jax.Array) -> jax.Array:
    """Whether the answer is complete, `[]` bool: no room is left, or its last token is an end token."""
    last = buffer.token.at[buffer.length - 1].get(mode="clip")
    return (buffer.length >= limit) | (jnp.any(end_token_E == last) & (buffer.length > prompt_length))


def pack(buffer: Buffer, passes: jax.Array, rollbacks: jax.Array, undone: jax.Array, stuck: jax.Array) -> jax.Array:
    """A buffer to publish, as one array `[5 + T]` int32, so that one transfer takes it to another device."""
    return jnp.concatenate((jnp.stack((buffer.length, passes, rollbacks, undone, stuck)), buffer.token))


def unpack(packed: jax.Array) -> Buffer:
    """The buffer of what `pack` gave."""
    return Buffer(token=packed[len(FIGURES) :], length=packed[0])
