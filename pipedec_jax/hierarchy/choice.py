"""Which of some models to use, on how many stages, and how many passes a tick: chosen from what was measured.

`measure` gives the seconds of a pass of each model, plain decoding's own, and what each model says along a piece of the
target's text. Every selection of models, passes, widths and stages is then simulated on those words
(`pipedec_jax.analysis.hierarchy`), a tick charged what was measured of the rows that it computes, and the least time
per token wins. So a model in the middle is left out where it does not pay, and a verification is as wide as pays.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from jax.experimental import multihost_utils

from pipedec_jax.analysis.draft_then_verify import simulate_rounds
from pipedec_jax.analysis.hierarchy import simulate
from pipedec_jax.hierarchy.measure import WIDTHS, Measured
from pipedec_jax.hosts.processes import process_count

MOST_PASSES = 24
"""Most passes of a model in a tick that are tried."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A selection, and what it should cost by measured passes and simulated ticks."""

    models: tuple[int, ...]
    """Indices of the models in use, the smallest first, the target last."""
    passes: tuple[int, ...]
    """Of each but the target, in a tick; of draft-then-verify, the lookahead."""
    width: int
    tokens_per_tick: float
    """Simulated; of draft-then-verify, tokens per round."""
    tick_seconds: float
    """On average, modeled: the slowest model's measured passes, with the rows that they compute."""
    speedup: float
    """Over plain decoding by the target alone on one device, in this modeled time."""
    stages: int = 1
    """Of the target. The smaller models have one device each."""

    idle: float = 0.0
    """Share of ticks in which the target has nothing to verify, and takes a plain step; simulated."""

    @property
    def seconds(self) -> float:
        """Modeled, a token."""
        return self.tick_seconds / self.tokens_per_tick

    @property
    def devices(self) -> int:
        """How many it takes."""
        return len(self.models) - 1 + self.stages


def given(models: Sequence[int], passes: Sequence[int], width: int, stages: int = 1) -> Choice:
    """Numbers that nothing was predicted of."""
    return Choice(tuple(models), tuple(passes), width, tokens_per_tick=0, tick_seconds=0, speedup=0, stages=stages)


def choose(
    measured: Measured, *, all_models: bool = False, stages: Sequence[int] = (1,), dispatch: bool = False
) -> Choice:
    """The selection with the least modeled time per token.

    Args:
        measured: from `measure.measure`.
        all_models: whether none may be left out.
        stages: numbers of stages of the target to choose among, whose exchange was measured.
        dispatch: whether a tick is charged what the dispatch of its programs was measured to add.
    """
    return best(
        choice
        for models in selections(len(measured.seconds), all_models)
        for count in stages
        for choice in tried(measured, models, count, measured.dispatch if dispatch else 0.0)
    )


def best(choices: Iterable[Choice]) -> Choice:
    """The one with the least modeled time per token."""
    return max(choices, key=lambda choice: choice.speedup)


def selections(models: int, all_models: bool = False) -> list[tuple[int, ...]]:
    """All selections of at least two models that hold the target, the last one."""
    if all_models:
        return [tuple(range(models))]
    target = models - 1
    return [(*chosen, target) for size in range(1, models) for chosen in itertools.combinations(range(target), size)]


