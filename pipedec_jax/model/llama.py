"""LLaMA as pure functions over a Flax parameter tree.

Dimension letters: B batch, W rows fed at once, S cache slots, T positions of a full sequence, D width, H query
heads, G KV heads, Q = H / G query heads per KV head, A head size, F feed-forward width, V vocabulary.

Numerics follow Hugging Face's `LlamaForCausalLM`: norms and softmax in float32 (or wider), everything else in
the weights' dtype. In float32 every product runs at the highest precision; in bfloat16 products accumulate in float32.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.held import JOINED
from pipedec_jax.model.parameters import BIAS, SCALE, Parameters
from pipedec_jax.model.rope import attention_factor, rope_frequencies

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""`attend(query [..., W, H, A], key [..., W, G, A], value [..., W, G, A]) -> (mixed [..., W, H, A], new cache)`."""


def wide(dtype: Any) -> Any:
    """The dtype in which norms, softmax and logits of `dtype` activations are computed."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def product(spec: str, x: jax.Array, y: jax.Array, out: Any = None) -> jax.Array:
    """`einsum` that accumulates in float32 or wider and returns `out` (the operands' dtype when not given)."""
    precision = None if x.dtype == jnp.bfloat16 or x.dtype == jnp.float16 else lax.Precision.HIGHEST
    result = jnp.einsum(spec, x, y, precision=precision, preferred_element_type=wide(x.dtype))
    return result.astype(x.dtype if out is None else out)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis."""
    y = x.astype(wide(x.dtype))
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + jnp.asarray(eps, y.dtype))
    return jnp.broadcast_to(weight, x.shape) * y.astype(x.dtype)


def rope_tables(config: LlamaConfig, position_W: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine `[W, 1, A / 2]` for the given positions, computed in float32 or wider."""
    frequency = jnp.asarray(rope_frequencies(config), wide(dtype))
    angle = position_W.astype(frequency.dtype)[:, None] * frequency[None, :]
    cos, sin = (turn(angle)[:, None, :] * attention_factor(config) for turn in (jnp.cos, jnp.sin))
    return cos.astype(dtype), sin.astype(dtype)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding of `[..., W, heads, A]`, halves split as Hugging Face does."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = (jnp.broadcast_to(table, first.shape) for table in rope)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Masked attention of `query [..., W, H, A]` over `key [..., G, A, S]` and `value [..., G, S, A]`.

    Keys lie with the slots last and values with the slots before the head: the layouts in which both products run
    without transposing the cache. `mask [W, S]` says who sees what; a row that sees nothing (a padding row) gets the
    plain mean of all values, finite and never used.
    """
    *batch, W, H, A = query.shape
    G = key.shape[-3]
    Q = H // G
    grouped = jnp.swapaxes(query.reshape(*batch, W, G, Q, A), -4, -3).reshape(*batch, G, W * Q, A)
    score = product("...GNA,...GAS->...GNS", grouped, key, wide(query.dtype))
    score = (score * jnp.asarray(A**-0.5, score.dtype)).reshape(*batch, G, W, Q, -1)
    score = jnp.where(mask[:, None, :], score, jnp.finfo(score.dtype).min)
    weight = jax.nn.softmax(score, axis=-1).astype(query.dtype).reshape(*batch, G, W * Q, -1)
    mixed = product("...GNS,...GSA->...GNA", weight, value).reshape(*batch, G, W, Q, A)
    return jnp.swapaxes(mixed, -4, -3).reshape(*batch, W, H, A)


def attention_over_rows(
    query: jax.Array, key_SO: jax.Array, value_SO: jax.Array, mask_WS: jax.Array, block: int
) -> jax.Array:
    """`attention` of `query [W, H, A]` over keys and values whose heads lie side by side, `[S, G A]`.

    `block` slots at a time, up to the last one that any row sees, with a running maximum and sum: one small program,
    however many slots there are. A block is put in order for the products in a TPU's nearer memory; all heads of the
    whole cache at once would be copied in its main memory.
    """
    W, H, A = query.shape
    S, G, Q = key_SO.shape[0], key_SO.shape[1] // A, H // (key_SO.shape[1] // A)
    block, dtype = min(block, S), wide(query.dtype)
    slot = jnp.arange(S, dtype=jnp.int32)
    used = jnp.max(jnp.where(jnp.any(mask_WS, axis=0), slot + 1, 0))
    grouped = jnp.swapaxes(query.reshape(W, G, Q, A), 0, 1).reshape(G, W * Q, A)

    def add(count: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        most, total, mixed = carry
        start = jnp.minimum(count * block, S - block)  # the last block may begin within the one before
        mask_WB = lax.dynamic_slice_in_dim(mask_WS, start, block, axis=1)
        fresh = slot[:block] + start >= count * block
        key, value = (
            lax.dynamic_slice_in_dim(array, start, block).reshape(block, G, A) for array in (key_SO, value_SO)
        )
        score = product("GNA,BGA->GNB", grouped, key, dtype) * jnp.asarray(A**-0.5, dtype)
        score = jnp.where(mask_WB[None, :, None, :], score.reshape(G, W, Q, block), jnp.finfo(dtype).min)
        score = jnp.where(fresh[None, None, None, :], score, -jnp.inf).reshape(G, W * Q, block)
        higher = jnp.maximum(most, jnp.max(score, axis=-1))
        weight, kept = jnp.exp(score - higher[:, :, None]), jnp.exp(most - higher)
        found = product("GNB,BGA->GNA", weight.astype(query.dtype), value, dtype)
        return higher, total * kept + jnp.sum(weight, axis=-1), mixed * kept[:, :, None] + found

    # Typed as what the loop makes of it (see `exchange.vary`): a select between a value and itself, which XLA removes.
    here = (grouped[0, 0, 0] == 0) | (key_SO[0, 0] == 0) | (value_SO[0, 0] == 0) | mask_WS[0, 0]
    begin = (
        jnp.full((G, W * Q), jnp.finfo(dtype).min, dtype),
        jnp.zeros((G, W * Q), dtype),
        jnp.zeros((G, W * Q, A), dtype),
    )
    begin = jax.tree.map(lambda x: jnp.where(here, x, x), begin)
    _, total, mixed = lax.fori_loop(0, (used + block - 1) // block, add, begin)
    mixed = (mixed / jnp.maximum(total, jnp.finfo(dtype).tiny)[:, :, None]).astype(query.dtype)
    return jnp.swapaxes(mixed.reshape(G, W, Q, A), 0, 1).reshape(W, H, A)


def project(x: jax.Array, weight: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """Multiply `x [..., I]` by a matrix: plain, or int8 with a scale for every output channel.

    The matrix is `[I, O]`, or has its heads in an axis of their own; it is one plain product in either case (else XLA
    transposes the weights).

    An int8 is exact in bfloat16 and float16, so nothing is rounded before the sums; sums and scaling are in float32 or
    wider.
    """
    weight_IO = weight.reshape(x.shape[-1], -1)
    if scale is None:
        return product("...I,IO->...O", x, weight_IO)

    def multiply(x: jax.Array, weight_IO: jax.Array, dtype: Any) -> jax.Array:
        return product("...I,IO->...O", x.astype(dtype), weight_IO.astype(dtype), wide(dtype))

    if x.dtype == jnp.bfloat16 or x.dtype == jnp.float16:
        # XLA turns int8 into bfloat16 one by one on CPU, fifteen times slower than into float32.
        through_float32, direct = (functools.partial(multiply, dtype=dtype) for dtype in (jnp.float32, x.dtype))
        result = lax.platform_dependent(x, weight_IO, cpu=through_float32, default=direct)
    else:
        result = multiply(x, weight_IO, x.dtype)
    scale_O = scale.reshape(-1).astype(result.dtype)
    return (result * jnp.broadcast_to(scale_O, result.shape)).astype(x.dtype)


def forward_layer(
    config: LlamaConfig,
    layer: Parameters,
    x: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    attend: Attend,
    total: Callable[[jax.Array], jax.Array] = lambda part: part,
) -> tuple[jax.Array, Any]:
    """One decoder layer over `x [..., W, D]`; returns the new `x` and whatever cache `attend` returned.

    The layer is as it is stored (`model.parameters`) or as devices hold it (`model.held`). Where it is split over
    devices, each has its heads and columns, and `total` sums `[..., W, D]` over them.
    """
    H, G, A = config.heads, config.kv_heads, config.head_size

    def heads(y: jax.Array) -> jax.Array:
        return y.reshape(*y.shape[:-1], -1, A)

    with jax.named_scope("attention"):
        y = rms_norm(x, layer["attention_norm"], config.norm_eps)
        query, key, value = map(heads, _project_each(layer, "query_key_value", (H * A, G * A, G * A), y))
        mixed, cache = attend(rotate(query, rope), rotate(key, rope), value)
        mixed = total(project(mixed.reshape(*mixed.shape[:-2], -1), *_matrix(layer, "output")))
        x = x + _biased(layer, "output", mixed)
    with jax.named_scope("feed_forward"):
        y = rms_norm(x, layer["feed_forward_norm"], config.norm_eps)
        gate, up = _project_each(layer, "gate_up", (config.feed_forward, config.feed_forward), y)
        x = x + _biased(layer, "down", total(project(jax.nn.silu(gate) * up, *_matrix(layer, "down"))))
    return x, cache


def _project_each(layer: Parameters, joined: str, sizes: Sequence[int], x: jax.Array) -> list[jax.Array]:
    """Products of `x [..., D]` with the matrices, `sizes` wide, that devices hold as one: one product if they do."""
    if joined not in layer:
        return [_biased(layer, name, project(x, *_matrix(layer, name))) for name in JOINED[joined]]
    ends = list(itertools.accumulate(sizes))
    return jnp.split(_biased(layer, joined, project(x, *_matrix(layer, joined))), ends[:-1], axis=-1)


def _matrix(layer: Parameters, name: str) -> tuple[jax.Array, jax.Array | None]:
    """A matrix of a layer, and its scales where it is int8."""
    return layer[name], layer.get(name + SCALE)


def _biased(layer: Parameters, name: str, product: jax.Array) -> jax.Array:
    """A matrix's product `[..., O]`, with its bias where it has one."""
    bias = layer.get(name + BIAS)
    return product if bias is None else product + jnp.broadcast_to(bias.reshape(-1), product.shape)


def head_matrix(params: Parameters) -> jax.Array:
    """The LM head as `[V, D]` rows; the embedding itself when tied."""
    return params["head"].T if "head" in params else params["embedding"]


def logits(config: LlamaConfig, final_norm: jax.Array, head_VD: jax.Array, x: jax.Array) -> jax.Array:
    """Final norm and product with (a slice of) the head: `[..., V]` in float32 or wider."""
    y = rms_norm(x, final_norm, config.norm_eps)
    return product("...D,VD->...V", y, head_VD, wide(x.dtype))


def forward(config: LlamaConfig, params: Parameters, token_BT: jax.Array) -> jax.Array:
    """Logits `[B, T, V]` of whole sequences, without a cache: for training and for checks."""
    T = token_BT.shape[-1]
    x = params["embedding"][token_BT]
    position = jnp.arange(T, dtype=jnp.int32)
    rope = rope_tables(config, position, x.dtype)
    mask = position[:, None] >= position[None, :]

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, None]:
        return attention(query, jnp.moveaxis(key, -3, -1), jnp.swapaxes(value, -3, -2), mask), None

    for index in range(config.layers):
        x, _ = forward_layer(config, params["layers"][str(index)], x, rope, attend)
    return logits(config, params["final_norm"], head_matrix(params), x)
