"""An exit head over whole texts at once, without a pipe: what engine and training are compared with."""

from typing import Any

import jax
import jax.numpy as jnp

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model import llama
from pipedec_jax.model.exit_head import ExitHeadConfig, before_vocabulary, vocabulary_part
from pipedec_jax.model.parameters import Parameters


def exit_logits(
    head: ExitHeadConfig, target: LlamaConfig, params: Parameters, own: Parameters, token_BT: jax.Array
) -> tuple[jax.Array, Any]:
    """Logits `[..., T, V]` after every token, and the keys and values that the head's block has seen."""
    position = jnp.arange(token_BT.shape[-1], dtype=jnp.int32)
    mask = position[:, None] >= position[None, :]

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Any]:
        return llama.attention(query, jnp.moveaxis(key, -3, -1), jnp.swapaxes(value, -3, -2), mask), (key, value)

    x = own["embedding"][token_BT]
    rope = llama.rope_tables(target, position, x.dtype)
    for index in range(head.exit_layer):
        x, _ = llama.forward_layer(target, own["layers"][str(index)], x, rope, attend)
    y, cache = before_vocabulary(head, target, params, x, rope, attend)
    norm, head_VR = vocabulary_part(head, params, own["final_norm"], llama.head_matrix(own))
    return llama.logits(head.model(target), norm, head_VR, y), cache