def tried(measured: Measured, models: Sequence[int], stages: int = 1, dispatch: float = 0.0) -> list[Choice]:
    """Every number of passes and every width worth trying with these models; `dispatch` is added to every tick."""
    widest = max(WIDTHS)
    widths = sorted({w for seconds in measured.seconds for w in (*seconds, 3, 6, 8, 12) if 1 < w <= widest})
    settings: list[tuple[tuple[int, ...], int]] = []
    for width in widths:
        target = measured.costs(models[-1], width, stages)[-1]
        fits = []
        for place, model in enumerate(models[:-1]):
            each = measured.pass_seconds(model, width if place else 1)
            most = max(1, min(MOST_PASSES, int(1.25 * target / each)))
            # Of the smallest, all numbers that fit beside the target; of the others, what is left to verify is little.
            fits.append(range(1, most + 1) if place == 0 else range(1, min(most, 3) + 1))
        settings.extend((passes, width) for passes in itertools.product(*fits))
    costs = [np.zeros((len(settings), widest + 1)) for _ in models]
    for number, (_, width) in enumerate(settings):
        for place, model in enumerate(models):
            found = measured.costs(model, width if place else 1, stages if model == models[-1] else 1)
            costs[place][number] = [*found, *[found[-1]] * (widest + 1 - len(found))]
    words = np.broadcast_to(
        labels(measured.words[list(models)])[:, None], (len(models), len(settings), measured.words.shape[1])
    )
    run = simulate(
        words,
        [[passes[place] for passes, _ in settings] for place in range(len(models) - 1)],
        width=[width for _, width in settings],
        stages=stages,
        costs=costs,
    )
    ticks = run.seconds / run.ticks + dispatch
    return [
        Choice(
            models=tuple(models),
            passes=passes,
            width=width,
            tokens_per_tick=float(run.tokens_per_tick[number]),
            tick_seconds=float(ticks[number]),
            speedup=float(run.tokens_per_tick[number] * measured.plain / ticks[number]),
            stages=stages,
            idle=float(1 - run.verifications[number] / run.ticks[number]),
        )
        for number, (passes, width) in enumerate(settings)
    ]


def tried_in_turns(measured: Measured, models: Sequence[int], dispatch: float = 0.0) -> list[Choice]:
    """Every lookahead of draft-then-verify with two models, on a device each; `dispatch` is added twice a round."""
    draft, target = models
    found = []
    for lookahead in range(1, max(WIDTHS)):
        run = simulate_rounds(measured.words[[draft, target]], lookahead)
        one = measured.pass_seconds(draft, 1)
        seconds = (
            run.drafted * one + run.rounds * (measured.costs(target, lookahead + 1)[-1] + 2 * dispatch)
        ) / run.rounds
        per_round = run.tokens / run.rounds
        found.append(
            Choice(
                models=(draft, target),
                passes=(lookahead,),
                width=lookahead + 1,
                tokens_per_tick=per_round,
                tick_seconds=seconds,
                speedup=per_round * measured.plain / seconds,
            )
        )
    return found


def choose_in_turns(measured: Measured, *, all_models: bool = False, dispatch: bool = False) -> Choice:
    """The lookahead of draft-then-verify, and the draft, with the least modeled time per token."""
    target = len(measured.seconds) - 1
    added = measured.dispatch if dispatch else 0.0
    pairs = [(target - 1, target)] if all_models else [(draft, target) for draft in range(target)]
    return best(choice for pair in pairs for choice in tried_in_turns(measured, pair, added))


def agree(choice: Choice | None, models: int) -> Choice:
    """The first process's choice, in every one of them; `models` is the number that it chose among."""
    if choice is None:
        blank = (0,) * models
        choice = given(blank, blank, 0)
    if process_count() == 1:
        return choice
    numbers = [len(choice.models), choice.width, choice.stages, *choice.models, *choice.passes]
    counts = np.zeros(2 * models + 3, np.int32)
    counts[: len(numbers)] = numbers
    figures = np.asarray((choice.tokens_per_tick, choice.tick_seconds, choice.speedup), np.float32)
    counts, figures = multihost_utils.broadcast_one_to_all((counts, figures))
    used, width, stages, *numbers = (int(number) for number in counts)
    models_used, passes = tuple(numbers[:used]), tuple(numbers[used : 2 * used - 1])
    return Choice(models_used, passes, width, *(float(x) for x in figures), stages=stages)


def labels(words: np.ndarray) -> np.ndarray:
    """Small numbers in place of tokens, equal where those are: the first model from the target down that says them."""
    labels = np.zeros(words.shape, np.int8)
    for model in range(len(words) - 2, -1, -1):
        labels[model] = len(words) - 1 - model
        for larger in range(model + 1, len(words)):
            labels[model] = np.where(words[model] == words[larger], labels[larger], labels[model])
    return labels
