"""PipeDec's schedule (arXiv 2504.04104): one level of the prediction tree a tick.

The algorithm, and where each step of it is:

1. The root is the last committed token. What is in flight is a queue of levels, of nodes of one depth
   (`state.Shared.pipe`). At the start, and after a miss, the level is the root alone (`tree.plant`).
2. In each tick the draft extends the nodes that were just sent, the deepest level, by their most likely children
   (`Schedule.frontier`, `drafting.draft_here`). A child's score is its path's log-probability.
3. The best `width` of that level's children are the next level, which enters the pipe at once (`score` here,
   `Schedule.next_batch`, `tick.send`). What loses its place is not tried again, unless the level that was chosen is
   pruned away whole.
4. Every stage's rows attend to the committed text and their own ancestors (`cache.tree_rows`, `stage.run_stage`).
5. The row of the root leaves the last stage, and the LM head gives the target's token (`stage.run_head`).
6. Hit, where that is a child of the root: the child becomes the root, and its siblings' subtrees are pruned from tree,
   pipe and caches (`tree.advance`). Miss: everything is dropped, and the token is the new root (`tick.walk`).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pipedec_jax.schedules.base import Schedule, deepest
from pipedec_jax.tree import PredictionTree


@dataclasses.dataclass(frozen=True)
class LevelSchedule(Schedule):
    """Maximum width W per level; the maximum number of children per node is the drafter's."""

    @property
    def level_by_level(self) -> bool:
        """A level is sent at once."""
        return True

    def score(self, tree: PredictionTree) -> jax.Array:
        """Only children of the deepest level sent: the last one, or an older one where that was pruned away."""
        level = deepest(tree, tree.alive & tree.sent)
        return jnp.where((level | ~tree.sent)[:, None], super().score(tree), -jnp.inf)
