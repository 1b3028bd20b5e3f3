"""Whether the engine's drawn tokens have the law of plain sampling: a chi-square test over many draws.

The draws are the engine's own: its prefill, then its loop of ticks for one fresh seed after another, all in one
compiled program. The law they are held against is computed without the engine: the whole model's logits in one pass of
plain JAX, filtered and scaled, in float64.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.llama import forward
from pipedec_jax.model.parameters import Parameters, initialize
from pipedec_jax.pipeline.engine import Engine, make_request
from pipedec_jax.pipeline.placement import OWN, SAME
from pipedec_jax.pipeline.state import Local, Shared, System, Weights
from pipedec_jax.pipeline.tick import run_ticks
from pipedec_jax.sampling import Sampling, keep, scale

LEAST_EXPECTED = 5.0
"""Draws that a cell of the test must be expected to hold; rarer ones are pooled."""


@dataclasses.dataclass(frozen=True)
class ChiSquare:
    """The result of a chi-square test of draws against a law."""

    draws: int
    cells: int
    """Cells after pooling."""
    statistic: float
    p_value: float
    """Chance of a statistic at least as large if the draws have the law; 0 where a token was drawn that it forbids."""


def chi_square(count: np.ndarray, probability: np.ndarray) -> ChiSquare:
    """Test counts `[M]` of outcomes against their probabilities `[M]`; rare outcomes are pooled, rarest first.

    Raises:
        ValueError: for probabilities that do not sum to 1, or too few draws for two cells.
    """
    count, probability = np.asarray(count, np.int64), np.asarray(probability, np.float64)
    if count.shape != probability.shape or not np.isclose(probability.sum(), 1, atol=1e-6) or (probability < 0).any():
        raise ValueError(f"probabilities must be one for each outcome and sum to 1, not to {probability.sum()}")
    draws = int(count.sum())
    possible = probability > 0
    forbidden = int(count[~possible].sum())
    order = np.argsort(probability[possible], kind="stable")
    expected, seen = draws * probability[possible][order], count[possible][order]
    cells: list[list[float]] = [[0.0, 0.0]]
    for want, have in zip(expected, seen, strict=True):
        if cells[-1][0] >= LEAST_EXPECTED:
            cells.append([0.0, 0.0])
        cells[-1][0] += want
        cells[-1][1] += have
    if len(cells) < 2:
        raise ValueError(f"{draws} draws are too few, or the law has one outcome alone: there must be two cells")
    statistic = sum((have - want) ** 2 / want for want, have in cells)
    p_value = 0.0 if forbidden else upper_tail(statistic, len(cells) - 1)
    return ChiSquare(draws=draws, cells=len(cells), statistic=statistic, p_value=p_value)


def upper_tail(statistic: float, degrees: int) -> float:
    """Chance that a chi-square variable of so many degrees of freedom is at least this: exact, by its finite sum."""
    half = statistic / 2
    if degrees % 2:
        total, shape = math.erfc(math.sqrt(half)), 0.5
    else:
        total, shape = 0.0, 0.0
    while shape < degrees / 2:
        total += math.exp(shape * math.log(half) - half - math.lgamma(shape + 1)) if half > 0 else float(shape == 0)
        shape += 1
    return min(total, 1.0)


def distort(token: np.ndarray, probability: np.ndarray, distance: float, seed: int) -> np.ndarray:
    """Draws `[M]` of a law made draws of another at this total variation: the second likeliest take from the likeliest.

    Raises:
        ValueError: where the likeliest outcome has less than that to give.
    """
    second, first = np.argsort(probability, kind="stable")[-2:]
    if probability[first] < distance:
        raise ValueError(f"no outcome is as likely as {distance}")
    moved = np.random.default_rng(seed).random(token.shape) < distance / probability[first]
    return np.where((token == first) & moved, second, token)


def plain_law(engine: Engine, params: Parameters, prompt: Sequence[int], sampling: Sampling, tokens: int) -> np.ndarray:
    """Probabilities `[V ** tokens]` of the next one or two tokens under plain sampling, the first in the outer place.

    Args:
        engine: says the model's geometry and its true vocabulary; nothing of it is run.
        params: the whole target.
        prompt: what is gone on from.
        sampling: how tokens are drawn.
        tokens: 1 or 2.
    """
    config, V = engine.target.config, engine.target.vocab_size

    @jax.jit
    def after(token_BT: jax.Array) -> jax.Array:
        scaled = scale(sampling.arrays(), forward(config, params, token_BT)[:, -1, :V])
        return jnp.where(keep(sampling.arrays(), scaled), scaled, -jnp.inf)

    def law(text: np.ndarray) -> np.ndarray:
        score = np.asarray(after(jnp.asarray(text, jnp.int32)), np.float64)
        weight = np.exp(score - score.max(axis=1, keepdims=True))
        return weight / weight.sum(axis=1, keepdims=True)

    text = np.asarray(prompt, np.int32)[None, :]
    first = law(text)[0]
    if tokens == 1:
        return first
    longer = np.concatenate((np.repeat(text, V, axis=0), np.arange(V, dtype=np.int32)[:, None]), axis=1)
    return (first[:, None] * law(longer)).ravel()


def draw(engine: Engine, prompt: Sequence[int], sampling: Sampling, draws: int, tokens: int) -> np.ndarray:
    """The first tokens `[draws, tokens]` of as many answers of the engine, each with a seed of its own.

    Prefill runs once. Every answer then is the engine's own loop of ticks from the state after prefill, with the next
    seed (`sampling.seed`, then one more, and so on); what the one before left in the caches is stale, as it is between
    prompts.
    """
    length = len(prompt) + tokens + 1
    request = make_request(prompt, tokens + 1, engine.capacity_for(length), sampling)
    local = engine.new_local(engine.capacity_for(length))
    shared, local = engine.programs(length, sampling.mode).prefill(engine.weights, request, local)
    own = jax.tree.map(lambda leaf: leaf.sharding.spec, engine.weights)
    program = jax.jit(
        jax.shard_map(
            functools.partial(draw_loop, engine.system(sampling.mode), len(prompt), draws, tokens),
            mesh=engine.mesh,
            in_specs=(own, SAME, OWN, SAME),
            out_specs=(SAME, OWN),
        ),
        donate_argnums=(2,),
    )
    found, _ = program(engine.weights, shared, local, np.uint32(sampling.seed))
    return np.asarray(found)


def draw_loop(
    system: System, start: int, draws: int, tokens: int, weights: Weights, begun: Shared, local: Local, seed: jax.Array
) -> tuple[jax.Array, Local]:
    """`draw`'s loop on the devices. Runs under `shard_map`."""
    most = jnp.int32((tokens + 1) * (system.stages + 1) * (system.draft_steps + 1))

    def step(index: jax.Array, carry: tuple[jax.Array, Local]) -> tuple[jax.Array, Local]:
        found, local = carry
        key = jax.random.key_data(jax.random.key(seed + index.astype(jnp.uint32), impl="threefry2x32"))
        shared = begun.replace(sampling=begun.sampling.replace(key=key))
        shared, local = run_ticks(system, weights, shared, local, jnp.int32(tokens), most)
        new = lax.slice(shared.text.token, (start,), (start + tokens,))
        return found.at[index].set(new), local

    return lax.fori_loop(0, draws, step, (jnp.full((draws, tokens), -1, jnp.int32), local))


