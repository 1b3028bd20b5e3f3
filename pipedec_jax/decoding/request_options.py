"""What a request says beside its prompt: checked without a model, so that it can be before one is read."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypedDict, TypeVar

from pipedec_jax.checks import check_count
from pipedec_jax.sampling import Sampling

Checked = TypeVar("Checked")


class RequestOptions(TypedDict, total=False):
    """What `Decoder.request` takes beside the prompt and `max_new_tokens`, for those that pass it on (and editors)."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: str | Collection[str]
    logprobs: bool
    drafter_params: Any


def check_request_options(
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Collection[str] = (),
) -> tuple[Sampling, tuple[str, ...]]:
    """How tokens are drawn, and the stop strings, from what `Decoder.request` takes.

    Raises:
        ValueError: for a value out of its range.
    """
    check_count("max_new_tokens", max_new_tokens)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    # What can be gone through once would stop the first of several answers alone; a dictionary's keys were not meant.
    several = isinstance(stop, Collection) and not isinstance(stop, str | Mapping)
    stops: tuple[Any, ...] = tuple(stop) if several else (stop,)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise ValueError(f"a stop string must be text and not empty, not {text!r}")
    return sampling, stops


def check_prompts(prompts: Iterable[Any], check: Callable[[Any], Checked]) -> list[Checked]:
    """What `check` makes of each of several prompts: all of them are seen before the first one is decoded.

    Raises:
        ValueError: for one prompt in place of several, and as `check` does, with the number of the prompt, from 0.
    """
    one = "a list of prompts is needed; generate takes one"
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        raise ValueError(f"{one}, such as {prompts!r}")
    checked = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, numbers.Integral):
            raise ValueError(f"{one}, such as these token ids")
        try:
            checked.append(check(prompt))
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from error
    return checked
