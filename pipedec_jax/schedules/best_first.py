"""Ours: every tick sends the best candidates not yet sent, of any depth.

PipeDec's level gives up a sibling that lost its place, and sends one level a tick, so one token a tick is its best
case. Here every guess stays a candidate while its parent lives: a place that pruning frees goes to the next best one,
however late, and a batch may hold parents beside their children, so that the root can walk several steps in one tick.
With several draft steps a tick the tree is that many levels deeper before the next batch is chosen.

Where a tick costs more the more rows its batches have, only what is worth it is sent: of the W best candidates so many
that their chances to be needed, each worth the ticks that a refill would cost, exceed the batch's own cost by most.
The rest stays, for a tick in which it is worth more.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pipedec_jax.schedules.base import Schedule, take
from pipedec_jax.tick_costs import FLAT, TickCosts
from pipedec_jax.tree import PredictionTree


@dataclasses.dataclass(frozen=True)
class BestFirstSchedule(Schedule):
    """The W best candidates a tick; with several draft steps, up to `pool` nodes are extended before they are sent."""

    costs: TickCosts = FLAT
    """What a tick costs by the rows of its widest batch."""
    gain: float = 0.0
    """Ticks of one row that a node saves which is in flight when it is needed."""

    def next_batch(self, tree: PredictionTree) -> tuple[PredictionTree, jax.Array]:
        """The best candidates, as many as are worth their cost."""
        score = self.score(tree)
        if len(self.costs.sizes(self.width)) > 1:
            score = jnp.where(score >= self.least_worth_sending(score), score, -jnp.inf)
        return take(tree, score, self.width, tree.sent)

    def least_worth_sending(self, score: jax.Array) -> jax.Array:
        """The score of the last of the best candidates that shall be sent; plus infinity for none."""
        best, _ = lax.top_k(score.ravel(), min(self.width, score.size))
        rows = jnp.arange(len(best) + 1, dtype=jnp.int32)
        chance = jnp.pad(jnp.cumsum(jnp.exp(jnp.minimum(best, 0))), (1, 0))
        count = jnp.argmax(self.gain * self.costs.of(rows[1]) * chance - self.costs.of(rows))
        # A root that waits scores infinity, and nothing goes on without it.
        count = jnp.maximum(count, (best[0] == jnp.inf).astype(count.dtype))
        return jnp.pad(best, (1, 0), constant_values=jnp.inf)[count]
