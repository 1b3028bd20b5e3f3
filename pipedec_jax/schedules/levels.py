"""PipeDec's schedule (arXiv 2504.04104): one level of the prediction tree a tick.

Each tick the draft extends the nodes that were just sent by their most likely children. A child's score is its path's
log-probability; the best `width` of the children of the deepest level become the next level, which is sent at once.
What loses its place is not tried again. When the target's choice is a child of the root, that child becomes the root
and its siblings' subtrees are pruned; otherwise the choice alone is sent, and the pipe refills.
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
