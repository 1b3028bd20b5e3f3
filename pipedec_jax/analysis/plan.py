"""Which method, stages and width to choose for a target, a draft and so many devices: predictions, nothing measured.

A prediction takes the parts' seconds (a calibration, or a device's bandwidth and operations), the links' latency and
bandwidth, and ticks per token from a hit curve. Rows of a batch are charged in full, alive or not, and nothing in a
tick overlaps with its exchange. Beside this engine's methods stand what the same devices could do instead
(`pipedec_jax.analysis.plan_alternatives`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from pipedec_jax.analysis.device_memory import engine_bytes
from pipedec_jax.analysis.hit_curve import Setting, lines_at
from pipedec_jax.analysis.links import all_reduce_seconds, exchange_seconds
from pipedec_jax.analysis.plan_alternatives import alternative_predictions
from pipedec_jax.analysis.prediction import (
    Prediction,
    Problem,
    batch_rows,
    costs_with_cache,
    engine_settings,
    rows_cost,
    tick_seconds,
    useful_stages,
    with_exit_head,
)
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.exit_head import ExitHeadConfig
from pipedec_jax.model.tensor_parallel import divides, tensor_share
from pipedec_jax.modeled.closed_forms import ppsd_ticks_per_token
from pipedec_jax.modeled.cost import pp_token_cost
from pipedec_jax.modeled.exit_cost import exit_tick_costs
from pipedec_jax.pipeline.fit import MOST_PLACES, cache_slots, tree_slots
from pipedec_jax.pipeline.methods import make_split
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.pipeline.split import split_layers


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that was predicted, and what follows."""

    methods: tuple[Prediction, ...]
    """Of this engine: the quickest setting of every method and drafter, of those that fit if any does."""
    alternatives: tuple[Prediction, ...]
    """What the same devices can do without this engine: the quickest of each kind."""
    chosen: Prediction | None
    """The quickest of `methods` that does not fail to fit."""
    best_alternative: Prediction | None
    """The quickest of `alternatives` that does not."""
    needed_hit_rate: float | None
    """Hit rate at which PipeDec, as in `methods`, would equal that; over 1 where none does, `None` without it."""


def make_plan(problem: Problem) -> Plan:
    """Predict everything and choose."""
    methods = _best_of_each(engine_predictions(problem))
    alternatives = _best_of_each(alternative_predictions(problem))
    best = _quickest(alternatives)
    pipedec = next((found for found in methods if found.method == "pipedec"), None)
    return Plan(
        methods=methods,
        alternatives=alternatives,
        chosen=_quickest(methods),
        best_alternative=best,
        needed_hit_rate=needed_hit_rate(pipedec, best.seconds) if pipedec and best else None,
    )


