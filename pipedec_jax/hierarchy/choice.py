"""Which of some models to use, on how many stages each, and how many passes a tick: chosen from what was measured.

`measure` gives the seconds of a pass of each model, plain decoding's own, and what each model says along a piece of the
target's text. Every selection of models, passes, widths and stages is then simulated on those words
(`pipedec_jax.modeled.hierarchy`), a tick charged what was measured of the rows that it computes, and the least time
per token wins. So a model in the middle is left out where it does not pay, a verification is as wide as pays, and a
model is spread over as many stages as pay.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from pipedec_jax.hierarchy.measure import WIDTHS, Measured
from pipedec_jax.hierarchy.settings import MOST_PASSES
from pipedec_jax.hosts.processes import process_count
from pipedec_jax.modeled.draft_then_verify import simulate_rounds
from pipedec_jax.modeled.hierarchy import simulate

MOST_TRIED = 24
"""Most passes of a model in a tick that are tried, for each of its stages."""
LONGER = 1.25
"""How much longer than the target's pass those of a smaller model may take in a tick."""
OTHER_WIDTHS = (3, 6, 8, 12)
"""Widths that are tried beside those that were timed."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A selection, and what it should cost by measured passes and simulated ticks."""

    models: tuple[int, ...]
    """Indices of the models in use, the smallest first, the target last."""
    passes: tuple[int, ...]
    """Of each but the target, in a tick, of its own pipe's ticks; of draft-then-verify, the lookahead."""
    width: int
    tokens_per_tick: float
    """Simulated; of draft-then-verify, tokens per round."""
    tick_seconds: float
    """On average, modeled: the slowest model's measured passes, with the rows that they compute."""
    speedup: float
    """Over plain decoding by the target alone on one device, in this modeled time."""
    stages: tuple[int, ...]
    """Of each of these models; a stage is a device."""
    idle: float = 0.0
    """Share of ticks in which the target has nothing to verify, and takes a plain step; simulated."""

    @property
    def seconds(self) -> float:
        """Modeled, a token."""
        return self.tick_seconds / self.tokens_per_tick

    @property
    def devices(self) -> int:
        """How many it takes."""
        return sum(self.stages)


def given(models: Sequence[int], passes: Sequence[int], width: int, stages: Sequence[int] | None = None) -> Choice:
    """Numbers that nothing was predicted of; by default on a device each."""
    stages = (1,) * len(models) if stages is None else tuple(stages)
    return Choice(tuple(models), tuple(passes), width, tokens_per_tick=0, tick_seconds=0, speedup=0, stages=stages)


def choose(
    measured: Measured,
    *,
    all_models: bool = False,
    stages: Sequence[int] | None = None,
    devices: int = 0,
    dispatch: bool = False,
    least: int = 0,
    width: int | None = None,
) -> Choice:
    """The selection with the least modeled time per token.

    Args:
        measured: from `measure.measure`.
        all_models: whether none may be left out.
        stages: of every model, where they are given; chosen by default.
        devices: to choose stages for; every model has one in any case.
        dispatch: whether a tick is charged what the dispatch of its programs, and other processes, were measured to
            add.
        least: devices that must be used: every process has to have one.
        width: most tokens that a verification reads, where it is given; chosen by default.
    """
    added = measured.added if dispatch else 0.0
    used = selections(len(measured.seconds), all_models)
    found = placed_all(measured, used, stages, devices, added, width)
    enough = [choice for choice in found if choice.devices >= least]
    if not enough and stages is None:
        # Then what is lacking are stages of the target, though they do not pay.
        lacking = [(*[1] * (len(models) - 1), least - len(models) + 1) for models in used]
        enough = [
            best(tried(measured, models, place, added, width))
            for models, place in zip(used, lacking, strict=True)
            if place[-1] <= measured.layers[-1]
        ]
    return best(enough)


