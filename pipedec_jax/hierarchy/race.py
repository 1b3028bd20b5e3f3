"""Hierarchies and plain decoding run against each other for a moment, so that the fastest is used: `--models auto`.

A prediction from passes of each model alone knows nothing of what models do to each other on one machine, of the host's
threads or of transfers. So the best predictions are decoded with for a while, in both forms, beside plain decoding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from tqdm import tqdm

from pipedec_jax.clock import AnyEngine, decode, first_difference
from pipedec_jax.hierarchy.choice import Choice, placed_all
from pipedec_jax.hierarchy.measure import Measured
from pipedec_jax.hierarchy.settings import Form
from pipedec_jax.sampling import GREEDY, Sampling

CANDIDATES = 2
"""Predictions that are run, of different models or stages."""
TURNS = 3
"""Answers of each, of which the fastest counts; the first one warms up."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One way to decode, and how fast it is."""

    choice: Choice | None
    """`None` for plain decoding by the target alone."""
    form: Form
    predicted: float | None
    """Seconds a token, modeled for devices of their own, a tick's dispatch included; `None` of plain decoding, and of
    the free-running form, which has no ticks."""
    measured: float
    """Seconds a token on this machine, all models running."""
    differs_at: int | None = None
    """The first new token, from 0, that was not plain decoding's in some turn, as after a near tie in float32 or
    bfloat16; such an entry is left out of the choice. `None` where all were."""


def candidates(
    measured: Measured,
    models: Sequence[tuple[int, ...]],
    stages: Sequence[int] | None,
    devices: int,
    width: int | None = None,
) -> list[Choice]:
    """The best predictions of different models and stages, the best one first.

    Args:
        measured: what they rest on.
        models: selections of them.
        stages: of every model, where they are given; else they are chosen.
        devices: that work at the same time; every model takes one at least.
        width: most tokens that a verification reads, where it is given; else it is chosen.
    """
    found = placed_all(measured, models, stages, devices, measured.added, width)
    return sorted(found, key=lambda option: -option.speedup)[:CANDIDATES]


def race(
    choices: Sequence[Choice],
    forms: Sequence[Form],
    make: Callable[[Choice | None], AnyEngine],
    reform: Callable[[AnyEngine, Form], None],
    prompt: Sequence[int],
    new_tokens: int,
    sampling: Sampling = GREEDY,
) -> list[Entry]:
    """Decode a prompt with every choice in every form, and plainly; the fastest one first.

    Those whose tokens were not plain decoding's come last, however fast. One engine is there at a time: the weights of
    two need not fit.

    Args:
        choices: that are run.
        forms: in which.
        make: an engine of a choice, or of plain decoding.
        reform: gives an engine another form.
        prompt: token ids.
        new_tokens: of the answer.
        sampling: how they are drawn.
    """
    answer: list[int] = []
    found: list[Entry] = []
    bar = tqdm(total=1 + len(choices) * len(forms), desc="running the fastest", postfix="plain decoding", disable=None)
    for choice in (None, *choices):
        engine = make(choice)
        for form in forms if choice else forms[:1]:
            if choice:
                bar.set_postfix_str(f"{len(choice.models)} models, {form}")
                reform(engine, form)
            times, differs = [], None
            for _ in range(TURNS):
                progress, seconds = decode(engine, prompt, None, new_tokens, sampling)
                answer = answer or progress.tokens  # the first one is plain decoding's
                if choice is not None and differs is None:
                    differs = first_difference(progress.tokens, answer)
                times.append(seconds / max(1, len(progress.tokens) - 1))
            predicted = choice.seconds if choice and form == "lockstep" else None
            found.append(Entry(choice, form, predicted, min(times[1:]), differs))
            bar.update()
        del engine
    bar.close()
    return sorted(found, key=lambda entry: (entry.differs_at is not None, entry.measured))
