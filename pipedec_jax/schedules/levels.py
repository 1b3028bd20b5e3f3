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
from jax import lax

from pipedec_jax.drafters.base import Proposals
from pipedec_jax.schedules.base import Schedule
from pipedec_jax.tree import PredictionTree, add, at, select


@dataclasses.dataclass(frozen=True)
class LevelSchedule(Schedule):
    """Maximum width W per level; the maximum number of children per node is the drafter's."""

    def frontier(self, tree: PredictionTree) -> jax.Array:
        """The living nodes of the deepest level: the one just sent, or an older one where that was pruned away."""
        deepest = jnp.max(jnp.where(tree.alive, tree.position, -1))
        return select(tree.alive & (tree.position == deepest), self.width)

    def grow(self, tree: PredictionTree, proposals: Proposals) -> PredictionTree:
        """Make the best `width` guesses, by path log-probability, the next level."""
        score = at(tree.log_prob, proposals.parent, 0.0)[:, None] + proposals.log_prob
        score = jnp.where(at(tree.alive, proposals.parent, False)[:, None], score, -jnp.inf)
        best, index = lax.top_k(score.ravel(), min(self.width, score.size))
        children = score.shape[1]
        tree, _ = add(
            tree,
            parent_M=proposals.parent[index // children],
            token_M=proposals.token.ravel()[index],
            log_prob_M=proposals.log_prob.ravel()[index],
            valid_M=best > -jnp.inf,
        )
        return tree