def placed(
    measured: Measured,
    models: Sequence[int],
    stages: Sequence[int] | None,
    devices: int,
    added: float = 0.0,
    width: int | None = None,
) -> list[Choice]:
    """The best numbers for each placement of these models that is worth a look.

    From every number of stages of the target, the smaller models on one each, that smaller model is given its next
    number of stages which gains most, until none gains. Numbers whose exchange was measured are tried, but none by
    which no pass of the model gets quicker, as it would only take more of them; nor, for the smallest, which has one
    token in its pipe, one by which no token does.

    Args:
        measured: what it rests on.
        models: that are used.
        stages: of every model, used or not, where they are given; else they are searched.
        devices: that there are.
        added: seconds that every tick takes beside its passes (`Measured.added`).
        width: as for `choose`.
    """
    if stages is not None:
        return [best(tried(measured, models, [stages[model] for model in models], added, width))]
    found: dict[tuple[int, ...], Choice] = {}

    def visit(place: tuple[int, ...]) -> Choice:
        if place not in found:
            found[place] = best(tried(measured, models, place, added, width))
        return found[place]

    most = max(devices, len(models))
    counts = [[1, *measured.counts(model, alone=place == 0)] for place, model in enumerate(models)]
    for target in counts[-1]:
        place = (*[1] * (len(models) - 1), target)
        if sum(place) > most:
            continue
        here = visit(place)
        while there := [visit(step) for step in _spread_more(here.stages, counts) if sum(step) <= most]:
            if best(there).speedup <= here.speedup:
                break
            here = best(there)
    return list(found.values())


