"""Ours: every tick sends the best candidates not yet sent, of any depth.

PipeDec gives up a sibling that lost its place in a level, and sends one level a tick, so one token a tick is its best
case. Here every guess stays a candidate while its parent lives: a place that pruning frees goes to the next best one,
however late, and a batch may hold parents beside their children, so that the root can walk several steps in one tick.
With several draft steps a tick the tree is that many levels deeper before the next batch is chosen.

Where a tick costs more the more rows its widest batch has, only what is worth it is sent and extended. A node that is
needed and not in flight costs a refill, about N ticks; a batch wider than all others makes N ticks longer, until it has
left. So of the W best candidates so many are taken that the sum of their chances exceeds what they add to a tick, in
ticks, by most. Rows up to the widest batch in flight add nothing. The rest waits for a tick in which it is worth more.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pipedec_jax.schedules.base import Schedule
from pipedec_jax.tick_costs import Curve
from pipedec_jax.tree import PredictionTree


@dataclasses.dataclass(frozen=True)
class BestFirstSchedule(Schedule):
    """The W best candidates a tick; with several draft steps, up to `pool` nodes are extended before they are sent."""

    price: Curve | None = None
    """What a tick costs by the rows of its widest batch, in ticks of one row; `None` where that makes no difference."""

    @property
    def level_by_level(self) -> bool:
        """Where a batch is one node."""
        return self.width == 1

    def worthwhile(self, tree: PredictionTree, score: jax.Array) -> jax.Array:
        """The best candidates, as many as are worth their price in one batch, and minus infinity for the others."""
        if self.price is None:
            return score
        best, _ = lax.top_k(score.ravel(), min(self.width, score.size))
        rows = jnp.arange(len(best) + 1, dtype=jnp.int32)
        chance = jnp.pad(jnp.cumsum(jnp.exp(jnp.minimum(best, 0))), (1, 0))
        count = jnp.argmax(chance - self.price.of(jnp.maximum(rows, widest_in_flight(tree))))
        least = jnp.pad(best, (1, 0), constant_values=jnp.inf)[count]
        # What scores infinity, such as a root that waits, must be sent at any price.
        return jnp.where((score >= least) | (score == jnp.inf), score, -jnp.inf)


def widest_in_flight(tree: PredictionTree) -> jax.Array:
    """Living rows of the widest batch in the pipe, at least 1."""
    flying = tree.alive & tree.sent & ~tree.known
    # Nothing flies for longer than there are stages, of which the tree has more places.
    age = jnp.max(tree.sent_tick) - tree.sent_tick
    rows = jnp.zeros(tree.capacity, jnp.int32).at[jnp.where(flying, age, tree.capacity)].add(1, mode="drop")
    return jnp.maximum(jnp.max(rows), 1)
