"""Drafting at an exit (PPSD and EESD, arXiv 2509.19368): how many ticks an answer takes, and what a tick costs.

The exit path has e of N stages. By rates of acceptance, in the long run: `modeled.closed_forms`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from pipedec_jax.modeled.cost import ByRows, Costs, at_rows, pp_token_cost
from pipedec_jax.pipeline.split import StageSplit
from pipedec_jax.tick_costs import Curve, TickCosts


def ppsd_ticks(stages: int, exit_stages: int, hits: int, misses: int) -> int:
    """Ticks of an answer with PPSD's chain: the fill, e for each hit, a refill for each miss.

    A hit is sent once its parent has passed the exit path. Hits and misses are counted after every token but the last,
    so the answer has `hits + misses + 1` tokens.
    """
    return stages + exit_stages * hits + stages * misses


@dataclasses.dataclass(frozen=True)
class Cycle:
    """The longest stage of a target with an exit, which is how long a tick lasts."""

    stage: int
    """Which one it is, from 1."""
    layers: float
    """Its work in layers of the target, the exit head included where it is the exit's stage, but for its vocabulary."""
    head: float
    """The exit head's own work in layers, without its product with the vocabulary."""
    vocabulary: float
    """That product in layers, of which each device has an equal part; 0 where it is a part of the target's head's."""


def cycle(costs: Costs, split: StageSplit, rows: int = 1) -> Cycle:
    """The longest stage by these costs, where the widest batch has so many rows."""
    layer = at_rows(costs.layer, rows)
    head = at_rows(costs.exit_head, rows) / layer
    work = [count + head * (k + 1 == split.exit) for k, count in enumerate(split.count)]
    vocabulary = at_rows(costs.exit_vocabulary or 0.0, rows) / layer
    return Cycle(stage=work.index(max(work)) + 1, layers=max(work), head=head, vocabulary=vocabulary)


def exit_tick_costs(costs: Costs, split: StageSplit, width: int) -> TickCosts:
    """What a tick costs by the rows in it, up to `width`.

    A tick lasts as long as its longest stage, the exit head included; slices of its vocabulary and of the target's own
    head, and the exchange, come after it.
    """
    rows = range(1, width + 1)

    def slices(cost: ByRows, rows: Iterable[int]) -> Curve:
        return Curve((0.0, *(at_rows(cost, count) / split.stages for count in rows)))

    own = costs.exit_vocabulary
    return TickCosts(
        stage=Curve((0.0, *(cycle(costs, split, count).layers * at_rows(costs.layer, count) for count in rows))),
        head=slices(costs.head, rows if own is not None else range(1, 2 * width + 1)),
        exit_vocabulary=None if own is None else slices(own, rows),
        exchange=costs.exchange,
    )


def eesd_tick_costs(costs: Costs, split: StageSplit, length: int) -> TickCosts:
    """Mean cost of a tick of EESD: a draft costs the exit path alone, a verdict all stages, and nothing overlaps.

    A verdict on a whole chain costs what one on a token does: the weights are read once.
    """
    path = sum(split.count[: split.exit]) * at_rows(costs.layer, 1) + at_rows(costs.exit_head, 1)
    vocabulary = at_rows(costs.head if costs.exit_vocabulary is None else costs.exit_vocabulary, 1) / split.stages
    drafting = length * (path + vocabulary + split.exit * costs.exchange)
    verdict = pp_token_cost(costs, sum(split.count), split.stages)
    return TickCosts(Curve(((drafting + verdict) / (length * split.exit + split.stages),)))
