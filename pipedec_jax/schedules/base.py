"""The schedule seam: which guesses are kept, which are extended next, and which enter the pipe.

Three words serve all schedules. A *candidate* is a living node of the tree that has not been sent. Its *score* says how
much it is wanted; here that is the log-probability of its path, so no node scores above its parent. A *batch* is the
best `width` candidates, none without its parent.

A schedule is a frozen dataclass of static settings with pure methods. In a tick it first picks the batch to send. Then,
once for every draft step, it picks the `frontier` that the drafter extends, and takes the guesses into the tree
(`grow`). The target's choices prune the tree afterwards.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pipedec_jax import tree as trees
from pipedec_jax.drafters.base import Proposals
from pipedec_jax.tree import PredictionTree, at


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Base of all schedules: sends the best candidates there are, of any depth."""

    width: int
    """Most nodes that a tick sends, and that a draft step extends (W)."""
    pool: int = 0
    """Most candidates kept in the tree from one tick to the next (P)."""

    @property
    def keeps_candidates(self) -> bool:
        """Whether a choice found among the candidates keeps what is known below it, though it costs a refill."""
        return True

    def capacity(self, stages: int) -> int:
        """Places the tree needs (C): what is in flight, the batch being sent, the pool and the root."""
        return (stages + 1) * self.width + self.pool + 1

    def slots(self, stages: int) -> int:
        """Cache slots the tree can take beside the text: here any node may have one."""
        return self.capacity(stages)

    def score(self, tree: PredictionTree) -> jax.Array:
        """`[C]` how much each candidate is wanted; minus infinity for what is none."""
        return jnp.where(tree.waiting, tree.log_prob, -jnp.inf)

    def next_batch(self, tree: PredictionTree) -> jax.Array:
        """The nodes `[W]` to send in this tick, C for none."""
        return trees.closed(tree, best(self.score(tree), self.width), tree.sent)

    def frontier(self, tree: PredictionTree) -> jax.Array:
        """The nodes `[W]` the drafter shall extend, C for none: what was sent first, then the best candidates.

        Whatever is sent is drafted in the same tick, so that the draft's cache has no hole when it is committed.
        """
        wanted = jnp.where(tree.sent, jnp.inf, self.score(tree))
        nodes = best(jnp.where(tree.alive & ~tree.drafted, wanted, -jnp.inf), self.width)
        return trees.closed(tree, nodes, tree.drafted)

    def grow(self, tree: PredictionTree, proposals: Proposals) -> PredictionTree:
        """Take guesses into the tree, keeping the best `pool` candidates of old and new together."""
        old, new = self.score(tree), proposal_scores(tree, proposals)
        kept = mask_of_best(jnp.concatenate((old, new)), self.pool)
        tree = trees.drop(tree, tree.waiting & ~kept[: tree.capacity] & ~is_root(tree))
        return add(tree, proposals, kept[tree.capacity :])


def best(score: jax.Array, size: int) -> jax.Array:
    """Indices `[size]` of the highest scores over minus infinity, best first; the array's length for none."""
    count = min(size, score.shape[0])
    value, index = lax.top_k(score, count)
    index = jnp.where(value > -jnp.inf, index, score.shape[0]).astype(jnp.int32)
    return jnp.pad(index, (0, size - count), constant_values=score.shape[0])


def mask_of_best(score: jax.Array, size: int) -> jax.Array:
    """Which of the scores are the `size` highest."""
    return jnp.zeros(score.shape, bool).at[best(score, size)].set(True, mode="drop")


def is_root(tree: PredictionTree) -> jax.Array:
    """`[C]` bool."""
    return jnp.arange(tree.capacity, dtype=jnp.int32) == tree.root


def proposal_scores(tree: PredictionTree, proposals: Proposals) -> jax.Array:
    """Path log-probability of every guess, `[P * K]`; minus infinity where its parent is none or has it already."""
    parent, token = proposals.parent[:, None], proposals.token
    score = at(tree.log_prob, parent, -jnp.inf) + proposals.log_prob
    here = (tree.parent[None, :] == parent) & tree.alive[None, :]
    has = here[:, None, :] & (tree.token[None, None, :] == token[:, :, None])
    usable = at(tree.alive, parent, False) & ~jnp.any(has, axis=-1)
    return jnp.where(usable, score, -jnp.inf).ravel()


def add(tree: PredictionTree, proposals: Proposals, wanted: jax.Array) -> PredictionTree:
    """Add the wanted guesses, a mask `[P * K]`."""
    K = proposals.token.shape[1]
    grown, _ = trees.add(
        tree,
        parent_M=jnp.repeat(proposals.parent, K),
        token_M=proposals.token.ravel(),
        log_prob_M=proposals.log_prob.ravel(),
        valid_M=wanted,
    )
    return grown