def _spread_more(stages: tuple[int, ...], counts: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    """Placements in which one of the smaller models has its next number of stages, of those in `counts`."""
    for place, known in enumerate(counts[:-1]):
        more = [count for count in known if count > stages[place]]
        if more:
            yield (*stages[:place], min(more), *stages[place + 1 :])


def placed_all(
    measured: Measured,
    selected: Sequence[tuple[int, ...]],
    stages: Sequence[int] | None,
    devices: int,
    added: float = 0.0,
    width: int | None = None,
) -> list[Choice]:
    """What `placed` gives of each selection of models.

    Of four models or more this takes seconds, of many devices a minute: then a bar on a terminal says so.
    """
    bar = tqdm(selected, desc="simulating hierarchies", unit="selection", delay=1.0, disable=None)
    return [choice for models in bar for choice in placed(measured, models, stages, devices, added, width)]


def best(choices: Iterable[Choice]) -> Choice:
    """The one with the least modeled time per token."""
    return max(choices, key=lambda choice: choice.speedup)


def selections(models: int, all_models: bool = False) -> list[tuple[int, ...]]:
    """All selections of at least two models that hold the target, the last one."""
    if all_models:
        return [tuple(range(models))]
    target = models - 1
    return [(*chosen, target) for size in range(1, models) for chosen in itertools.combinations(range(target), size)]


def tried(
    measured: Measured,
    models: Sequence[int],
    stages: int | Sequence[int] = 1,
    added: float = 0.0,
    given_width: int | None = None,
) -> list[Choice]:
    """Every number of passes and every width worth trying with these models.

    Args:
        measured: what it rests on.
        models: that are used.
        stages: of each of them, or of the target alone, the others having one.
        added: seconds that every tick takes beside its passes (`Measured.added`).
        given_width: the only width to try.
    """
    staged = (*[1] * (len(models) - 1), stages) if isinstance(stages, int) else tuple(stages)
    settings = _settings_to_try(measured, models, staged, given_width)
    widest = max(width for _, width in settings)

    def pass_costs(place: int, width: int) -> list[float]:
        # The smallest model reads its own word alone; beyond the width, the last number counts.
        found = measured.costs(models[place], width if place else 1, staged[place])
        return [*found, *[found[-1]] * (widest + 1 - len(found))]

    widths = {width for _, width in settings}
    tables = [{width: pass_costs(place, width) for width in widths} for place in range(len(models))]
    run = simulate(
        labels(measured.words[list(models)])[:, None],
        [[passes[place] for passes, _ in settings] for place in range(len(models) - 1)],
        width=[width for _, width in settings],
        stages=staged,
        costs=[[table[width] for _, width in settings] for table in tables],
    )
    ticks = run.seconds / run.ticks + added
    return [
        Choice(
            models=tuple(models),
            passes=passes,
            width=width,
            tokens_per_tick=float(run.tokens_per_tick[number]),
            tick_seconds=float(ticks[number]),
            speedup=float(run.tokens_per_tick[number] * measured.plain / ticks[number]),
            stages=staged,
            idle=float(1 - run.verifications[number] / run.ticks[number]),
        )
        for number, (passes, width) in enumerate(settings)
    ]


def _settings_to_try(
    measured: Measured, models: Sequence[int], stages: Sequence[int], given_width: int | None
) -> list[tuple[tuple[int, ...], int]]:
    """Passes of each model but the target, and widths; arguments as for `tried`."""
    widths = {given_width} if given_width else set(OTHER_WIDTHS).union(*measured.seconds)
    found: list[tuple[tuple[int, ...], int]] = []
    for width in sorted(width for width in widths if given_width or 1 < width <= max(WIDTHS)):
        target = measured.costs(models[-1], width, stages[-1])[-1]
        fits = []
        for place, (model, count) in enumerate(zip(models[:-1], stages[:-1], strict=True)):
            each = measured.costs(model, width if place else 1, count)[-1]
            most = max(1, min(MOST_TRIED * count, MOST_PASSES, int(LONGER * target / each)))
            # Of the smallest, all that fit beside the target, on several stages whole tokens; of the others, what is
            # left to verify is little.
            whole = range(count, most + 1, count)
            some = {*range(1, min(most, 3) + 1), *whole[:2]}
            fits.append(sorted({*range(1, min(most, count) + 1), *whole} if place == 0 else some))
        found.extend((passes, width) for passes in itertools.product(*fits))
    return found


def tried_in_turns(
    measured: Measured,
    models: Sequence[int],
    added: float = 0.0,
    stages: Sequence[int] = (1, 1),
    width: int | None = None,
) -> list[Choice]:
    """Every lookahead of draft-then-verify with two models, of a given width such as one verification can read.

    A pass of a model on several stages is a tick of each of them, one after another: nothing else is in its pipe. What
    is `added` comes twice a round.
    """
    draft, target = models
    found = []
    one = stages[0] * measured.costs(draft, 1, stages[0])[-1]
    for lookahead in range(1, max(2, min(width or max(WIDTHS), max(WIDTHS)))):
        run = simulate_rounds(measured.words[[draft, target]], lookahead)
        verification = stages[1] * measured.costs(target, lookahead + 1, stages[1])[-1]
        seconds = (run.drafted * one + run.rounds * (verification + 2 * added)) / run.rounds
        per_round = run.tokens / run.rounds
        found.append(
            Choice(
                models=(draft, target),
                passes=(lookahead,),
                width=min(lookahead + 1, width or lookahead + 1),
                tokens_per_tick=per_round,
                tick_seconds=seconds,
                speedup=per_round * measured.plain / seconds,
                stages=tuple(stages),
            )
        )
    return found


def choose_in_turns(
    measured: Measured,
    *,
    all_models: bool = False,
    stages: Sequence[int] | None = None,
    dispatch: bool = False,
    least: int = 0,
    width: int | None = None,
) -> Choice:
    """The lookahead of draft-then-verify, and the draft, with the least modeled time per token.

    Args:
        measured: from `measure.measure`.
        all_models: whether the draft is given, the one before the target.
        stages: of every model; one each by default, which no more of them would make faster.
        dispatch: whether a round is charged what the dispatch of its programs, and other processes, were measured to
            add.
        least: devices that must be used: every process has to have one.
        width: as for `choose`.
    """
    target = len(measured.seconds) - 1
    added = measured.added if dispatch else 0.0
    stages = (1,) * (target + 1) if stages is None else stages
    drafts = [target - 1] if all_models else range(target)
    return best(
        choice
        for draft in drafts
        for choice in tried_in_turns(measured, (draft, target), added, (stages[draft], stages[target]), width)
        if choice.devices >= least
    )


def agree(choice: Choice | None, models: int) -> Choice:
    """The first process's choice, in every one of them; `models` is the number that it chose among."""
    if choice is None:
        blank = (0,) * models
        choice = given(blank, blank, 0)
    if process_count() == 1:
        return choice
    numbers = [len(choice.models), choice.width, *choice.models, *choice.stages, *choice.passes]
    counts = np.zeros(3 * models + 2, np.int32)
    counts[: len(numbers)] = numbers
    figures = np.asarray((choice.tokens_per_tick, choice.tick_seconds, choice.speedup), np.float32)
    counts, figures = multihost_utils.broadcast_one_to_all((counts, figures))
    used, width, *numbers = (int(number) for number in counts)
    models_used, stages, passes = (tuple(numbers[start : start + used]) for start in (0, used, 2 * used))
    return Choice(models_used, passes[:-1], width, *(float(x) for x in figures), stages=stages)


def labels(words: np.ndarray) -> np.ndarray:
    """Small numbers in place of tokens, equal where those are: the first model from the target down that says them."""
    labels = np.zeros(words.shape, np.int8)
    for model in range(len(words) - 2, -1, -1):
        labels[model] = len(words) - 1 - model
        for larger in range(model + 1, len(words)):
            labels[model] = np.where(words[model] == words[larger], labels[larger], labels[model])
    return labels
