"""Small random hierarchies: shallower models of one target, the last one a perturbed copy; programs shared by tests."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pipedec_jax.hierarchy.engine import HierarchyEngine
from pipedec_jax.hierarchy.settings import HierarchySettings
from pipedec_jax.model.parameters import MemorySource
from pipedec_jax.sampling import Sampling
from tests.oracle import GREEDY, Draw
from tests.random_pairs import (
    FIVE,
    VOCAB,
    Pair,
    as_source,
    draft_weights,
    hugging_face_config,
    plain_steps,
    target_weights,
)

LAYERS = 3
LONGEST = 72
"""Prompt and answer at most."""


@dataclasses.dataclass(frozen=True)
class SmallPair(Pair):
    """A pair whose target has three layers."""

    geometry: str = FIVE
    deep: float = 0.4

    @functools.cached_property
    def target_config(self) -> dict[str, Any]:
        """The target's `config.json`."""
        return hugging_face_config(LAYERS)


def sources(seed: int, models: int) -> list[MemorySource]:
    """The smallest model first: two noisy layers, two layers, and as the third of four a perturbed copy."""
    noisy, shallow = SmallPair(seed=seed, noise=0.15, draft_layers=2), SmallPair(seed=seed, draft_layers=2)
    copy = SmallPair(seed=seed, noise=0.05, draft_layers=LAYERS)
    chosen = {2: [shallow], 3: [noisy, shallow], 4: [noisy, shallow, copy]}[models]
    found = [as_source(pair.draft_config, draft_weights(pair)) for pair in chosen]
    return [*found, as_source(shallow.target_config, target_weights(SmallPair(seed=seed)))]


@functools.cache
def engine(settings: HierarchySettings) -> HierarchyEngine:
    """One engine per settings, so that every test finds its programs compiled."""
    capacity = dataclasses.replace(settings, capacity=LONGEST + 2 * settings.stages[-1] + 2)
    return HierarchyEngine(sources(0, len(settings.stages)), capacity, vocab_size=VOCAB)


def load(engine: HierarchyEngine, seed: int) -> None:
    """Put the weights of another hierarchy into an engine."""
    for model, source in zip(engine.models, sources(seed, len(engine.models)), strict=True):
        model.place_weights(source, VOCAB)


def decode(
    engine: HierarchyEngine,
    prompt: Sequence[int],
    new_tokens: int,
    draw: Draw = GREEDY,
    *,
    end_tokens: Sequence[int] = (),
    pieces: Sequence[int] = (),
) -> Any:
    """Decode one prompt, after `pieces` of so many tokens in one go."""
    sampling = Sampling(temperature=draw.temperature, top_k=draw.top_k, top_p=draw.top_p, seed=draw.seed)
    engine.start(prompt, max_new_tokens=new_tokens, sampling=sampling, end_tokens=end_tokens)
    for piece in (*pieces, new_tokens):
        progress = engine.run(piece)
    return progress


def plain(seed: int, prompt: Sequence[int], new_tokens: int, draw: Draw = GREEDY) -> list[int]:
    """What plain decoding in NumPy gives."""
    return [step.token for step in plain_steps(SmallPair(seed=seed), tuple(prompt), draw, new_tokens)]


def settings(**options: Any) -> HierarchySettings:
    """In float64."""
    return HierarchySettings(dtype=jnp.float64, prefill_width=16, **options)


def x64() -> Any:
    """The context all of this runs in."""
    return jax.enable_x64(True)
