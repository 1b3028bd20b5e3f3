"""STPP: one static tree at a time through the pipe, the baseline that PipeDec (arXiv 2504.04104) compares itself with.

While the pipe is empty, the draft grows a tree of `depth` levels of at most `level` nodes under the root, in one tick
of as many draft steps. Then the whole tree goes through the stages as one batch, alone. The longest path along the
target's choices is accepted, with the target's own token after it as the next root, and the next tree is drafted.

An answer of r trees thus takes `r (N + 1)` ticks, one in N + 1 of them for drafting.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pipedec_jax.drafters.base import Proposals
from pipedec_jax.schedules.base import Schedule, add, best, mask_of_best, proposal_scores
from pipedec_jax.tree import PredictionTree


@dataclasses.dataclass(frozen=True)
class StaticSchedule(Schedule):
    """A tree of the root and `depth` levels of at most `level` nodes, the best of each by path log-probability.

    `width` must hold them all. The number of draft steps in a tick is the depth.
    """

    level: int = 1

    @property
    def keeps_candidates(self) -> bool:
        """There are none while the target's choices come in: the whole tree was sent."""
        return False

    def capacity(self, stages: int) -> int:
        """One tree, and the next root."""
        return self.width + 1

    def next_batch(self, tree: PredictionTree) -> jax.Array:
        """The whole tree, in the tick after it was drafted."""
        return jnp.where(tree.drafted[tree.root], super().next_batch(tree), tree.capacity)

    def frontier(self, tree: PredictionTree) -> jax.Array:
        """The level grown last; nothing while a tree is in flight."""
        drafting = ~tree.sent[tree.root]
        return best(jnp.where(drafting & ~tree.drafted, self.score(tree), -jnp.inf), self.level)

    def grow(self, tree: PredictionTree, proposals: Proposals) -> PredictionTree:
        """Add the best of the guesses as the next level."""
        return add(tree, proposals, mask_of_best(proposal_scores(tree, proposals), self.level))
