"""A drafter that replays a known continuation with a chosen hit rate.

It needs no model, so it checks the formulas of the papers at any hit rate and times any model shape without trained
weights. The continuation usually is what plain decoding gave for the same prompt.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from pipedec_jax.drafters.base import Drafter, Proposals, View
from pipedec_jax.tree import at


class Replay(struct.PyTreeNode):
    """The drafter's parameters (the same on every rank)."""

    token: jax.Array
    """[T] int32: prompt and continuation by absolute position."""
    right: jax.Array
    """[T] bool: at which positions the guess shall be right."""


@dataclasses.dataclass(frozen=True)
class ReplayDrafter(Drafter):
    """Proposes `children` tokens per node, the first of them right where `Replay.right` says so."""

    children: int
    vocab_size: int

    def propose(self, params: Replay, state: Any, view: View) -> tuple[Any, Proposals]:
        """Guesses for the frontier: the known token (or the one after it, a wrong guess), then other wrong ones."""
        position = at(view.tree.position, view.frontier, 0) + 1
        wrong = ~at(params.right, position, False)
        offset = jnp.arange(self.children, dtype=jnp.int32)[None, :] + wrong[:, None].astype(jnp.int32)
        token = (at(params.token, position, 0)[:, None] + offset) % self.vocab_size
        halves = -jnp.log(2.0) * (1 + jnp.arange(self.children, dtype=jnp.float32))
        log_prob = jnp.where(offset < self.vocab_size, halves.astype(jnp.float32)[None, :], -jnp.inf)
        return state, Proposals(token=token, log_prob=log_prob)
