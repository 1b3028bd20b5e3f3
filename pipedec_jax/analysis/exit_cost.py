"""Drafting at an exit: the closed forms of PPSD and EESD (arXiv 2509.19368) in ticks and layers, and what a tick costs.

An exit path of e of N stages (E of L layers) guesses the next token; a is the rate at which the target accepts it.

    PPSD    a e + (1 - a) N ticks a token: a hit is sent once its parent has passed the exit path, a miss refills the
            pipe. For equal stages its speedup over plain decoding is L / (a E + (1 - a) L): at least 1 at any rate.
    EESD    k e + N ticks a round of k drafts, which gives 1 + a + .. + a^k tokens: more ticks a token than N where
            few drafts are accepted.
"""

from __future__ import annotations

import dataclasses

from pipedec_jax.analysis.cost import Costs, pp_token_cost
from pipedec_jax.pipeline.split import StageSplit


def ppsd_ticks(stages: int, exit_stages: int, hits: int, misses: int) -> int:
    """Ticks of an answer with a chain: the fill, e for each hit, a refill for each miss.

    Hits and misses are counted after every token but the last, so the answer has `hits + misses + 1` tokens.
    """
    return stages + exit_stages * hits + stages * misses


def ppsd_ticks_per_token(rate: float, stages: int, exit_stages: int) -> float:
    """Limit of that for long answers."""
    return rate * exit_stages + (1 - rate) * stages


def ppsd_speedup(rate: float, layers: int, exit_layer: int) -> float:
    """PPSD's speedup over plain decoding in layers, for equal stages and a head that costs nothing."""
    return layers / (rate * exit_layer + (1 - rate) * layers)


def eesd_ticks_per_token(rate: float, stages: int, exit_stages: int, length: int) -> float:
    """Ticks of a round of `length` drafts over the tokens that it gives on average."""
    return (length * exit_stages + stages) / sum(rate**k for k in range(length + 1))


@dataclasses.dataclass(frozen=True)
class Cycle:
    """The longest stage of a target with an exit, which is how long a tick lasts."""

    stage: int
    """Which one it is, from 1."""
    layers: float
    """Its work in layers of the target, the exit head included where it is the exit's stage."""
    head: float
    """The exit head's own work in layers, its product with the vocabulary included."""


def cycle(costs: Costs, split: StageSplit) -> Cycle:
    """The longest stage by these costs."""
    head = costs.exit_head / costs.layer
    work = [count + head * (k + 1 == split.exit) for k, count in enumerate(split.count)]
    return Cycle(stage=work.index(max(work)) + 1, layers=max(work), head=head)


def exit_tick_cost(costs: Costs, split: StageSplit) -> float:
    """Cost of a tick: the longest stage with the exit head, a slice of the target's own head, and the exchange."""
    return cycle(costs, split).layers * costs.layer + costs.head / split.stages + costs.exchange


def eesd_tick_cost(costs: Costs, split: StageSplit, length: int) -> float:
    """Mean cost of a tick of EESD: a draft costs the exit path alone, the verification all stages, nothing overlaps.

    A verdict on a whole chain costs what one on a token does: the weights are read once.
    """
    path = sum(split.count[: split.exit]) * costs.layer + costs.exit_head + split.exit * costs.exchange
    verdict = pp_token_cost(costs, sum(split.count), split.stages)
    return (length * path + verdict) / (length * split.exit + split.stages)


def exit_speedup_vs_pp(costs: Costs, split: StageSplit, ticks_per_token: float, length: int | None = None) -> float:
    """How many times faster than PP on as many stages, evenly split; of EESD where a draft `length` is given."""
    if not ticks_per_token > 0:
        raise ValueError(f"ticks_per_token must be over 0, not {ticks_per_token!r}")
    tick = exit_tick_cost(costs, split) if length is None else eesd_tick_cost(costs, split, length)
    return pp_token_cost(costs, sum(split.count), split.stages) / (tick * ticks_per_token)
