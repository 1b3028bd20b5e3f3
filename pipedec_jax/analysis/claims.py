"""What drafters claim against how often the target agrees: every guess along texts of the target's own."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pipedec_jax import transcript, tree
from pipedec_jax.decoding.decoder import Decoder
from pipedec_jax.drafters.base import View
from pipedec_jax.drafters.ngram import NGramDrafter
from pipedec_jax.loading import Model
from pipedec_jax.model import llama
from pipedec_jax.model.parameters import read_tree
from pipedec_jax.sampling import Sampling, SamplingMode

LENGTHS = 5
"""Agreeing tokens that are told apart; more count as so many."""


@dataclasses.dataclass(frozen=True)
class Guesses:
    """All guesses along the texts. T is the tokens, K the guesses of a drafter for each."""

    logit: np.ndarray
    """[T, V] float32: the draft's."""
    token: np.ndarray
    """[T] the target's token."""
    looked_up: np.ndarray
    """[T, K] tokens that look-up guesses, -1 for none."""
    length: np.ndarray
    """[T, K] tokens that agreed before it, up to LENGTHS."""


def collect(target: Model, draft: Model, prompts: Sequence[str], **options: Any) -> Guesses:
    """Decode a continuation of each prompt, and guess along it.

    Args:
        target: the model whose text it is.
        draft: the model that guesses, with the target's tokens.
        prompts: texts.
        options: of `Decoder.generate`; each prompt has a seed of its own.

    Raises:
        ValueError: as `Decoder` and `Decoder.request` do, before anything is decoded.
    """
    Decoder(target, draft, stages=1)  # Checks that they go together.
    decoder = Decoder(target, method="pp", stages=1)
    requests = [decoder.request(prompt, seed=seed, **options) for seed, prompt in enumerate(prompts)]
    params = read_tree(draft.source, decoder.dtype)
    forward = jax.jit(functools.partial(llama.forward, draft.config))
    # Chances that tell the number of agreeing tokens, each so small that it stays visible in later guesses.
    look_up = NGramDrafter(children=4, chances=tuple(0.01 * (1 + index) for index in range(LENGTHS)))
    guess = jax.jit(functools.partial(guess_along, look_up), static_argnums=1)
    parts: list[tuple[np.ndarray, ...]] = []
    for seed, request in enumerate(requests):
        result = decoder.generate(request.prompt, seed=seed, **options)
        text = np.asarray([*request.prompt, *result.token_ids], np.int32)
        places = slice(len(request.prompt), len(text))
        padded = np.pad(text, (0, -len(text) % 512))
        logit = forward(params, padded[None])[0][places.start - 1 : places.stop - 1, : target.vocab_size]
        token, log_prob = jax.device_get(guess(padded, padded.shape[0], len(request.prompt)))
        length = lengths_of(log_prob[: places.stop - places.start], np.log(look_up.chances))
        looked_up = np.where(length > 0, token[: len(length)], -1)
        parts.append((np.asarray(logit, np.float32), text[places], looked_up, length))
    return Guesses(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def guess_along(look_up: Any, text: jax.Array, slots: int, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What look-up guesses for every place from `start` on, each from the text before it."""

    def at(place: jax.Array) -> tuple[jax.Array, jax.Array]:
        view = View(
            tree=tree.plant(1, 1, text[place - 1], place - 1),
            text=transcript.begin(text, place, jnp.int32(slots), jnp.asarray([-1], jnp.int32)),
            committed=jnp.zeros(slots, bool),
            frontier=jnp.zeros(1, jnp.int32),
            sampling=Sampling().arrays(),
            mode=SamplingMode(),
            sizes=(1,),
        )
        found = look_up.propose(None, (), view)[1]
        return found.token[0], found.log_prob[0]

    return jax.lax.map(at, jnp.minimum(start + jnp.arange(slots, dtype=jnp.int32), slots - 1))


def lengths_of(log_prob: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The number of agreeing tokens `[T, K]` from the chances claimed, 0 where nothing was guessed.

    A guess's chance is given that the better ones before it were wrong, which takes a little off each.
    """
    there = log_prob > -np.inf
    wrong = np.cumsum(np.log1p(-np.exp(np.where(there, log_prob, -np.inf))), axis=1)
    given = log_prob - np.pad(wrong, ((0, 0), (1, 0)))[:, :-1]
    nearest = np.argmin(np.abs(np.where(there, given, 0)[:, :, None] - known), axis=2)
    return np.where(there, 1 + nearest, 0)


def log_softmax(logit: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    shifted = logit - logit.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def fit_sharpness(found: Guesses) -> tuple[float, float, float]:
    """The factor that makes the target's tokens most likely, and their mean log-probability without and with it."""

    def mean(factor: float) -> float:
        return float(np.mean(log_softmax(factor * found.logit)[np.arange(len(found.token)), found.token]))

    low, high = 0.25, 4.0
    while high / low > 1.01:  # the mean is concave in the factor
        first, second = low ** (2 / 3) * high ** (1 / 3), low ** (1 / 3) * high ** (2 / 3)
        low, high = (first, high) if mean(first) < mean(second) else (low, second)
    best = (low * high) ** 0.5
    return best, mean(1.0), mean(best)


def reliability(claimed: np.ndarray, right: np.ndarray, edges: list[float]) -> list[str]:
    """`count: claimed -> right` for guesses by their claimed chance."""
    cells = []
    for low, high in itertools.pairwise(edges):
        inside = (claimed > low) & (claimed <= high)
        if inside.any():
            cells.append(f"{inside.sum()}: {claimed[inside].mean():.3f} -> {right[inside].mean():.3f}")
        else:
            cells.append("-")
    return cells
