"""What the user chooses, checked: settings, whether models and requests fit, and the parts a method is made of."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np

from pipedec_jax.config import LlamaConfig
from pipedec_jax.drafters.base import Drafter, NoDrafter
from pipedec_jax.drafters.combined import CombinedDrafter
from pipedec_jax.drafters.model import ModelDrafter, Noise
from pipedec_jax.drafters.ngram import NGramDrafter
from pipedec_jax.pipeline.split import split_layers
from pipedec_jax.schedules.base import Schedule
from pipedec_jax.schedules.best_first import BestFirstSchedule
from pipedec_jax.schedules.levels import LevelSchedule
from pipedec_jax.schedules.plain import PlainSchedule
from pipedec_jax.schedules.static import StaticSchedule

METHODS = ("pp", "stpp", "pipedec", "best-first")
"""Decoding methods: plain pipeline parallelism, a static tree at a time, PipeDec as published, and the best candidates
first."""

DRAFTERS = ("model", "ngram", "both")
"""Who guesses: the draft model, look-up in the text so far, or both into the same tree."""

MOST_PLACES = 16384
"""Places of a tree: what says who is above whom is as many bytes squared, on every device."""

MOST_LOOKED_UP = 4
"""Guesses for each node that look-up adds to a draft model's: it seldom has more that are any good."""


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """What the user chooses.

    Raises:
        ValueError: for a method that does not exist, or a size that is no whole number of at least 1.
    """

    method: str = "pipedec"
    stages: int = 4
    """Stages of the target (N)."""
    width: int = 16
    """Most nodes of a tick's batch, or of a tree level of STPP (W); PP ignores it."""
    children: int = 8
    """Most children per node (K); PP ignores it."""
    draft_steps: int = 1
    """Draft steps in a tick of best-first (R)."""
    depth: int = 4
    """Levels of STPP's tree below its root."""
    pool: int | None = None
    """Nodes that best-first extends before they are sent (P); by default two batches for every draft step but one."""
    sharpness: float = 1.0
    """Factor on the draft model's logits before they are taken for the target's chances."""
    noise: Noise = "shared"
    """Under which noise the draft model guesses tokens that are drawn."""
    dtype: Any = jnp.float32
    """Dtype of weights, activations and caches."""
    prefill_width: int = 128
    """Prompt tokens per prefill chunk."""
    capacity: int | None = None
    """Cache slots (S); by default the next power of two that holds prompt, answer and tree."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {self.method!r}")
        for name in ("stages", "width", "children", "draft_steps", "depth", "prefill_width"):
            check_count(name, getattr(self, name))
        for name in ("pool", "capacity"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.pool is not None and self.pool < self.width:
            raise ValueError(f"pool ({self.pool}) must hold at least a batch: width is {self.width}")
        if self.draft_steps > 1 and self.method in ("pipedec", "stpp"):
            other = "use method best-first for more" if self.method == "pipedec" else "its depth says how many"
            raise ValueError(f"draft_steps is not for {self.method}, {other}")
        if not 0 < self.sharpness < math.inf:
            raise ValueError(f"sharpness must be a finite number over 0, not {self.sharpness!r}")
        if self.noise not in get_args(Noise):
            raise ValueError(f"noise must be one of {', '.join(get_args(Noise))}, not {self.noise!r}")

    @property
    def steps(self) -> int:
        """Draft steps of a tick, whatever the method."""
        return {"pp": 0, "stpp": self.depth}.get(self.method, self.draft_steps)


def check_count(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is a whole number of at least 1."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


def check_fit(
    settings: EngineSettings, target: LlamaConfig, draft: LlamaConfig | None, vocab_size: int, drafter: Drafter | str
) -> None:
    """Check that settings and models fit together; needs no weights.

    Raises:
        ValueError: when they do not.
    """
    split_layers(target.layers, settings.stages)
    if isinstance(drafter, str):
        if drafter not in DRAFTERS:
            raise ValueError(f"drafter must be one of {', '.join(DRAFTERS)}, or a drafter of your own, not {drafter!r}")
    elif not isinstance(drafter, Drafter):
        raise ValueError(f"drafter must be one of {', '.join(DRAFTERS)}, or an object of a Drafter, not {drafter!r}")
    places = tree_slots(settings)
    if places > MOST_PLACES:
        raise ValueError(
            f"the tree would need {places} places, and {MOST_PLACES} are the most; lower width, stages, draft_steps or "
            "pool"
        )
    for name, config in (("target", target), ("draft", draft)):
        if config is not None and vocab_size > config.vocab_size:
            raise ValueError(f"the {name} has {config.vocab_size} embedding rows for {vocab_size} tokens")
    if settings.method == "pp":
        return
    if drafter in ("model", "both") and draft is None:
        raise ValueError(
            f"method {settings.method!r} needs a draft model (draft=...), or a drafter that does without one "
            "(drafter='ngram')"
        )
    if drafter not in ("model", "both") and draft is not None:
        raise ValueError("give a draft model or a drafter that does without, not both")
    if settings.children > vocab_size:
        raise ValueError(f"children ({settings.children}) must not exceed the number of tokens ({vocab_size})")


def check_request(
    settings: EngineSettings, target: LlamaConfig, vocab_size: int, prompt: Sequence[int], max_new_tokens: int
) -> list[int]:
    """Check what shall be decoded, and return the prompt's ids; needs no weights.

    Raises:
        ValueError: for an empty prompt, an id that is no token, or a length over the context or the capacity.
    """
    if isinstance(prompt, bytes):
        raise ValueError("a prompt must be text or token ids, not bytes; decode it first")
    try:
        tokens = [operator.index(token) for token in prompt]
    except TypeError as error:
        raise ValueError(f"a prompt must be text or whole token ids ({error})") from error
    if not tokens:
        raise ValueError("the prompt is empty; give at least one token of text")
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"prompt token {token} is none of the target's: ids go from 0 to {vocab_size - 1}")
    check_count("max_new_tokens", max_new_tokens)
    if len(tokens) + max_new_tokens > target.context:
        raise ValueError(
            f"prompt ({len(tokens)} tokens) and max_new_tokens ({max_new_tokens}) exceed the target's context of "
            f"{target.context} tokens: shorten the prompt, or lower max_new_tokens"
        )
    cache_slots(settings, len(tokens) + max_new_tokens)
    return tokens


def cache_slots(settings: EngineSettings, length: int) -> int:
    """Cache slots (S) for prompt and answer of this length together, the tree in flight included.

    Raises:
        ValueError: when `settings.capacity` is less.
    """
    # A slot that is silently missing would be wrong text.
    need = int(length + tree_slots(settings))
    if settings.capacity is None:
        return max(256, 1 << (need - 1).bit_length())
    if need > settings.capacity:
        raise ValueError(
            f"prompt, answer and tree need {need} cache slots but capacity is {settings.capacity}; raise capacity, or "
            "lower max_new_tokens or width"
        )
    return settings.capacity


def tree_slots(settings: EngineSettings) -> int:
    """Cache slots that the tree can take beside the text."""
    return make_schedule(settings).capacity(settings.stages)


def make_schedule(settings: EngineSettings) -> Schedule:
    """The method's schedule."""
    width = settings.width
    match settings.method:
        case "pp":
            return PlainSchedule()
        case "stpp":
            return StaticSchedule(width=1 + settings.depth * width, level=width)
        case "pipedec":
            return LevelSchedule(width)
        case _:
            return BestFirstSchedule(width, pool=settings.pool or 2 * (settings.draft_steps - 1) * width)


def make_drafter(
    settings: EngineSettings, draft: LlamaConfig | None, drafter: Drafter | str, vocab_size: int
) -> Drafter:
    """Who guesses: the drafter given, or one of `DRAFTERS` by its name."""
    if settings.method == "pp":
        return NoDrafter()
    if isinstance(drafter, Drafter):
        return drafter
    if drafter == "ngram":
        return NGramDrafter(children=settings.children)
    assert draft is not None  # check_fit
    model = ModelDrafter(
        config=draft,
        children=settings.children,
        vocab_size=vocab_size,
        sharpness=settings.sharpness,
        noise=settings.noise,
    )
    look_up = NGramDrafter(children=min(settings.children, MOST_LOOKED_UP))
    return CombinedDrafter(model, look_up) if drafter == "both" else model
