"""Whether settings, models and requests fit together, and the slots that they need; reads no weight."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Set

from pipedec_jax.checks import check_count
from pipedec_jax.config import LlamaConfig
from pipedec_jax.drafters.base import Drafter, check_drafter
from pipedec_jax.model.exit_head import ExitHeadConfig
from pipedec_jax.model.tensor_parallel import check_parts
from pipedec_jax.pipeline.methods import make_schedule, make_split
from pipedec_jax.pipeline.settings import DRAFTERS, EngineSettings

MOST_PLACES = 16384
"""Places of a tree: what says who is above whom is as many bytes squared, on every device."""


def check_fit(
    settings: EngineSettings,
    target: LlamaConfig,
    draft: LlamaConfig | None,
    vocab_size: int,
    drafter: Drafter | str,
    head: ExitHeadConfig | None = None,
) -> None:
    """Check that settings and models fit together; needs no weights. `head` is the exit head.

    Raises:
        ValueError: when they do not.
    """
    make_split(settings, target, head)
    check_parts(target, settings.tensor_parallel)
    if isinstance(drafter, str):
        if drafter not in DRAFTERS:
            raise ValueError(f"drafter must be one of {', '.join(DRAFTERS)}, or a drafter of your own, not {drafter!r}")
    elif not isinstance(drafter, Drafter):
        raise ValueError(f"drafter must be one of {', '.join(DRAFTERS)}, or an object of a Drafter, not {drafter!r}")
    else:
        check_drafter(drafter)
    check_places(settings)
    most = _capacity_of(target.context + MOST_PLACES)
    if settings.capacity is not None and settings.capacity > most:
        raise ValueError(
            f"capacity must be at most {most}, not {settings.capacity}: as many cache slots hold the target's context"
            f" of {target.context} tokens and the largest tree"
        )
    if vocab_size > target.vocab_size:
        raise ValueError(f"the target has {target.vocab_size} embedding rows for {vocab_size} tokens")
    if settings.method == "pp":
        return
    if settings.children > vocab_size:
        raise ValueError(f"children ({settings.children}) must not exceed the number of tokens ({vocab_size})")
    at_exit = drafter.at_exit if isinstance(drafter, Drafter) else head is not None
    if at_exit != (settings.exit_layer is not None):
        raise ValueError(
            "a drafter at an exit needs exit_layer"
            if at_exit
            else f"exit_layer {settings.exit_layer} needs an exit head, or a drafter of your own at an exit"
        )
    if settings.exit_layer is not None:
        if draft is not None:
            raise ValueError("with an exit the target drafts for itself: leave the draft model out, or exit_layer")
        if drafter == "ngram":
            raise ValueError(
                "drafter 'ngram' does without an exit: choose 'model' (the head) or 'both', or no exit_layer"
            )
        if head is not None and head.exit_layer != settings.exit_layer:
            raise ValueError(f"the exit head is for exit layer {head.exit_layer}, not {settings.exit_layer}")
        return
    if drafter in ("model", "both") and draft is None:
        raise ValueError(
            f"method {settings.method!r} needs a draft model (draft=...), or a drafter that does without one "
            "(drafter='ngram')"
        )
    if drafter not in ("model", "both") and draft is not None:
        raise ValueError("give a draft model or a drafter that does without, not both")


def check_request(
    settings: EngineSettings, target: LlamaConfig, vocab_size: int, prompt: Iterable[int], max_new_tokens: int
) -> list[int]:
    """Check what shall be decoded, and return the prompt's ids; needs no weights.

    Raises:
        ValueError: for an empty prompt, an id that is no token, or a length over the context or the capacity.
    """
    tokens = _token_ids(prompt)
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


def _token_ids(prompt: Iterable[int]) -> list[int]:
    """A prompt as whole numbers; `ValueError` when it is none."""
    if isinstance(prompt, bytes):
        raise ValueError("a prompt must be text or token ids, not bytes; decode it first")
    if isinstance(prompt, Mapping | Set):
        raise ValueError(f"a prompt must be text or token ids in their order, not a {type(prompt).__name__}")
    shape = getattr(prompt, "shape", None)
    if shape is not None and len(shape) != 1:
        raise ValueError(f"an array of token ids must have one axis, not the shape {tuple(shape)}: give one prompt")
    try:
        found = list(prompt)
        if any(isinstance(token, Mapping) for token in found):
            raise TypeError("those of a chat's messages are model.chat(messages)")
        if any(isinstance(token, bool) for token in found):
            raise TypeError("True and False are none")
        return [operator.index(token) for token in found]
    except TypeError as error:
        raise ValueError(f"a prompt must be text or whole token ids ({error})") from error


def cache_slots(settings: EngineSettings, length: int) -> int:
    """Cache slots (S) for prompt and answer of this length together, the tree in flight included.

    Raises:
        ValueError: when `settings.capacity` is less.
    """
    # A slot that is silently missing would be wrong text.
    need = int(length + tree_slots(settings))
    if settings.capacity is None:
        return _capacity_of(need)
    if need > settings.capacity:
        raise ValueError(
            f"prompt, answer and tree need {need} cache slots but capacity is {settings.capacity}; raise capacity, or "
            "lower max_new_tokens or width"
        )
    return settings.capacity


def _capacity_of(need: int) -> int:
    """The slots of a cache that has to have so many: a power of two, so that one program serves many lengths."""
    return max(256, 1 << (need - 1).bit_length())


def check_places(settings: EngineSettings) -> None:
    """Raise `ValueError` where the tree is too large (`MOST_PLACES`)."""
    if has_places(settings):
        return
    sizes = {"stpp": "width or depth", "pipedec": "width or stages", "ppsd": "width or stages", "eesd": "draft_length"}
    raise ValueError(
        f"the tree would need {tree_slots(settings)} places, and {MOST_PLACES} are the most; lower "
        f"{sizes.get(settings.method, 'width, stages, draft_steps or pool')}"
    )


def has_places(settings: EngineSettings) -> bool:
    """Whether the tree is small enough (`MOST_PLACES`)."""
    return tree_slots(settings) <= MOST_PLACES


def tree_slots(settings: EngineSettings) -> int:
    """Cache slots that the tree can take beside the text."""
    return make_schedule(settings).capacity(settings.stages)
