"""Causal attention for training on CPU: heads first, blocks of queries, no work above the diagonal.

`llama.attention` spends nearly all its time in the softmax over the minor axis. Here the sum of a row's exponentials
comes out of the same matrix product as the mixture, as the product with a column of ones appended to the values.
The gradients are written out so that nothing of size [T, T] is kept.

Dimension letters as in `model.llama`; P positions of one block of queries, N = Q * P rows of one block and KV head.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pipedec_jax.model.llama import product


def _weights(query_BGNA: jax.Array, key_BGSA: jax.Array, block: int) -> jax.Array:
    """Unnormalised weights `[B, G, N, S]` of the last `block` positions of `S`; later positions weigh 0."""
    score = product("BGNA,BGSA->BGNS", query_BGNA, key_BGSA)
    N, S = score.shape[-2:]
    position = jnp.arange(N, dtype=jnp.int32) % block + (S - block)
    seen = position[:, None] >= jnp.arange(S, dtype=jnp.int32)[None, :]
    # A trained model's scores reach hundreds: without its largest taken off, a row's exponentials overflow.
    score = jnp.where(seen[None, None], score, -jnp.inf)
    return jnp.exp(score - jnp.max(score, axis=-1, keepdims=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend_block(query_BGNA: jax.Array, key_BGSA: jax.Array, value_BGSA: jax.Array, block: int) -> jax.Array:
    return _attend_block_forward(query_BGNA, key_BGSA, value_BGSA, block)[0]


def _attend_block_forward(query_BGNA: jax.Array, key_BGSA: jax.Array, value_BGSA: jax.Array, block: int):
    weight = _weights(query_BGNA, key_BGSA, block)
    ones = jnp.ones((*value_BGSA.shape[:-1], 1), value_BGSA.dtype)
    both = product("BGNS,BGSA->BGNA", weight, jnp.concatenate((value_BGSA, ones), axis=-1))
    total = both[..., -1:]
    mixed = both[..., :-1] / total
    return mixed, (query_BGNA, key_BGSA, value_BGSA, mixed, total)


def _attend_block_backward(block: int, kept: tuple[jax.Array, ...], slope_BGNA: jax.Array):
    query, key, value, mixed, total = kept
    weight = _weights(query, key, block)
    slope = slope_BGNA / total
    # d(score) = weight * (slope . value - slope . mixed): the second term rides along as an extra column.
    offset = -jnp.sum(slope * mixed, axis=-1, keepdims=True)
    ones = jnp.ones((*value.shape[:-1], 1), value.dtype)
    slope_score = weight * product(
        "BGNA,BGSA->BGNS", jnp.concatenate((slope, offset), axis=-1), jnp.concatenate((value, ones), axis=-1)
    )
    slope_query = product("BGNS,BGSA->BGNA", slope_score, key)
    slope_key = product("BGNS,BGNA->BGSA", slope_score, query)
    slope_value = product("BGNS,BGNA->BGSA", weight, slope)
    return slope_query, slope_key, slope_value


_attend_block.defvjp(_attend_block_forward, _attend_block_backward)


def causal_attention(query_BTHA: jax.Array, key_BTGA: jax.Array, value_BTGA: jax.Array, block: int = 128) -> jax.Array:
    """Causal grouped-query attention of whole sequences, `[B, T, H, A]`, equal to `llama.attention` up to rounding.

    `block` is the number of positions whose queries are handled together; the last block may be shorter.
    """
    B, T, H, A = query_BTHA.shape
    G = key_BTGA.shape[-2]
    Q = H // G
    query = query_BTHA * jnp.asarray(A**-0.5, query_BTHA.dtype)
    # [B, T, G, Q, A] -> [B, G, Q, T, A]: the query heads of one KV head become rows of one matrix.
    query = query.reshape(B, T, G, Q, A).transpose(0, 2, 3, 1, 4)
    key = key_BTGA.transpose(0, 2, 1, 3)
    value = value_BTGA.transpose(0, 2, 1, 3)
    blocks = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        size = stop - start
        rows = query[:, :, :, start:stop].reshape(B, G, Q * size, A)
        mixed = jnp.asarray(_attend_block(rows, key[:, :, :stop], value[:, :, :stop], size))
        blocks.append(mixed.reshape(B, G, Q, size, A))
    return jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, H, A)