def engine_predictions(problem: Problem) -> Iterator[Prediction]:
    """Every setting of this engine's methods: PP on all devices, others on as many stages as may be quickest.

    Those with a draft model also with each stage split over several devices, and as many for the draft.
    """
    target, draft, devices = problem.target, problem.draft, problem.devices
    yield _pp(problem, min(devices, target.layers))
    for tensor in range(1, devices // 2 + 1):
        if draft is None or not divides(target, tensor):
            continue
        for stages in useful_stages(target.layers, devices // tensor - 1):
            for setting, ticks, over in lines_at(problem.curve, stages):
                settings = engine_settings(setting, stages, problem.dtype, tensor)
                if tree_slots(settings) <= MOST_PLACES:
                    yield _drafted(problem, draft, setting, settings, ticks, over)
    for share, rate in problem.curve.exits.items():
        exit_layer = round(share * target.layers)
        for stages in useful_stages(target.layers, devices):
            if stages > 1 and 0 < exit_layer < target.layers:
                yield _ppsd(problem, stages, exit_layer, rate)


def _pp(problem: Problem, stages: int) -> Prediction:
    target = problem.target
    settings = EngineSettings(method="pp", stages=stages, dtype=problem.dtype)
    costs = costs_with_cache(problem, cache_slots(settings, problem.context))
    links = exchange_seconds(problem.link, stages, 1, target.width, problem.item_bytes)
    seconds = pp_token_cost(dataclasses.replace(costs, exchange=costs.exchange + links), target.layers, stages)
    held = engine_bytes(settings, target, None, problem.context)
    return Prediction(
        method="pp",
        ours=True,
        devices=stages,
        stages=stages,
        tensor=1,
        seconds=seconds,
        memory=held,
        fits=problem.fits(held),
        ticks=float(stages),
        tick_seconds=seconds / stages,
    )


def _drafted(
    problem: Problem, draft: LlamaConfig, setting: Setting, settings: EngineSettings, ticks: float, beyond: bool
) -> Prediction:
    target, stages, tensor = problem.target, settings.stages, settings.tensor_parallel
    costs = costs_with_cache(problem, cache_slots(settings, problem.context))
    rows = batch_rows(setting)
    layer = rows_cost(costs.layer, rows) * tensor_share(target, tensor)
    layer += 2 * all_reduce_seconds(problem.link, rows * target.width * problem.item_bytes, tensor)
    stage = split_layers(target.layers, stages).longest * layer
    devices = (stages + 1) * tensor
    step = rows_cost(costs.draft, setting.width)
    tick = tick_seconds(problem, setting, stages, devices, stage, rows_cost(costs.draft, 1), step)
    held = engine_bytes(settings, problem.target, draft, problem.context)
    return Prediction(
        method=setting.method,
        ours=True,
        devices=devices,
        stages=stages,
        tensor=tensor,
        seconds=ticks * tick,
        memory=held,
        fits=problem.fits(held),
        ticks=ticks,
        tick_seconds=tick,
        drafter=setting.drafter,
        width=setting.width,
        children=setting.children,
        draft_steps=setting.draft_steps,
        beyond=beyond,
    )


def _ppsd(problem: Problem, stages: int, exit_layer: int, rate: float) -> Prediction:
    target = problem.target
    head = ExitHeadConfig(exit_layer=exit_layer, variant=problem.exit_head)
    settings = EngineSettings(
        method="ppsd", stages=stages, width=1, children=1, exit_layer=exit_layer, dtype=problem.dtype
    )
    split = make_split(settings, target, head)
    costs = costs_with_cache(problem, cache_slots(settings, problem.context))
    costs = with_exit_head(costs, head, target)
    links = exchange_seconds(problem.link, stages, 1, target.width, problem.item_bytes, guesses=1)
    parts = exit_tick_costs(costs, split, 1)
    tick = parts.stage.at(1) + parts.slices(1, 1) + costs.exchange + links
    ticks = float(ppsd_ticks_per_token(rate, split.exit, stages))
    held = engine_bytes(settings, target, None, problem.context, head)
    return Prediction(
        method="ppsd",
        ours=True,
        devices=stages,
        stages=stages,
        tensor=1,
        seconds=ticks * tick,
        memory=held,
        fits=problem.fits(held),
        ticks=ticks,
        tick_seconds=tick,
        drafter="exit head",
        children=1,
        draft_steps=1,
        exit_layer=exit_layer,
    )


def needed_hit_rate(pipedec: Prediction, seconds: float) -> float | None:
    """The hit rate at which PipeDec's tick would give a token in so many seconds: `h + (1 - h) n` ticks.

    Over 1 where no hit rate does; 0 where any does; `None` where one stage has nothing in flight to hit.
    """
    if pipedec.stages == 1 or pipedec.tick_seconds is None:
        return None
    ticks = seconds / pipedec.tick_seconds
    return max(0.0, (pipedec.stages - ticks) / (pipedec.stages - 1))


def _order(prediction: Prediction) -> tuple[bool, float]:
    """What fits first, or is not known not to; of that the quickest, otherwise the one that lacks least."""
    lacks = prediction.fits is False
    return lacks, prediction.bytes if lacks else prediction.seconds


def _best_of_each(predictions: Iterable[Prediction]) -> tuple[Prediction, ...]:
    best: dict[tuple[str, str, bool], Prediction] = {}
    for found in predictions:
        kind = (found.method, found.drafter, found.tensor > 1)
        if kind not in best or _order(found) < _order(best[kind]):
            best[kind] = found
    return tuple(best.values())


def _quickest(predictions: Iterable[Prediction]) -> Prediction | None:
    fitting = [found for found in predictions if found.fits is not False]
    return min(fitting, key=lambda found: found.seconds, default=None)
