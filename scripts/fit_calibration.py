"""Fit what drafters claim to how often the target agrees, on held-out text of its own (other seeds than the tables').

The target writes a continuation of each prompt; along it, every guess of the draft model and of look-up is compared
with the token that came. Fitted are: sharpness (the factor on the draft's logits that makes the target's tokens most
likely), the chance of a looked-up guess by how many tokens before it agreed, and how far a guess is to be trusted that
look-up alone makes. Reported: how often guesses of each claimed chance were right, before and after.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pipedec_jax
from pipedec_jax.analysis.held_out import held_out_prompts
from pipedec_jax.command_line.output import run_command

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


def collect(prompts: list[str], new: int, temperature: float) -> Guesses:
    """Decode and guess."""
    from pipedec_jax.drafters.ngram import NGramDrafter
    from pipedec_jax.loading import Model
    from pipedec_jax.model import llama
    from pipedec_jax.model.parameters import nest, parameter_shapes

    draft: Model = pipedec_jax.load_demo("draft")
    decoder = pipedec_jax.Decoder(pipedec_jax.load_demo("target"), method="pp", stages=1)
    params = nest({path: jnp.asarray(draft.source.read(path)) for path in parameter_shapes(draft.config)})
    forward = jax.jit(functools.partial(llama.forward, draft.config))
    # Chances that tell the number of agreeing tokens, each so small that it stays visible in later guesses.
    look_up = NGramDrafter(children=4, chances=tuple(0.01 * (1 + index) for index in range(LENGTHS)))
    guess = jax.jit(functools.partial(guess_along, look_up), static_argnums=1)
    parts: list[tuple[np.ndarray, ...]] = []
    for seed, prompt in enumerate(prompts):
        request = decoder.request(prompt, max_new_tokens=new, temperature=temperature, seed=seed)
        result = decoder.generate(request.prompt, max_new_tokens=new, temperature=temperature, seed=seed)
        text = np.asarray([*request.prompt, *result.token_ids], np.int32)
        places = slice(len(request.prompt), len(text))
        padded = np.pad(text, (0, -len(text) % 512))
        logit = forward(params, padded[None])[0][places.start - 1 : places.stop - 1, : draft.vocab_size]
        token, log_prob = jax.device_get(guess(padded, padded.shape[0], len(request.prompt)))
        length = lengths_of(log_prob[: places.stop - places.start], np.log(look_up.chances))
        looked_up = np.where(length > 0, token[: len(length)], -1)
        parts.append((np.asarray(logit), text[places], looked_up, length))
    return Guesses(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def guess_along(look_up: Any, text: jax.Array, slots: int, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What look-up guesses for every place from `start` on, each from the text before it."""
    from pipedec_jax import transcript, tree
    from pipedec_jax.drafters.base import View
    from pipedec_jax.sampling import Sampling, SamplingMode

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


def main() -> None:
    """Parse arguments, fit and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24, help="held-out prompts (default 24)")
    parser.add_argument("--seed", type=int, default=1000, help="that draws them (default 1000; the tables use 0)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--children", type=int, default=16, help="guesses of the draft that look-up adds to")
    args = parser.parse_args()
    pipedec_jax.use_cpu_devices(1)
    texts = [prompt.text for prompt in held_out_prompts(args.prompts, args.seed)]
    found = collect(texts, args.max_new_tokens, args.temperature)
    print(f"{len(found.token)} tokens after {args.prompts} held-out prompts (seed {args.seed}), measured agreement")

    factor, before, after = fit_sharpness(found)
    print(f"\nsharpness {factor:.2f}: mean log-probability of the target's token {before:.4f} -> {after:.4f}")
    edges = [0.0, 0.01, 0.03, 0.1, 0.3, 0.6, 0.9, 0.99, 1.0]
    print("guesses of the draft by claimed chance, count: claimed -> right")
    print("| sharpness | " + " | ".join(f"up to {edge}" for edge in edges[1:]) + " |")
    print("|" + " --- |" * len(edges))
    best = np.argsort(-found.logit, axis=1)[:, : args.children]
    right = best == found.token[:, None]
    for sharpness in (1.0, factor):
        claimed = np.exp(np.take_along_axis(log_softmax(sharpness * found.logit), best, axis=1))
        print(f"| {sharpness:.2f} | " + " | ".join(reliability(claimed.ravel(), right.ravel(), edges)) + " |")

    hit = found.looked_up == found.token[:, None]
    first = found.length[:, 0]
    chances = []
    print("\nthe longest look-up by how many tokens before it agreed")
    print("| tokens | guesses | right |\n| --- | --- | --- |")
    for length in range(1, LENGTHS + 1):
        those = first == length
        chances.append(float(hit[those, 0].mean()) if those.any() else 0.0)
        print(f"| {length}{' or more' if length == LENGTHS else ''} | {those.sum()} | {chances[-1]:.3f} |")
    alone = (found.length > 1) & ~np.any(found.looked_up[:, :, None] == best[:, None, :], axis=2)
    claimed = np.asarray([0.0, *chances])[found.length]
    worth = hit[alone].mean() / claimed[alone].mean() if alone.any() else 0.0
    print(f"\nguesses that look-up alone makes: {alone.sum()}, right {hit[alone].mean():.3f}, trust {worth:.2f}")


if __name__ == "__main__":
    run_command(main)
