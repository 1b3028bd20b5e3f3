"""Wall clock of engines that decode the same prompts in turn, each answer compared with plain decoding's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from pipedec_jax.pipeline.progress import Progress
from pipedec_jax.sampling import GREEDY, Sampling

Key = TypeVar("Key")


class TokensDifferError(AssertionError):
    """A method gave other tokens than plain decoding."""


def first_difference(one: Sequence[int], two: Sequence[int]) -> int | None:
    """The first place at which two answers differ, the end of the shorter one included; `None` where they are equal."""
    places = (place for place, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    return next(places, None if len(one) == len(two) else min(len(one), len(two)))


class AnyEngine(Protocol):
    """What is timed: `pipeline.engine.Engine` or `hierarchy.engine.HierarchyEngine`."""

    def start(self, prompt: Sequence[int], *, max_new_tokens: int, sampling: Sampling) -> None:
        """Prefill a prompt."""
        ...

    def run(self, new_tokens: int) -> Progress:
        """Commit at least that many more tokens, unless the answer is complete before."""
        ...


def run_timed(engine: AnyEngine, new_tokens: int) -> tuple[Progress, Progress, float]:
    """How the answer that was started stands after its first token and `new_tokens` more, and the seconds of these."""
    before = engine.run(1)  # prefill and the first token: waits for all devices
    begun = time.perf_counter()
    after = engine.run(new_tokens)
    return before, after, time.perf_counter() - begun


def decode(
    engine: AnyEngine, prompt: Sequence[int], answer: Sequence[int] | None, new_tokens: int, sampling: Sampling = GREEDY
) -> tuple[Progress, float]:
    """One answer, and the seconds it took from the end of prefill.

    Raises:
        TokensDifferError: when it is not the expected one.
    """
    engine.start(prompt, max_new_tokens=new_tokens, sampling=sampling)
    _, progress, seconds = run_timed(engine, new_tokens)
    if answer is not None and progress.tokens != list(answer):
        raise TokensDifferError(f"an answer of {len(progress.tokens)} tokens differs from plain decoding's")
    return progress, seconds


def medians_in_turn(run: Callable[[Key], float], keys: Collection[Key], repeats: int) -> dict[Key, float]:
    """The median of what `run` gives for each key, all of them in turn (A B A B), so that they see the same machine."""
    found: dict[Key, list[float]] = {key: [] for key in keys}
    for _ in range(repeats):
        for key in keys:
            found[key].append(run(key))
    return {key: statistics.median(values) for key, values in found.items()}


def race(
    engines: Mapping[str, AnyEngine],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    new_tokens: int,
    before: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Measured milliseconds per token, first token and prefill apart, of each engine: medians over the prompts.

    The engines take turns on every prompt (A B C A B C), so that all see the same machine. The first prompt warms up.

    Args:
        engines: by name.
        prompts: token ids.
        answers: plain decoding's.
        new_tokens: of each answer.
        before: called before an engine's turn, by its name.
    """
    found: dict[str, list[float]] = {name: [] for name in engines}
    for number, (prompt, answer) in enumerate(zip([prompts[0], *prompts], [answers[0], *answers], strict=True)):
        for name, engine in engines.items():
            if before is not None and name in before:
                before[name]()
            progress, seconds = decode(engine, prompt, answer, new_tokens)
            if number:
                found[name].append(1e3 * seconds / (len(progress.tokens) - 1))
    return {name: statistics.median(times) for name, times in found.items()}
