"""Ours: every tick sends the best candidates not yet sent, of any depth.

PipeDec's level gives up a sibling that lost its place, and sends one level a tick, so one token a tick is its best
case. Here every guess stays a candidate while its parent lives: a place that pruning frees goes to the next best one,
however late, and a batch may hold parents beside their children, so that the root can walk several steps in one tick.
With several draft steps a tick the tree is that many levels deeper before the next batch is chosen.

The rules are the base schedule's own.
"""

from __future__ import annotations

import dataclasses

from pipedec_jax.schedules.base import Schedule


@dataclasses.dataclass(frozen=True)
class BestFirstSchedule(Schedule):
    """The W best candidates a tick; with several draft steps, up to `pool` nodes are extended before they are sent."""