@dataclasses.dataclass(frozen=True)
class Check:
    """One setting's draws against plain sampling, and against laws that are a little off."""

    first: ChiSquare
    """The first token."""
    second: ChiSquare
    """The second token, whatever the first: it was guessed, and a hit or not, when the first was drawn."""
    pair: ChiSquare
    """The first two together."""
    control_first: ChiSquare
    """The first token, distorted by a total variation of `distance`."""
    control_second: ChiSquare
    """The second one, likewise."""

    def passed(self, alpha: float) -> bool:
        """Whether no law is rejected at this level, and both controls are."""
        laws, controls = (self.first, self.second, self.pair), (self.control_first, self.control_second)
        return all(law.p_value >= alpha for law in laws) and all(control.p_value < alpha for control in controls)


def check(
    engine: Engine,
    params: Parameters,
    prompt: Sequence[int],
    sampling: Sampling,
    draws: int,
    distance: float = 0.02,
) -> Check:
    """Draw and test; `params` is the whole target, as `plain_law` needs it."""
    V = engine.target.vocab_size
    token = draw(engine, prompt, sampling, draws, 2)
    if token.min() < 0 or token.max() >= V:
        raise RuntimeError(f"an id that is no token was drawn (they go from 0 to {V - 1}); please report this")

    def test(outcome: np.ndarray, law: np.ndarray) -> ChiSquare:
        return chi_square(np.bincount(outcome, minlength=law.size), law)

    first, pair = (plain_law(engine, params, prompt, sampling, tokens) for tokens in (1, 2))
    laws = first, pair.reshape(V, V).sum(axis=0)
    alone = [test(own, law) for own, law in zip(token.T, laws, strict=True)]
    off = [test(distort(own, law, distance, sampling.seed), law) for own, law in zip(token.T, laws, strict=True)]
    together = test(token[:, 0] * V + token[:, 1], pair)
    return Check(*alone, pair=together, control_first=off[0], control_second=off[1])


def pair_of_models(config: LlamaConfig, seed: int, sharpness: float = 3.0) -> tuple[Parameters, Parameters]:
    """A random target and a draft of nearly the same weights, so that guesses are often right, though not always."""
    target = jax.tree.map(lambda x: sharpness * x, initialize(config, jax.random.key(seed)))
    other = initialize(config, jax.random.key(seed + 1))
    return target, jax.tree.map(lambda x, y: x + 0.3 * y, target, other)
