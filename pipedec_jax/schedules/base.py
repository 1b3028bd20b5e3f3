"""The schedule seam: which guesses join the tree, which are extended next, and which enter the pipe.

A schedule is a frozen dataclass of static settings with pure methods. A tick sends `next_batch`, lets the drafter
extend `frontier`, and, once the target's choices have pruned the tree, lets the schedule `grow` it.
"""

from __future__ import annotations

import dataclasses

import jax

from pipedec_jax.drafters.base import Proposals
from pipedec_jax.tree import PredictionTree, select


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Base of all schedules: sends what waits in the tree, and grows nothing."""

    width: int
    """Nodes a tick can send and the drafter can extend (W)."""

    def capacity(self, stages: int) -> int:
        """Places the tree needs (C) for this many stages."""
        return (stages + 2) * self.width + 1

    def next_batch(self, tree: PredictionTree) -> jax.Array:
        """The nodes `[W]` to send in this tick, C for none. A node may only be sent with or after its parent."""
        return select(tree.waiting, self.width)

    def frontier(self, tree: PredictionTree) -> jax.Array:
        """The sent nodes `[W]` the drafter shall extend in this tick, C for none."""
        return select(tree.alive & False, self.width)

    def grow(self, tree: PredictionTree, proposals: Proposals) -> PredictionTree:
        """Add guesses to the tree."""
        return tree
