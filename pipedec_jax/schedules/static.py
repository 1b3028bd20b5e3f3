"""STPP: one static tree at a time through the pipe, the baseline that PipeDec (arXiv 2504.04104) compares itself with.

While the pipe is empty, the draft extends the root, then for `depth - 1` levels the best `level` guesses of the last
one, all in one tick of as many draft steps. The best of all guesses made, of any depth, are the tree (as EAGLE-2, arXiv
2406.16858, chooses its own): a stronger tree than the best of each level. It goes through the stages as one batch,
alone. The longest path along the target's choices is accepted, with the target's own token after it as the next root,
and the next tree is drafted.

An answer of r trees thus takes `r (N + 1)` ticks, one in N + 1 of them for drafting. Sent nodes that were not extended
go through the draft while the tree is in flight, over all of its N ticks, so that none of these gets longer for it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pipedec_jax import tree as trees
from pipedec_jax.schedules.base import Schedule, deepest, is_root, take
from pipedec_jax.tree import PredictionTree


@dataclasses.dataclass(frozen=True)
class StaticSchedule(Schedule):
    """A tree of `width` nodes, the root among them. The number of draft steps in a tick is the depth."""

    level: int = 1
    """Most nodes that a draft step extends; `width` is at most this times the depth, and the root."""
    spare: int = 1
    """Draft steps of a tick while a tree is in flight: N times so many are at least the depth."""

    def capacity(self, stages: int) -> int:
        """The nodes sent, those that were extended in vain, and the next root."""
        return 2 * self.width + 1

    @property
    def drafts_ahead(self) -> bool:
        """It drafts a whole tree before it sends any of it."""
        return True

    def score(self, tree: PredictionTree) -> jax.Array:
        """All that was guessed; nothing while a tree is in flight."""
        return jnp.where(tree.sent[tree.root], -jnp.inf, super().score(tree))

    def next_batch(self, tree: PredictionTree) -> tuple[PredictionTree, jax.Array]:
        """The best of it, in the tick after it was drafted; the rest goes."""
        score = jnp.where(tree.drafted[tree.root], self.score(tree), -jnp.inf)
        tree, batch = take(tree, score, self.width, tree.sent)
        return trees.drop(tree, tree.waiting & ~trees.mark(tree, batch) & ~is_root(tree)), batch

    def frontier(self, tree: PredictionTree, step: int = 0) -> tuple[PredictionTree, jax.Array]:
        """The root, then the best guesses of the level before; what has not been extended, once it is in flight.

        Nothing comes of that last, but where such a node is accepted, the draft must have it in its context.
        """
        score = self.score(tree)
        guess = jnp.where(deepest(tree, tree.waiting)[:, None], score[:, 1:], -jnp.inf)
        late = jnp.where(tree.alive & tree.sent, jnp.inf, score[:, 0]) if step < self.spare else score[:, 0]
        node = jnp.where(tree.drafted, -jnp.inf, late)
        return take(tree, jnp.concatenate((node[:, None], guess), axis=1), self.level, tree.drafted)
