"""A drafter that replays a known continuation with chosen hit rates.

It needs no model, so it checks the formulas of the papers at any hit rate and times any model shape without trained
weights. The continuation usually is what plain decoding gave for the same prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from pipedec_jax.drafters.base import Drafter, Proposals, View
from pipedec_jax.tree import at


class Replay(struct.PyTreeNode):
    """The drafter's parameters (the same on every rank)."""

    token: jax.Array
    """[T] int32: prompt and continuation by absolute position."""
    place: jax.Array
    """[T] int32: where among the guesses for each position the known token stands, 0 for the first; K or more: it does
    not."""


def random_text(tokens: int, vocab_size: int, seed: int) -> tuple[list[int], Callable[[float], Replay]]:
    """A text of a prompt of one token and `tokens` more, and what replays it with any share of its tokens right.

    A token that is wrong is not among the guesses of one child; those right at a rate are right at every higher one.
    """
    random = np.random.default_rng(seed)
    text = random.integers(vocab_size, size=tokens + 1).astype(np.int32)
    order = random.permutation(len(text))

    def at_rate(rate: float) -> Replay:
        place = np.zeros(len(text), np.int32)
        place[order[: round((1 - rate) * len(text))]] = 1
        return Replay(token=jnp.asarray(text), place=jnp.asarray(place))

    return text.tolist(), at_rate


@dataclasses.dataclass(frozen=True)
class ReplayDrafter(Drafter):
    """Proposes `children` tokens per node, the known one among them where `Replay.place` says so."""

    children: int
    vocab_size: int
    chances: tuple[float, ...] | None = None
    """The chance that it gives each of its guesses; by default halves, quarters and so on."""

    def propose(self, params: Replay, state: Any, view: View) -> tuple[Any, Proposals]:
        """Guesses for the frontier: the known token in its place, wrong ones in the others."""
        K, position = self.children, at(view.tree.position, view.frontier, 0) + 1
        place = jnp.minimum(at(params.place, position, K), K)[:, None]
        index = jnp.arange(K, dtype=jnp.int32)[None, :]
        token = (at(params.token, position, 0)[:, None] + index - place) % self.vocab_size
        chances = self.chances or tuple(0.5 ** (1 + k) for k in range(K))
        log_prob = jnp.log(jnp.asarray(chances, jnp.float32))[None, :]
        # A vocabulary smaller than the guesses would repeat some.
        return state, Proposals(token=token, log_prob=jnp.where(index < self.vocab_size - 1, log_prob, -jnp.inf))


@dataclasses.dataclass(frozen=True)
class ReplayAtExit(ReplayDrafter):
    """The same in place of an exit head: it guesses for a node once that has passed the exit."""

    @property
    def at_exit(self) -> bool:
        """Yes."""
        return True
