"""The drafter seam: who proposes the guesses.

A drafter is a frozen dataclass of static settings with pure methods. Only `propose` must be written; the defaults of
the others make a drafter that needs no weights, no cache and no rank of its own (such as one that looks guesses up).

A tick calls the methods in this order, at its top level, on every rank:

1. `enter`: partial sums over the ranks, such as a sharded embedding's rows of the frontier.
2. `compute`: the rank's own work, beside the target's stages. No collective here. Returns partial sums again.
3. `score`: what each rank contributes once the sum is known, such as its slice of the vocabulary.
4. `propose`: the guesses, from everyone's scores. All ranks compute the same.

The tick packs what `enter`, `compute` and `score` return into the collectives it needs for the target anyway.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from pipedec_jax.cache import Rows, tree_rows
from pipedec_jax.transcript import Transcript
from pipedec_jax.tree import PredictionTree


class Proposals(struct.PyTreeNode):
    """Guessed children of some nodes. P rows, K children each."""

    parent: jax.Array
    """[P] int32: the node each row extends; C for none."""
    token: jax.Array
    """[P, K] int32: guessed tokens, distinct within a row."""
    log_prob: jax.Array
    """[P, K] float32: their log-probabilities given the parent; minus infinity for none."""


class View(struct.PyTreeNode):
    """What a drafter sees in a tick, the same on every rank."""

    tree: PredictionTree
    """The tree, with this tick's batch sent."""
    text: Transcript
    """Prompt and committed tokens."""
    frontier: jax.Array
    """[W] int32: the nodes to extend, chosen by the schedule; C for none."""
    committed: jax.Array
    """[S] bool: slots that hold committed text."""

    def rows(self) -> Rows:
        """The frontier as rows of a cache. Call it in the branch that needs it: it costs O(W S)."""
        return tree_rows(self.tree, self.committed, self.frontier)


@dataclasses.dataclass(frozen=True)
class Drafter:
    """Base of all drafters. `params` and `state` are pytrees of the drafter's own; `None` when it has none."""

    @property
    def ranks(self) -> int:
        """Ranks the drafter takes behind the target's stages."""
        return 0

    def enter(self, params: Any, view: View) -> Any:
        """Partial sums over the ranks that `compute` needs."""
        return ()

    def compute(self, params: Any, state: Any, view: View, entered: Any, first_rank: int) -> tuple[Any, Any]:
        """This rank's own work; returns the new state and partial sums. The drafter's first rank is `first_rank`."""
        return state, ()

    def score(self, params: Any, summed: Any) -> Any:
        """This rank's contribution to the proposals; gathered over the ranks."""
        return ()

    def propose(self, params: Any, view: View, gathered: Any) -> Proposals:
        """The guesses for the frontier. `gathered` is what `score` returned, stacked over the ranks."""
        raise NotImplementedError(f"{type(self).__name__} must define propose()")

    def prefill_enter(self, params: Any, token_W: jax.Array) -> Any:
        """Like `enter`, for a chunk of the prompt."""
        return ()

    def prefill(self, params: Any, state: Any, rows: Rows, entered: Any, active: jax.Array, first_rank: int) -> Any:
        """Take a chunk of the prompt into the state, where `active`. No collective here."""
        return state


@dataclasses.dataclass(frozen=True)
class NoDrafter(Drafter):
    """Proposes nothing: plain pipeline parallelism."""

    def propose(self, params: Any, view: View, gathered: Any) -> Proposals:
        """No guesses."""
        none = jnp.full((1,), view.tree.capacity, jnp.int32)
        return Proposals(parent=none, token=none[:, None], log_prob=jnp.full((1, 1), -jnp.inf, jnp.float32))
