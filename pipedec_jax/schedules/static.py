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

from pipedec_jax.schedules.base import Schedule, deepest, mask_of_best, take
from pipedec_jax.tree import PredictionTree


@dataclasses.dataclass(frozen=True)
class StaticSchedule(Schedule):
    """A tree of the root and `depth` levels of at most `level` nodes, the best of each by path log-probability.

    `width` must hold them all. The number of draft steps in a tick is the depth.
    """

    level: int = 1

    def capacity(self, stages: int) -> int:
        """One tree, and the next root."""
        return self.width + 1

    def score(self, tree: PredictionTree) -> jax.Array:
        """The nodes that wait, and the best of the deepest level's guesses; nothing while a tree is in flight."""
        score = super().score(tree)
        last = jnp.where(deepest(tree, tree.waiting)[:, None], score[:, 1:], -jnp.inf)
        level = jnp.where(mask_of_best(last.ravel(), self.level).reshape(last.shape), last, -jnp.inf)
        return jnp.where(tree.sent[tree.root], -jnp.inf, jnp.concatenate((score[:, :1], level), axis=1))

    def next_batch(self, tree: PredictionTree) -> tuple[PredictionTree, jax.Array]:
        """The whole tree, in the tick after it was drafted."""
        return take(tree, jnp.where(tree.drafted[tree.root], self.score(tree), -jnp.inf), self.width, tree.sent)

    def frontier(self, tree: PredictionTree) -> tuple[PredictionTree, jax.Array]:
        """The root, then level after level."""
        score = self.score(tree)
        return take(tree, score.at[:, 0].set(jnp.where(tree.drafted, -jnp.inf, score[:, 0])), self.level, tree.drafted)
