"""Sampling that is exact and repeatable: the noise of a token depends on the seed and its position alone.

The target's token at absolute position p is `argmax(filter(logits / temperature) + gumbel(fold_in(key(seed), p)))`,
with filters in Hugging Face's order: top-k, then top-p (the token that crosses p stays). So the text is a
function of prompt, seed, target and dtype; methods, widths and stage counts cannot change it.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax


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
            # Less than that counts as 0 where programs run, and a mass of 0 takes no token at all.
            top_p=jnp.asarray(max(self.top_p, np.finfo(np.float32).tiny), jnp.float32),
            # As of `jax.random.key(seed)`, which would add `jax_random_seed_offset` to it.
            key=jnp.asarray(np.asarray([0, self.seed], np.uint32)),
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
    """Noise `[W, V]` float32 for tokens drawn at these absolute positions, however JAX is configured."""
    key = jax.random.wrap_key_data(sampling.key, impl="threefry2x32")

    def draw(position: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(key, position), (vocab_size,), jnp.float32, mode="low")

    with jax.threefry_partitionable(True):
        return jax.vmap(draw)(position_W)


def scale(sampling: SamplingArrays, logit_WV: jax.Array) -> jax.Array:
    """Logits divided by the temperature."""
    return logit_WV / sampling.temperature.astype(logit_WV.dtype)


def keep(sampling: SamplingArrays, scaled_WV: jax.Array) -> jax.Array:
    """Which tokens top-k and top-p leave, `[W, V]` bool, from logits already scaled, in float32 or wider.

    Tokens tied with the k-th most likely all stay, as in Hugging Face's top-k filter. Top-p works on what top-k left:
    a token stays while the tokens before it (most likely first) hold less than p.
    """
    rank_WV = _ranks(scaled_WV)
    none = rank_WV[:, 0] & 0  # every token is over it

    def count(mask_WV: jax.Array) -> jax.Array:
        return jnp.sum(mask_WV, axis=-1, dtype=jnp.int32)

    # No sorting: that of a real vocabulary takes twenty times as long on CPU, and many kernels on a GPU.
    kth = lax.cond(sampling.top_k > 0, lambda: _highest(rank_WV, count, sampling.top_k), lambda: none)
    left_WV = rank_WV >= kth[:, None]
    probability = jax.nn.softmax(jnp.where(left_WV, scaled_WV, -jnp.inf), axis=-1)
    p = sampling.top_p.astype(probability.dtype)

    def mass(mask_WV: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask_WV, probability, 0), axis=-1)

    def nucleus() -> jax.Array:
        last = _highest(rank_WV, mass, p)[:, None]
        tied = jnp.where(rank_WV == last, probability, 0)
        before = mass(rank_WV > last)[:, None] + jnp.cumsum(tied, axis=-1) - tied
        return left_WV & ((rank_WV > last) | ((rank_WV == last) & (before < p)))

    # A p of 1 must not lose tokens to rounding of the sum.
    return lax.cond(p < 1, nucleus, lambda: left_WV & (scaled_WV > -jnp.inf))


def _ranks(x: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the floats, equal where these are."""
    x = jnp.where(x == 0, jnp.zeros((), x.dtype), x)  # there are two zeros
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = lax.bitcast_convert_type(x, unsigned)
    sign = unsigned.type(1 << (8 * x.dtype.itemsize - 1))
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _highest(rank_WV: jax.Array, measure: Callable[[jax.Array], jax.Array], least: jax.Array) -> jax.Array:
    """The highest rank `[W]` such that `measure` of the tokens of that and higher ranks is at least this much.

    Found bit by bit. It is 0 where all tokens together are less.
    """
    one = rank_WV.dtype.type(1)
    bits = 8 * rank_WV.dtype.itemsize

    def step(index: jax.Array, rank: jax.Array) -> jax.Array:
        higher = rank | (one << (bits - 1 - index).astype(rank.dtype))
        return jnp.where(measure(rank_WV >= higher[:, None]) >= least, higher, rank)

    return lax.fori_loop(0, bits, step, rank_WV[:, 0] & 0)
