"""EESD: draft a chain through the exit path, then verify it; the baseline that PPSD (arXiv 2509.19368) argues against.

The exit head drafts `length` tokens one after another, each once the one before has passed the exit path. Only when
the last of them has left the last stage does the root follow the target's choices: the accepted tokens and one more,
which is the next root. With an exit path of e of N stages a round of k drafts thus takes `k e + N` ticks, however few
of them are accepted; PPSD would have gone on, or turned round, in the meantime.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pipedec_jax.schedules.base import Schedule, deepest
from pipedec_jax.tree import PredictionTree


@dataclasses.dataclass(frozen=True)
class SynchronousSchedule(Schedule):
    """Sends one node a tick, up to `length` levels below the root, then waits for the verdict on all."""

    length: int = 1
    """Draft length (k)."""

    def capacity(self, stages: int) -> int:
        """The chain, the root and the next one."""
        return self.length + 2

    def ready(self, tree: PredictionTree) -> jax.Array:
        """Whether all that was sent has its choice, and nothing waits."""
        return jnp.all(tree.known | ~tree.alive)

    def score(self, tree: PredictionTree) -> jax.Array:
        """What is guessed after the chain's last node, if that is less than `length` below the root."""
        short = tree.position - tree.position[tree.root] < self.length
        last = deepest(tree, tree.alive) & short  # a drafter may guess more than one token: no siblings are sent
        score = super().score(tree)
        return score.at[:, 1:].set(jnp.where(last[:, None], score[:, 1:], -jnp.inf))
