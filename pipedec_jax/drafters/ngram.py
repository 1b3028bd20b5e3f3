"""Guesses looked up in the text so far: what followed the last few tokens when they stood there before.

Also known as prompt lookup. It needs no model and no rank; text that repeats itself (code, quotations, edits) gives it
its hits. Alone it works with every schedule; `combined.CombinedDrafter` adds its guesses to those of a draft model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pipedec_jax.drafters.base import Drafter, Proposals, View
from pipedec_jax.tree import at


@dataclasses.dataclass(frozen=True)
class NGramDrafter(Drafter):
    """Proposes up to `children` tokens that followed the longest, then latest, earlier places like a node's path."""

    children: int
    chances: tuple[float, ...] = (0.0, 0.45, 0.6, 0.75, 0.85)
    """Chance that a guess is right whose last 1, 2, ... tokens agree (exactly so many, the last entry: or more); an
    entry of 0 makes no guess."""

    def __post_init__(self) -> None:
        if not self.chances or not all(0 <= chance <= 1 for chance in self.chances):
            raise ValueError(f"chances must be numbers from 0 to 1, and at least one, not {self.chances!r}")

    def propose(self, params: Any, state: Any, view: View) -> tuple[Any, Proposals]:
        """Guesses for the frontier."""
        tree, text = view.tree, view.text
        context_WM = last_tokens(view, len(self.chances))
        T = text.token.shape[0]
        # Row i: the token at position i would be the guess, and i - 1 - j is compared with the context's j-th last.
        place = jnp.arange(T, dtype=jnp.int32)
        same = jnp.ones((context_WM.shape[0], T), bool)
        length = jnp.zeros((context_WM.shape[0], T), jnp.int32)
        for j in range(context_WM.shape[1]):
            before = place - 1 - j
            there = jnp.where(before >= 0, at(text.token, jnp.maximum(before, 0), -1), -2)
            same &= there[None, :] == context_WM[:, j, None]
            length += same.astype(jnp.int32)
        known = (place >= 1) & (place < text.length)
        length = jnp.where(known[None, :] & (view.frontier < tree.capacity)[:, None], length, 0)
        # More places than children, for the same token may stand at several of them.
        size = min(4 * self.children, T)
        # In float32, which holds these numbers exactly: XLA on CPU sorts all integers to find the best few.
        order, index = lax.top_k((length * T + place[None, :]).astype(jnp.float32), size)
        token, chance = text.token[index], self._chance(order.astype(jnp.int32) // T)
        repeated = jnp.any(jnp.tril(token[:, :, None] == token[:, None, :], k=-1), axis=-1)
        chance = jnp.where(repeated, 0.0, chance)
        # The longest match is right with its chance; the next one can only be where that is wrong.
        missed = jnp.cumprod(jnp.pad(1.0 - chance[:, :-1], ((0, 0), (1, 0)), constant_values=1.0), axis=1)
        log_prob, best = lax.top_k(jnp.log(chance * missed), min(self.children, size))
        token = jnp.take_along_axis(token, best, axis=1)
        missing = ((0, 0), (0, self.children - best.shape[1]))  # of a text that is shorter than that
        return state, Proposals(
            token=jnp.pad(token, missing),
            log_prob=jnp.pad(log_prob.astype(jnp.float32), missing, constant_values=-jnp.inf),
        )

    def _chance(self, length: jax.Array) -> jax.Array:
        table = jnp.asarray((0.0, *self.chances), jnp.float32)
        return table[jnp.minimum(length, len(self.chances))]


def last_tokens(view: View, count: int) -> jax.Array:
    """The last tokens `[W, count]` of every frontier node's path, the node's own first; -1 before the text begins."""
    nodes, text = view.tree, view.text
    position_WM = at(nodes.position, view.frontier, 0)[:, None] - jnp.arange(count, dtype=jnp.int32)[None, :]
    path_WC = at(nodes.ancestor, view.frontier, False)
    there = path_WC[:, None, :] & (nodes.position[None, None, :] == position_WM[:, :, None])
    guessed = jnp.max(jnp.where(there, nodes.token[None, None, :], -1), axis=2)
    written = jnp.where(position_WM >= 0, at(text.token, jnp.maximum(position_WM, 0), -1), -1)
    return jnp.where(guessed >= 0, guessed, written)
