"""From a model's logits to guesses, scored as what the *target* will choose, not as what the model would.

A target follows the favourite of a draft model, or of an exit head, more often than the favourite's own probability
says, which `sharpness` corrects. And where the target draws with noise, that noise is known (it depends on seed and
position alone) and is added to the guessing model's own logits.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from pipedec_jax import vocabulary
from pipedec_jax.drafters.base import Proposals, View
from pipedec_jax.sampling import SamplingArrays, gumbel_noise, keep, scale
from pipedec_jax.tree import at

Noise = Literal["shared", "independent", "none"]
"""Under which noise a drawn token is guessed: the target's own, other noise of the same law, or none."""


class LikelyPart(struct.PyTreeNode):
    """What one device's slice of the vocabulary gives; gathered, the most likely tokens of the whole."""

    token: jax.Array
    """[W, K'] int32: its most likely tokens, as many as there are guesses, or all; none where `logit` is given."""
    score: jax.Array
    """[W, K']: their scores, the most likely first."""
    total: jax.Array
    """[W]: log of the sum of the exponentials of its tokens' scores."""
    logit: jax.Array | None
    """[W, Vr]: its logits, where top-k or top-p need those of all tokens; otherwise `None`."""


def most_likely(
    logit_WV: jax.Array, view: View, node_W: jax.Array, children: int, sharpness: float, noise: Noise
) -> Proposals:
    """The `children` tokens that the target will most likely choose after each of these nodes.

    Args:
        logit_WV: the guessing model's logits of the true vocabulary.
        view: the draft step.
        node_W: the nodes.
        children: guesses for each node (K).
        sharpness: factor on the logits before they are taken for the target's chances.
        noise: under which noise drawn tokens are guessed.
    """
    gumbel = None
    if _drawn(view, noise):
        gumbel = gumbel_noise(_sampling(view, noise), _next_position(view, node_W), logit_WV.shape[-1])
    log_chance = jax.nn.log_softmax(_scores(logit_WV, gumbel, view, sharpness), axis=-1)
    log_prob, token = lax.top_k(log_chance, children)
    return Proposals(token=token.astype(jnp.int32), log_prob=log_prob.astype(jnp.float32))


def likely_part(
    logit_WVr: jax.Array,
    view: View,
    node_W: jax.Array,
    children: int,
    vocab_size: int,
    sharpness: float,
    noise: Noise,
) -> LikelyPart:
    """This device's part of `most_likely`, from its slice of the logits (`vocabulary.head_part`)."""
    W, Vr = logit_WVr.shape
    if _drawn(view, noise) and view.mode.filtered:
        none = jnp.zeros((W, 0), logit_WVr.dtype)
        return LikelyPart(none.astype(jnp.int32), none, jnp.sum(none, axis=1), logit_WVr)
    gumbel = None
    if _drawn(view, noise):
        gumbel = vocabulary.noise_part(_sampling(view, noise), logit_WVr, _next_position(view, node_W), vocab_size)
    score_WVr = _scores(logit_WVr, gumbel, view, sharpness)
    score, token = lax.top_k(score_WVr, min(children, Vr))
    first = lax.axis_index(vocabulary.AXES) * Vr
    return LikelyPart(token.astype(jnp.int32) + first, score, jax.nn.logsumexp(score_WVr, axis=-1), None)


def most_likely_of(
    parts: LikelyPart, view: View, children: int, vocab_size: int, sharpness: float, noise: Noise
) -> Proposals:
    """`most_likely` of the frontier, from all devices' parts `[devices, ...]`."""
    if parts.logit is not None:
        whole_WV = _side_by_side(parts.logit)[:, :vocab_size]
        none = jnp.zeros((whole_WV.shape[0], children))
        return lax.cond(
            jnp.any(view.live),
            lambda: most_likely(whole_WV, view, view.frontier, children, sharpness, noise),
            lambda: Proposals(none.astype(jnp.int32), none.astype(jnp.float32)),
        )
    # Lower devices first, as top_k of the whole would take tokens that tie.
    score, index = lax.top_k(_side_by_side(parts.score), children)
    log_prob = score - jax.nn.logsumexp(parts.total, axis=0)[:, None]
    token = jnp.take_along_axis(_side_by_side(parts.token), index, axis=1)
    return Proposals(token=token, log_prob=log_prob.astype(jnp.float32))


def _scores(logit_WV: jax.Array, gumbel_WV: jax.Array | None, view: View, sharpness: float) -> jax.Array:
    """Scores whose softmax is the chance that the target chooses each token; with a noise if tokens are drawn under it.

    A target that draws takes the highest `logit / T + noise`. The guessing model's logits differ from the target's by
    an error, which in these units is T times smaller; hence the factor T, which makes greedy the limit of small T.
    """
    if gumbel_WV is None:
        return sharpness * logit_WV
    scaled = scale(view.sampling, logit_WV)
    drawn = scaled + gumbel_WV.astype(scaled.dtype)
    if view.mode.filtered:
        drawn = jnp.where(keep(view.sampling, scaled), drawn, -jnp.inf)
    return sharpness * view.sampling.temperature.astype(drawn.dtype) * drawn


def _drawn(view: View, noise: Noise) -> bool:
    """Whether tokens are guessed under noise."""
    return view.mode.sampled and noise != "none"


def _sampling(view: View, noise: Noise) -> SamplingArrays:
    """The noise's seed among the rest: the target's own, or another."""
    sampling = view.sampling
    return sampling.replace(key=sampling.key ^ jnp.uint32(0x9E3779B9)) if noise == "independent" else sampling


def _next_position(view: View, node_W: jax.Array) -> jax.Array:
    """[W] int32: where in the text what follows these nodes stands."""
    return at(view.tree.position, node_W, 0) + 1


def _side_by_side(parts: jax.Array) -> jax.Array:
    """The devices' arrays `[devices, W, n]` as `[W, devices n]`."""
    return jnp.moveaxis(parts, 0, 1).reshape(parts.shape[1], -1)
