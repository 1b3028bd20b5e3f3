"""Sampling that is exact and repeatable: the noise of a token depends on the seed and its position alone.

The target's token at absolute position p is `argmax(filtered logits / temperature + gumbel(fold_in(key(seed), p)))`,
with filters in Hugging Face's order: temperature, top-k, top-p (the token that crosses p stays). So the text is a
function of prompt, seed, target and dtype; methods, widths and stage counts cannot change it.
"""

from __future__ import annotations

import dataclasses
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Raises:
        ValueError: when a value is out of its range.
    """

    temperature: float = 0.0
    """Divides the logits; 0 means greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches p; 1 keeps all."""
    seed: int = 0
    """Seed of the noise, from 0 to 2**32 - 1."""

    def __post_init__(self) -> None:
        for name in ("top_k", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise ValueError(f"{name} must be a whole number, not {value!r}")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise ValueError(f"{name} must be a number, not {value!r}")
        # Beyond these bounds float32 scores overflow, or vanish beside the noise.
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:
            raise ValueError(f"temperature must be 0 (greedy) or from 1e-6 to 1e6, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps all tokens), not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be over 0 and at most 1 (1 keeps all tokens), not {self.top_p}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2**32 - 1, not {self.seed}")

    @property
    def mode(self) -> SamplingMode:
        """What of this must be known at compile time."""
        sampled = self.temperature > 0
        return SamplingMode(sampled=sampled, filtered=sampled and (self.top_k > 0 or self.top_p < 1))

    def arrays(self) -> SamplingArrays:
        """What of this may change without compiling again."""
        return SamplingArrays(
            temperature=jnp.asarray(self.temperature, jnp.float32),
            top_k=jnp.asarray(min(self.top_k, 2**31 - 1), jnp.int32),
            top_p=jnp.asarray(self.top_p, jnp.float32),
            key=jax.random.key_data(jax.random.key(self.seed, impl="threefry2x32")),
        )


GREEDY = Sampling()
"""The most likely token, always."""


@dataclasses.dataclass(frozen=True)
class SamplingMode:
    """The static part of `Sampling`: greedy decoding draws no noise, unfiltered sampling gathers no logits."""

    sampled: bool = False
    filtered: bool = False


class SamplingArrays(struct.PyTreeNode):
    """The dynamic part of `Sampling`."""

    temperature: jax.Array
    """[] float32."""
    top_k: jax.Array
    """[] int32."""
    top_p: jax.Array
    """[] float32."""
    key: jax.Array
    """[2] uint32: the seed's key data (threefry)."""


def gumbel_noise(sampling: SamplingArrays, position_W: jax.Array, vocab_size: int) -> jax.Array:
    """Noise `[W, V]` float32 for tokens drawn at these absolute positions."""
    key = jax.random.wrap_key_data(sampling.key, impl="threefry2x32")

    def draw(position: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(key, position), (vocab_size,), jnp.float32)

    return jax.vmap(draw)(position_W)


def scale(sampling: SamplingArrays, logit_WV: jax.Array) -> jax.Array:
    """Logits divided by the temperature."""
    return logit_WV / sampling.temperature.astype(logit_WV.dtype)


def keep(sampling: SamplingArrays, scaled_WV: jax.Array) -> jax.Array:
    """Which tokens top-k and top-p leave, `[W, V]` bool, from logits already scaled.

    Tokens tied with the k-th most likely all stay, as in Hugging Face's top-k filter. Top-p works on what top-k left:
    a token stays while the tokens before it (most likely first) hold less than p.
    """
    V = scaled_WV.shape[-1]
    order = jnp.argsort(-scaled_WV, axis=-1, stable=True)
    ranked = jnp.take_along_axis(scaled_WV, order, axis=-1)
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V)
    threshold = jnp.take(ranked, k - 1, axis=-1)[:, None]
    ranked = jnp.where(ranked >= threshold, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # The first token always stays; a p of 1 must not lose tokens to rounding of the sum.
    kept = (ranked > -jnp.inf) & ((before < sampling.top_p.astype(before.dtype)) | (sampling.top_p >= 1))
    kept = kept.at[:, 0].set(True)
    return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
