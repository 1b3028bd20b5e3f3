"""PipeDec's schedule (arXiv 2504.04104): one level of the prediction tree a tick.

Each tick the draft extends the living nodes of the deepest level by their most likely children. A child's score is
its path's log-probability; the best `width` of the whole level become the next level, which is sent at once. What
loses its place is not tried again. When the target's choice is a child of the root, that child becomes the root and
its siblings' subtrees are pruned; otherwise the choice alone is sent, and the pipe refills.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pipedec_jax import tree as trees
from pipedec_jax.drafters.base import Proposals
from pipedec_jax.schedules.base import Schedule, add, is_root, proposal_scores
from pipedec_jax.tree import PredictionTree, select


@dataclasses.dataclass(frozen=True)
class LevelSchedule(Schedule):
    """Maximum width W per level; the maximum number of children per node is the drafter's.

    `pool` must hold all children of a level, W times the children of a node: the level is chosen among those whose
    parents the target's choices left alive.
    """

    @property
    def keeps_candidates(self) -> bool:
        """What was not sent is forgotten."""
        return False

    def slots(self, stages: int) -> int:
        """Nothing is drafted before it is sent."""
        return (stages + 1) * self.width + 1

    def frontier(self, tree: PredictionTree) -> jax.Array:
        """The living nodes of the deepest level sent: the last one, or an older one where that was pruned away."""
        sent = tree.alive & tree.sent
        deepest = jnp.max(jnp.where(sent, tree.position, -1))
        return select(sent & (tree.position == deepest), self.width)

    def grow(self, tree: PredictionTree, proposals: Proposals) -> PredictionTree:
        """Make the guesses the only candidates: the best of them that survive are the next level."""
        tree = trees.drop(tree, tree.waiting & ~is_root(tree))
        return add(tree, proposals, proposal_scores(tree, proposals) > -jnp.inf)
