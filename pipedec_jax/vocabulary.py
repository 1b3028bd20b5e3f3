"""Embedding and LM head with the vocabulary sharded over all devices, so that none holds or computes them whole.

Device d holds rows `d Vr .. (d + 1) Vr` of the embedding and of the head, where the vocabulary is padded to a multiple
of their number. With tensor parallelism a stage is several devices. A head product thus costs each device its part, and
none of it lies on one stage alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from pipedec_jax.config import LlamaConfig
from pipedec_jax.exchange import AXES, gather_over_devices
from pipedec_jax.model import llama
from pipedec_jax.sampling import SamplingArrays, SamplingMode, gumbel_noise, keep, scale
from pipedec_jax.tick_costs import few_rows, over_live_rows


def shard_size(vocab_size: int, devices: int) -> int:
    """Rows of the vocabulary on each device (Vr), the last ones padding."""
    return -(-vocab_size // devices)


def embed_part(shard: jax.Array, token_W: jax.Array) -> jax.Array:
    """This device's part `[W, D]` of the embeddings: rows of tokens it holds, zeros elsewhere; sum over the devices."""
    local = token_W - lax.axis_index(AXES) * shard.shape[0]
    mine = (local >= 0) & (local < shard.shape[0])
    return jnp.where(mine[:, None], shard[jnp.where(mine, local, 0)], jnp.zeros((), shard.dtype))


def head_part(
    config: LlamaConfig,
    final_norm: jax.Array,
    shard: jax.Array,
    hidden_WD: jax.Array,
    vocab_size: int,
    least_rows: int = 1,
) -> jax.Array:
    """This device's logits `[W, Vr]`; minus infinity for padding, that is for ids of `vocab_size` and over.

    The norm's weights are `[D]`, or `[W, D]` of each row. A logit that is infinite becomes NaN, so that no sum over
    them hides it (see `choose`). At least `least_rows` rows are computed (`placement.least_rows`).
    """
    W = hidden_WD.shape[0]
    with jax.named_scope("head"):
        more = ((0, max(0, least_rows - W)), (0, 0))
        norm = final_norm if final_norm.ndim == 1 else jnp.pad(final_norm, more)
        logit = llama.logits(config, norm, shard, jnp.pad(hidden_WD, more))[:W]
    token = lax.axis_index(AXES) * shard.shape[0] + jnp.arange(shard.shape[0], dtype=jnp.int32)
    logit = jnp.where(jnp.isfinite(logit), logit, jnp.asarray(jnp.nan, logit.dtype))
    return jnp.where(token < vocab_size, logit, jnp.asarray(-jnp.inf, logit.dtype))


class ChoicePart(struct.PyTreeNode):
    """One device's part of the target's choices; gathered, they give the choice."""

    best: jax.Array
    """[W] the highest score (logit, or scaled logit plus noise) among this device's tokens."""
    token: jax.Array
    """[W] int32: the token that has it."""
    logit: jax.Array
    """[W] that token's logit."""
    total: jax.Array
    """[W] log of the sum of the exponentials of this device's logits."""


def noise_part(sampling: SamplingArrays, logit_WVr: jax.Array, position_W: jax.Array, vocab_size: int) -> jax.Array:
    """This device's slice of the noise of the positions at which the tokens are drawn, `[W, Vr]`."""
    noise = gumbel_noise(sampling, position_W, vocab_size).astype(logit_WVr.dtype)
    return _my_columns(noise, logit_WVr.shape[-1])


def choice_part(
    mode: SamplingMode,
    sampling: SamplingArrays,
    logit_WVr: jax.Array,
    noise_WVr: jax.Array,
    vocab_size: int,
    live_W: jax.Array,
) -> ChoicePart:
    """Pick this device's best tokens. With top-k or top-p this holds a collective: call it at the top level.

    Rows that are not alive are not filtered: their choices mean nothing.
    """
    score = logit_WVr
    if mode.sampled:
        score = scale(sampling, score)
        if mode.filtered:
            score = jnp.where(_kept_part(sampling, score, vocab_size, live_W), score, -jnp.inf)
        score = score + noise_WVr
    token = jnp.argmax(score, axis=-1).astype(jnp.int32)
    pick = token[:, None]
    return ChoicePart(
        best=jnp.take_along_axis(score, pick, axis=-1)[:, 0],
        token=token + lax.axis_index(AXES) * logit_WVr.shape[-1],
        logit=jnp.take_along_axis(logit_WVr, pick, axis=-1)[:, 0],
        total=jax.nn.logsumexp(logit_WVr, axis=-1),
    )


def _kept_part(sampling: SamplingArrays, scaled_WVr: jax.Array, vocab_size: int, live_W: jax.Array) -> jax.Array:
    """This device's slice of the filters' mask, which needs all logits: the one thing that is gathered whole."""
    W, Vr = scaled_WVr.shape
    whole = gather_over_devices(scaled_WVr)
    whole = jnp.moveaxis(whole, 0, 1).reshape(W, -1)[:, :vocab_size]
    _, kept = over_live_rows(few_rows(W), live_W, lambda _, rows: (None, keep(sampling, rows)), None, whole)
    return _my_columns(kept, Vr)


def _my_columns(whole_WV: jax.Array, size: int) -> jax.Array:
    """This device's `size` columns of an array over the vocabulary, zeros past its end."""
    missing = lax.axis_size(AXES) * size - whole_WV.shape[-1]
    whole_WV = jnp.pad(whole_WV, ((0, 0), (0, missing))) if missing > 0 else whole_WV
    return lax.dynamic_slice_in_dim(whole_WV, lax.axis_index(AXES) * size, size, axis=1)


def choose(parts: ChoicePart) -> tuple[jax.Array, jax.Array]:
    """The target's choices from all devices' parts: tokens `[W]` int32 and their log-probabilities `[W]`.

    Where any device's logits are not finite, neither is the log-probability: that token must not be used.
    """
    winner = jnp.argmax(parts.best, axis=0)[None, :]  # the lowest device on a tie, as argmax over the whole would
    token = jnp.take_along_axis(parts.token, winner, axis=0)[0]
    logit = jnp.take_along_axis(parts.logit, winner, axis=0)[0]
    return token, logit - jax.nn.logsumexp(parts.total, axis=0)
