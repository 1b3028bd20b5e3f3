"""From a model's logits to guesses, scored as what the *target* will choose, not as what the model would.

A target follows the favourite of a draft model, or of an exit head, more often than the favourite's own probability
says, which `sharpness` corrects. And where the target draws with noise, that noise is known (it depends on seed and
position alone) and is added to the guessing model's own logits.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from pipedec_jax.drafters.base import Proposals, View
from pipedec_jax.sampling import gumbel_noise, keep, scale
from pipedec_jax.tree import at

Noise = Literal["shared", "independent", "none"]
"""Under which noise a drawn token is guessed: the target's own, other noise of the same law, or none."""


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
    position_W = at(view.tree.position, node_W, 0) + 1
    log_prob, token = lax.top_k(log_chances(logit_WV, view, position_W, sharpness, noise), children)
    return Proposals(token=token.astype(jnp.int32), log_prob=log_prob.astype(jnp.float32))


def log_chances(logit_WV: jax.Array, view: View, position_W: jax.Array, sharpness: float, noise: Noise) -> jax.Array:
    """`[W, V]` log of the chance that the target chooses each token for these positions.

    A target that draws takes the highest `logit / T + noise`. The guessing model's logits differ from the target's by
    an error, which in these units is T times smaller; hence the factor T, which makes greedy the limit of small T.
    """
    if not view.mode.sampled or noise == "none":
        return jax.nn.log_softmax(sharpness * logit_WV, axis=-1)
    sampling = view.sampling
    if noise == "independent":
        sampling = sampling.replace(key=sampling.key ^ jnp.uint32(0x9E3779B9))
    scaled = scale(sampling, logit_WV)
    gumbel = gumbel_noise(sampling, position_W, logit_WV.shape[-1])
    drawn = scaled + gumbel.astype(scaled.dtype)
    if view.mode.filtered:
        drawn = jnp.where(keep(sampling, scaled), drawn, -jnp.inf)
    factor = sharpness * sampling.temperature.astype(drawn.dtype)
    return jax.nn.log_softmax(factor * drawn, axis=-1)
