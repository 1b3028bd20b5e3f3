"""Batched plain decoding for the training's own use: many prompts of one length at a time, with the teacher's choices.

Letters as in `model.llama`; P tokens of a prompt, M new tokens, K best tokens kept for each position.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model import llama
from pipedec_jax.model.parameters import Parameters
from pipedec_jax.training.attention import causal_attention
from pipedec_jax.training.forward import forward

Caches = list[tuple[jax.Array, jax.Array]]
"""Of each layer keys `[B, G, A, T]` and values `[B, G, T, A]`."""


@dataclasses.dataclass(frozen=True)
class Record:
    """Sequences with the teacher's K most likely next tokens after every position."""

    token: np.ndarray
    """`[B, T]`, int32."""
    choice: np.ndarray
    """`[B, T, K]`, the most likely first; uint16, or int32 where the vocabulary is larger."""
    log_prob: np.ndarray
    """`[B, T, K]`, natural logarithms; float16."""

    def __len__(self) -> int:
        return len(self.token)


def best_of(logits: jax.Array, K: int) -> tuple[jax.Array, jax.Array]:
    """The K most likely tokens and their log-probabilities along the last axis."""
    log_prob, choice = lax.top_k(jax.nn.log_softmax(logits, axis=-1), K)
    small = logits.shape[-1] <= 2**16
    return choice.astype(jnp.uint16 if small else jnp.int32), log_prob.astype(jnp.float16)


@functools.partial(jax.jit, static_argnums=(0, 3))
def score(config: LlamaConfig, params: Parameters, token_BT: jax.Array, K: int) -> tuple[jax.Array, jax.Array]:
    """The K best next tokens `[B, T, K]` after every position of given text, and their log-probabilities."""
    B, T = token_BT.shape
    choice, log_prob = best_of(forward(config, params, token_BT), K)
    return choice.reshape(B, T, K), log_prob.reshape(B, T, K)


@functools.partial(jax.jit, static_argnums=(0, 3, 5))
def generate(
    config: LlamaConfig,
    params: Parameters,
    prompt_BP: jax.Array,
    new: int,
    temperature_B: jax.Array,
    K: int,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Continue prompts of one length by `new` tokens each; a row of temperature 0 is decoded greedily.

    End tokens do not stop anything: what follows is a new document, as in training.

    Returns:
        `token [B, P + new]`, and `choice`, `log_prob [B, P + new - 1, K]` after every position but the last.
    """
    B, P = prompt_BP.shape
    T = P + new

    def step(position: jax.Array, carry):
        token, choice, log_prob, caches = carry
        last = lax.dynamic_slice_in_dim(token, position, 1, axis=1)
        logits_BV, caches = _decode(config, params, last, caches, position)
        return (*extend(token, choice, log_prob, logits_BV, position), caches)

    def extend(token, choice, log_prob, logits_BV, position):
        """Note the teacher's choices after `position` and draw the token that follows it."""
        best, best_log_prob = best_of(logits_BV, K)
        choice = lax.dynamic_update_slice_in_dim(choice, best[:, None], position, axis=1)
        log_prob = lax.dynamic_update_slice_in_dim(log_prob, best_log_prob[:, None], position, axis=1)
        noise = jax.random.gumbel(jax.random.fold_in(key, position), logits_BV.shape, logits_BV.dtype)
        drawn = jnp.argmax(logits_BV + temperature_B[:, None] * noise, axis=-1).astype(jnp.int32)
        return lax.dynamic_update_slice_in_dim(token, drawn[:, None], position + 1, axis=1), choice, log_prob

    logits_BPV, caches = _prefill(config, params, prompt_BP, T)
    best, best_log_prob = best_of(logits_BPV, K)
    token = jnp.zeros((B, T), jnp.int32).at[:, :P].set(prompt_BP)
    choice = jnp.zeros((B, T - 1, K), best.dtype).at[:, :P].set(best)
    log_prob = jnp.zeros((B, T - 1, K), jnp.float16).at[:, :P].set(best_log_prob)
    first = extend(token, choice, log_prob, logits_BPV[:, -1], jnp.int32(P - 1))
    token, choice, log_prob, _ = lax.fori_loop(P, T - 1, step, (*first, caches))
    return token, choice, log_prob


def _decode(
    config: LlamaConfig, params: Parameters, token_B1: jax.Array, caches: Caches, position: jax.Array
) -> tuple[jax.Array, Caches]:
    """One token of every row at `position`: logits `[B, V]` of the next one, and the caches."""
    x = params["embedding"][token_B1]
    rope = llama.rope_tables(config, position[None], x.dtype)
    mask = (jnp.arange(caches[0][0].shape[-1], dtype=jnp.int32) <= position)[None, :]
    updated = []
    for index, (key_BGAT, value_BGTA) in enumerate(caches):

        def attend(query, key, value, key_BGAT=key_BGAT, value_BGTA=value_BGTA):
            key_BGAT = lax.dynamic_update_slice_in_dim(key_BGAT, jnp.moveaxis(key, 1, -1), position, axis=3)
            value_BGTA = lax.dynamic_update_slice_in_dim(value_BGTA, jnp.swapaxes(value, 1, 2), position, axis=2)
            return llama.attention(query, key_BGAT, value_BGTA, mask), (key_BGAT, value_BGTA)

        x, cache = llama.forward_layer(config, params["layers"][str(index)], x, rope, attend)
        updated.append(cache)
    return llama.logits(config, params["final_norm"], llama.head_matrix(params), x[:, 0]), updated


def _prefill(config: LlamaConfig, params: Parameters, prompt_BP: jax.Array, T: int) -> tuple[jax.Array, Caches]:
    """Logits `[B, P, V]` of the prompts, and the caches."""
    P = prompt_BP.shape[1]
    x = params["embedding"][prompt_BP]
    rope = llama.rope_tables(config, jnp.arange(P, dtype=jnp.int32), x.dtype)
    caches = []

    def attend(query: jax.Array, key: jax.Array, value: jax.Array):
        return causal_attention(query, key, value), (key, value)

    for index in range(config.layers):
        x, (key, value) = llama.forward_layer(config, params["layers"][str(index)], x, rope, attend)
        key_BGAT = jnp.pad(key.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), (0, T - P)))
        value_BGTA = jnp.pad(value.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, T - P), (0, 0)))
        caches.append((key_BGAT, value_BGTA))
    return llama.logits(config, params["final_norm"], llama.head_matrix(params), x), caches
