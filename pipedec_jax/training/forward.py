"""The training forward pass: `llama.forward` rearranged for the speed of gradients on a CPU.

The same function as `llama.forward` (a test holds them together), with three differences that decide the speed of
XLA's CPU code: products of joined matrices (query, key and value), a written-out gradient of each product
whose operands are materialised first (XLA otherwise recomputes elementwise chains while it walks a transposed
operand column by column), and rotary tables that are constants of the program.

Dimension letters as in `model.llama`; N = B * T rows of a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model import llama
from pipedec_jax.model.parameters import BIAS, Parameters
from pipedec_jax.model.rope import attention_factor, rope_frequencies
from pipedec_jax.training.attention import causal_attention


@jax.custom_vjp
def linear(x_NI: jax.Array, weight_IO: jax.Array) -> jax.Array:
    """`x @ weight` with a gradient that materialises its operands."""
    return _dot(x_NI, weight_IO, ((1,), (0,)))


def _dot(x: jax.Array, y: jax.Array, axes: tuple[tuple[int], tuple[int]]) -> jax.Array:
    return lax.dot_general(x, y, (axes, ((), ())), precision=lax.Precision.HIGHEST)


def _linear_forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _dot(x, weight, ((1,), (0,))), (x, weight)


def _linear_backward(kept: tuple[jax.Array, jax.Array], slope: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = kept
    x, slope = lax.optimization_barrier((x, slope))
    return _dot(slope, weight, ((1,), (1,))), _dot(x, slope, ((0,), (0,)))


linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`silu(gate) * up`, keeping only its operands for the gradient."""
    return gate * jax.nn.sigmoid(gate) * up


def _gated_backward(kept: tuple[jax.Array, jax.Array], slope: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up = kept
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return slope * up * (sigmoid + silu * (1 - sigmoid)), slope * silu


gated.defvjp(lambda gate, up: (gated(gate, up), (gate, up)), _gated_backward)


@functools.cache
def _rope_constants(config: LlamaConfig, T: int) -> tuple[np.ndarray, np.ndarray]:
    angle = np.arange(T)[:, None] * np.asarray(rope_frequencies(config))
    cos, sin = (turn(angle)[:, None, :] * attention_factor(config) for turn in (np.cos, np.sin))
    return cos.astype(np.float32), sin.astype(np.float32)


def layer(
    config: LlamaConfig,
    weights: Parameters,
    x_ND: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    shape: tuple[int, int],
    block: int = 128,
) -> jax.Array:
    """One decoder layer over the rows of `shape` = (B, T) whole sequences; `rope` as `rope_constants` gives it."""
    B, T = shape
    D, H, G, A = config.width, config.heads, config.kv_heads, config.head_size
    with jax.named_scope("attention"):
        y = llama.rms_norm(x_ND, weights["attention_norm"], config.norm_eps)
        joined = jnp.concatenate([weights[name].reshape(D, -1) for name in ("query", "key", "value")], axis=1)
        heads = _biased(weights, linear(y, joined), "query", "key", "value").reshape(B, T, H + 2 * G, A)
        turned = llama.rotate(heads[:, :, : H + G], rope)
        parts = (turned[:, :, :H], turned[:, :, H:], heads[:, :, H + G :])
        # Plain exponentials and their sums need float32.
        query, key, value = (part.astype(llama.wide(x_ND.dtype)) for part in parts)
        mixed = causal_attention(query, key, value, block).astype(x_ND.dtype)
        mixed = linear(mixed.reshape(B * T, H * A), weights["output"].reshape(H * A, D))
        x = x_ND + _biased(weights, mixed, "output")
    with jax.named_scope("feed_forward"):
        y = llama.rms_norm(x, weights["feed_forward_norm"], config.norm_eps)
        gate, up = (_biased(weights, linear(y, weights[name]), name) for name in ("gate", "up"))
        return x + _biased(weights, linear(gated(gate, up), weights["down"]), "down")


def _biased(weights: Parameters, product: jax.Array, *matrices: str) -> jax.Array:
    """Products `[N, O]` with these matrices side by side, and their biases where they have any."""
    biases = [weights[name + BIAS].reshape(-1) for name in matrices if name + BIAS in weights]
    return product + jnp.broadcast_to(jnp.concatenate(biases), product.shape) if biases else product


def rope_constants(config: LlamaConfig, T: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Rotary tables `[T, 1, A / 2]` of positions 0 .. T - 1 as constants of the program."""
    cos, sin = _rope_constants(config, T)
    return jnp.asarray(cos, dtype), jnp.asarray(sin, dtype)


def hidden(config: LlamaConfig, params: Parameters, token_BT: jax.Array, block: int = 128) -> jax.Array:
    """Last hidden states `[B * T, D]` of whole sequences, before the final norm."""
    return hidden_after(config, params, token_BT, [config.layers], block)[config.layers]


def hidden_after(
    config: LlamaConfig, params: Parameters, token_BT: jax.Array, exits: Collection[int], block: int = 128
) -> dict[int, jax.Array]:
    """Hidden states `[B * T, D]` after each number of layers in `exits`; no layer beyond the last of them runs."""
    B, T = token_BT.shape
    x = params["embedding"][token_BT.reshape(-1)]
    rope = rope_constants(config, T, x.dtype)
    found = {}
    for index in range(max(exits)):
        x = layer(config, params["layers"][str(index)], x, rope, (B, T), block)
        if index + 1 in exits:
            found[index + 1] = x
    return found


def forward(config: LlamaConfig, params: Parameters, token_BT: jax.Array, block: int = 128) -> jax.Array:
    """Logits `[B * T, V]` in float32 of whole sequences; equal to `llama.forward` up to rounding."""
    y = llama.rms_norm(hidden(config, params, token_BT, block), params["final_norm"], config.norm_eps)
    head: Any = llama.head_matrix(params)
    return linear(y, head.T)
