"""The schedule seam: which guesses enter the pipe, and which the drafter extends next.

Three words serve all schedules. A *candidate* is what could be sent: a node of the tree that has not been, or one of
the drafter's guesses that is no node yet. Its *score* says how much it is wanted; here that is the log-probability of
its path, so none scores above its parent. A *batch* is the best `width` candidates, none without its parent.

A schedule is a frozen dataclass of static settings with pure methods. In a tick it first picks the batch to send. Then,
once for every draft step, it picks the `frontier`, the nodes that the drafter extends; the guesses are kept with them.
The target's choices prune the tree afterwards.

One of your own often is another `score`; it never changes a token of the answer, only how soon it comes:

    @dataclasses.dataclass(frozen=True)
    class DeepestFirst(Schedule):
        def score(self, tree):
            deep = tree.position[:, None].astype(jnp.float32)
            return super().score(tree) + 0.5 * deep

Give it as `Decoder(target, draft, schedule=DeepestFirst(width=16))`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pipedec_jax import tree as trees
from pipedec_jax.tree import PredictionTree


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Base of all schedules: sends the best candidates there are, of any depth."""

    width: int
    """Most nodes that a tick sends, and that a draft step extends (W)."""
    pool: int = 0
    """Most nodes that are extended before they are sent (P): none, or at least W."""

    def capacity(self, stages: int) -> int:
        """Places the tree needs (C): what is in flight, the batch being sent, the pool and the root."""
        return (stages + 1) * self.width + self.pool + 1

    @property
    def drafts_ahead(self) -> bool:
        """Whether the frontier may hold nodes that were not sent."""
        return self.pool > 0

    @property
    def level_by_level(self) -> bool:
        """Whether the root moves once a tick at most: no batch holds a node and its parent, nor is it held back."""
        return False

    def ready(self, tree: PredictionTree) -> jax.Array:
        """`[]` bool: whether the root may follow the target's choices at the end of this tick; here, at any."""
        return jnp.ones((), bool)

    def score(self, tree: PredictionTree) -> jax.Array:
        """`[C, 1 + K]` how much candidates are wanted: every node, then its guesses; minus infinity for none."""
        wanted = jnp.where(is_root(tree), jnp.inf, tree.log_prob)  # nothing goes on without the root
        node = jnp.where(tree.waiting, wanted, -jnp.inf)
        return jnp.concatenate((node[:, None], trees.open_guesses(tree)), axis=1)

    def worthwhile(self, tree: PredictionTree, score: jax.Array) -> jax.Array:
        """The scores of the candidates that are worth a place in a batch, here all; minus infinity for others."""
        return score

    def next_batch(self, tree: PredictionTree) -> tuple[PredictionTree, jax.Array]:
        """The nodes `[W]` to send in this tick, C for none, in a tree where they are nodes."""
        return take(tree, self.worthwhile(tree, self.score(tree)), self.width, tree.sent)

    def frontier(self, tree: PredictionTree, step: int = 0) -> tuple[PredictionTree, jax.Array]:
        """The nodes `[W]` the drafter shall extend, C for none: what was sent first, then the best candidates.

        Whatever is sent is drafted in the same tick, so that the draft's cache has no hole when it is committed.

        Args:
            tree: the tree.
            step: which of the tick's draft steps it is, from 0.
        """
        sent = tree.alive & tree.sent & ~tree.drafted
        if not self.pool:
            return tree, trees.select(sent, self.width)
        # Room for the new ones: what is dropped stays as a guess of its parent.
        waiting = tree.waiting & ~is_root(tree)
        kept = mask_of_best(jnp.where(waiting, tree.log_prob, -jnp.inf), self.pool - self.width)
        tree = trees.drop(tree, waiting & ~kept)
        score = self.worthwhile(tree, self.score(tree))
        node = jnp.where(tree.drafted, -jnp.inf, jnp.where(sent, jnp.inf, score[:, 0]))
        return take(tree, score.at[:, 0].set(node), self.width, tree.drafted)


