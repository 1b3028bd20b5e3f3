"""What each method is made of, by its settings: the split of the layers, the schedule and the drafter.

What follows is the same for all of them: a tick (`pipeline.tick`) with R draft steps (`EngineSettings.steps`).

    pp           nothing drafts; the root alone is sent (`schedules.plain`)
    stpp         a draft model, look-up or both; a static tree, drafted first (`schedules.static`)
    pipedec      the same drafters; one level of the tree a tick (`schedules.levels`)
    best-first   the same drafters; the best guesses not yet sent (`schedules.best_first`)
    ppsd         an exit head of the target (`drafters.exit`); levels of one node, PPSD's chain, or of more
    eesd         the same head; a chain, drafted first (`schedules.synchronous`)

`pipedec` and `best-first` take an exit head too. PipeSpec's models do not share a tick: `pipedec_jax.hierarchy`.
"""

from __future__ import annotations

import math

from pipedec_jax.config import LlamaConfig
from pipedec_jax.drafters.base import Drafter, NoDrafter
from pipedec_jax.drafters.combined import CombinedDrafter
from pipedec_jax.drafters.exit import ExitDrafter
from pipedec_jax.drafters.model import ModelDrafter
from pipedec_jax.drafters.ngram import NGramDrafter
from pipedec_jax.model.exit_head import ExitHeadConfig, step_weights
from pipedec_jax.model.parameters import layer_shapes
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.pipeline.split import StageSplit, split_at_exit, split_layers
from pipedec_jax.schedules.base import Schedule
from pipedec_jax.schedules.best_first import BestFirstSchedule
from pipedec_jax.schedules.levels import LevelSchedule
from pipedec_jax.schedules.plain import PlainSchedule
from pipedec_jax.schedules.static import StaticSchedule
from pipedec_jax.schedules.synchronous import SynchronousSchedule
from pipedec_jax.tick_costs import Curve

MOST_LOOKED_UP = 4
"""Guesses for each node that look-up adds to a draft model's: it seldom has more that are any good."""


def make_split(settings: EngineSettings, target: LlamaConfig, head: ExitHeadConfig | None = None) -> StageSplit:
    """The target's layers over the stages; an exit's head counts as part of its stage, but for the vocabulary.

    Raises:
        ValueError: as `split_layers` and `split_at_exit` do.
    """
    if settings.exit_layer is None:
        return split_layers(target.layers, settings.stages)
    weights = step_weights(head, target)["path"] if head else 0
    layer = sum(math.prod(shape) for shape in layer_shapes(target).values())
    return split_at_exit(target.layers, settings.stages, settings.exit_layer, weights / layer, settings.exit_stages)


def make_schedule(settings: EngineSettings) -> Schedule:
    """The method's schedule, or one's own."""
    if settings.schedule is not None:
        return settings.schedule
    width = settings.width
    match settings.method:
        case "pp":
            return PlainSchedule()
        case "stpp":
            spare = -(-settings.depth // settings.stages)
            return StaticSchedule(width=1 + settings.depth * width, level=width, spare=spare)
        case "pipedec" | "ppsd":
            return LevelSchedule(width)
        case "eesd":
            return SynchronousSchedule(width=1, length=settings.draft_length)
        case _:
            pool = settings.pool or 2 * (settings.draft_steps - 1) * width
            return BestFirstSchedule(width, pool, price=batch_price(settings))


def batch_price(settings: EngineSettings) -> Curve | None:
    """What a tick costs by the rows of its widest batch, in ticks of one row; `None` where that makes no difference.

    Rows are the cheaper the more a tick takes in any case: its draft steps, of a row each at least, and what it adds.
    """
    costs = settings.costs
    if not settings.adaptive or len(costs.stage.sizes(settings.width)) == 1:
        return None
    drafting = settings.steps * costs.draft.at(1)
    added = costs.slices(1, None if settings.exit_layer is None else 1) + costs.exchange
    ticks = [max(stage, drafting) + added for stage in costs.stage.cost]
    return Curve(tuple(tick / ticks[1] for tick in ticks))


def make_drafter(
    settings: EngineSettings,
    draft: LlamaConfig | None,
    drafter: Drafter | str,
    vocab_size: int,
    target: LlamaConfig | None = None,
    head: ExitHeadConfig | None = None,
) -> Drafter:
    """Who guesses: the drafter given, or one of `DRAFTERS` by its name. A `head` is one of a `target`."""
    if settings.method == "pp":
        return NoDrafter()
    if isinstance(drafter, Drafter):
        return drafter
    if drafter == "ngram":
        return NGramDrafter(children=settings.children)
    if head is not None:
        assert target is not None
        model = ExitDrafter(
            head=head,
            target=target,
            children=settings.children,
            vocab_size=vocab_size,
            sharpness=settings.sharpness,
            noise=settings.noise,
        )
    else:
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
