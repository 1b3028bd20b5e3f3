"""The text so far, as arrays indexed by absolute position: the prompt, then the committed tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

MISS = -1
"""Delay of a token that was not in the pipe when it was chosen."""


class Transcript(struct.PyTreeNode):
    """Prompt and answer, with how each answer token came. T is the capacity, E the number of end tokens."""

    token: jax.Array
    """[T] int32: the tokens, by absolute position."""
    tick: jax.Array
    """[T] int32: the tick in which the token was committed, counted from the first root's entry; 0 for the prompt."""
    cost: jax.Array
    """[T] float32: what all ticks up to that one have cost; 0 for the prompt."""
    delay: jax.Array
    """[T] int32: ticks between the sending of the token's parent and its own: 0 when both went in one batch, 1 when one
    followed the other, more for a late hit, MISS for a miss; 0 for the prompt."""
    log_prob: jax.Array
    """[T] float32: the target's log-probability of the token (temperature 1, no filter)."""
    length: jax.Array
    """[] int32: tokens so far, prompt included."""
    limit: jax.Array
    """[] int32: length at which the answer is complete."""
    end_token: jax.Array
    """[E] int32: tokens that complete the answer; padded with -1."""
    done: jax.Array
    """[] bool: the answer is complete; nothing is committed any more."""


def begin(prompt_T: jax.Array, length: jax.Array, limit: jax.Array, end_token_E: jax.Array) -> Transcript:
    """A transcript that holds the prompt alone."""
    T = prompt_T.shape[0]
    return Transcript(
        token=prompt_T,
        tick=jnp.zeros(T, jnp.int32),
        cost=jnp.zeros(T, jnp.float32),
        delay=jnp.zeros(T, jnp.int32),
        log_prob=jnp.zeros(T, jnp.float32),
        length=length,
        limit=limit,
        end_token=end_token_E,
        done=jnp.zeros((), bool),
    )


def commit(
    text: Transcript, token: jax.Array, tick: jax.Array, cost: jax.Array, delay: jax.Array, log_prob: jax.Array
) -> Transcript:
    """Append one token of the target."""
    here = text.length
    length = here + 1
    return text.replace(
        token=text.token.at[here].set(token, mode="drop"),
        tick=text.tick.at[here].set(tick, mode="drop"),
        cost=text.cost.at[here].set(cost, mode="drop"),
        delay=text.delay.at[here].set(delay, mode="drop"),
        log_prob=text.log_prob.at[here].set(log_prob, mode="drop"),
        length=length,
        done=jnp.any(text.end_token == token) | (length >= text.limit),
    )