def check_schedule(schedule: Schedule, stages: int) -> None:
    """Raise `ValueError` unless a schedule has sizes that go together.

    Args:
        schedule: that of one's own.
        stages: of the pipe that it shall fill.
    """
    name = type(schedule).__name__
    try:
        hash(schedule)
    except TypeError as error:
        raise ValueError(
            f"{name} must be a frozen dataclass of static settings, which can be hashed ({error})"
        ) from None
    for field, value, least in (
        ("width", schedule.width, 1),
        ("pool", schedule.pool, 0),
        (f"capacity({stages})", schedule.capacity(stages), schedule.width + 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name}.{field} must be a whole number of at least {least}, not {value!r}")
    if 0 < schedule.pool < schedule.width:
        raise ValueError(f"{name}.pool ({schedule.pool}) must be 0, or hold a batch: width is {schedule.width}")


Chosen = tuple[PredictionTree, jax.Array]
"""What `next_batch` and `frontier` give: the tree, and nodes of it."""


def check_chosen(schedule: Schedule, method: str, tree: PredictionTree, found: Chosen) -> Chosen:
    """What a `method` has given for a tree; `ValueError` unless it is a tree like that one, and nodes of it.

    A batch is W nodes, a frontier at most as many.
    """
    name = f"{type(schedule).__name__}.{method}()"
    if not isinstance(found, tuple) or len(found) != 2:
        raise ValueError(f"{name} must give two things, the tree and nodes, not {type(found).__name__}")
    grown, node = found
    if jax.tree.map(jnp.shape, grown) != jax.tree.map(jnp.shape, tree):
        raise ValueError(f"{name} must give a tree of such arrays as it took")
    an_array = isinstance(node, jax.Array)
    sizes = (schedule.width,) if method == "next_batch" else range(1, schedule.width + 1)
    fits = an_array and node.ndim == 1 and node.size in sizes
    if not fits or not jnp.issubdtype(node.dtype, jnp.integer):
        what = f"{node.dtype} {list(node.shape)}" if an_array else type(node).__name__
        raise ValueError(f"{name} must give nodes as whole numbers [{schedule.width}] (its width), not {what}")
    return grown, node


def take(tree: PredictionTree, score: jax.Array, size: int, ready: jax.Array) -> tuple[PredictionTree, jax.Array]:
    """The best `size` candidates by a score `[C, 1 + K]`, none without its parent, as nodes of the tree.

    A parent is ready (a mask `[C]`) or comes along. Indices are best first, C for none.
    """
    C, columns = score.shape
    index = best(score.ravel(), size)
    node, column = index // columns, index % columns
    guessed = (column > 0) & (node < C)
    along = trees.mark(tree, jnp.where(guessed, C, node))
    node = trees.closed(tree, node, ready | along)
    tree, new = trees.add(tree, jnp.where(guessed, node, C), jnp.maximum(column - 1, 0))
    return tree, jnp.where(guessed, new, node)


def best(score: jax.Array, size: int) -> jax.Array:
    """Indices `[size]` of the highest scores over minus infinity, best first; the array's length for none."""
    count = min(size, score.shape[0])
    value, index = lax.top_k(score, count)
    index = jnp.where(value > -jnp.inf, index, score.shape[0]).astype(jnp.int32)
    return jnp.pad(index, (0, size - count), constant_values=score.shape[0])


def mask_of_best(score: jax.Array, size: int) -> jax.Array:
    """Which of the scores `[M]` are the `size` highest."""
    return jnp.zeros(score.shape, bool).at[best(score, size)].set(True, mode="drop")


def is_root(tree: PredictionTree) -> jax.Array:
    """`[C]` bool."""
    return jnp.arange(tree.capacity, dtype=jnp.int32) == tree.root


def deepest(tree: PredictionTree, mask: jax.Array) -> jax.Array:
    """`[C]` bool: which nodes of a mask lie on the deepest level that has any."""
    return mask & (tree.position == jnp.max(jnp.where(mask, tree.position, -1)))
