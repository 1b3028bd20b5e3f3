"""The drafter seam: who proposes the guesses.

A drafter is a frozen dataclass of static settings with pure methods. Only `propose` must be written:

    @dataclasses.dataclass(frozen=True)
    class Zero(Drafter):
        def propose(self, params, state, view):
            parent = view.frontier
            token = jnp.zeros((parent.shape[0], 1), jnp.int32)
            return state, Proposals(parent=parent, token=token, log_prob=jnp.full(token.shape, -1.0))

A drafter without ranks of its own (`ranks` 0) runs on every rank alike; it has parameters, the same on all, but no
state. One with a rank runs there alone, beside the target's stages, and may keep a state, such as a KV cache. Either
way `propose` holds no collective. What it proposes never changes a token of the answer, only how soon it comes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from pipedec_jax.cache import Rows, tree_rows
from pipedec_jax.sampling import SamplingArrays, SamplingMode
from pipedec_jax.transcript import Transcript
from pipedec_jax.tree import PredictionTree


class Proposals(struct.PyTreeNode):
    """Guessed children of some nodes. P rows, K children each."""

    parent: jax.Array
    """[P] int32: the node each row extends; C for none."""
    token: jax.Array
    """[P, K] int32: guessed tokens, distinct within a row. No two rows have the same parent."""
    log_prob: jax.Array
    """[P, K] float32: their log-probabilities given the parent; minus infinity for none."""


class View(struct.PyTreeNode):
    """What a drafter sees in a draft step, the same on every rank."""

    tree: PredictionTree
    """The tree, with this tick's batch sent and the guesses of earlier draft steps added."""
    text: Transcript
    """Prompt and committed tokens."""
    committed: jax.Array
    """[S] bool: slots that hold committed text."""
    frontier: jax.Array
    """[W] int32: the nodes to extend, chosen by the schedule; C for none. Each has a slot."""
    sampling: SamplingArrays
    """How the target draws its tokens."""
    mode: SamplingMode = struct.field(pytree_node=False)
    """The static part of that."""

    def rows(self) -> Rows:
        """The frontier as rows of a cache. Call it in the branch that needs it: it costs O(W S)."""
        return tree_rows(self.tree, self.committed, self.frontier)


@dataclasses.dataclass(frozen=True)
class Drafter:
    """Base of all drafters. `params` is a pytree of arrays, `None` when it has none."""

    @property
    def ranks(self) -> int:
        """Ranks the drafter takes behind the target's stages: 0 or 1."""
        return 0

    def new_state(self, slots: int, dtype: Any) -> Any:
        """The state of the drafter's rank for a cache of so many slots: a pytree of arrays of at least one axis."""
        return ()

    def prefill(self, params: Any, state: Any, token_W: jax.Array, rows: Rows) -> Any:
        """Take a chunk of the prompt into the state, on the drafter's rank alone."""
        return state

    def propose(self, params: Any, state: Any, view: View) -> tuple[Any, Proposals]:
        """The new state, and guesses for nodes of the frontier (or others). Shapes are the same at every call."""
        raise NotImplementedError(f"{type(self).__name__} must define propose()")


@dataclasses.dataclass(frozen=True)
class NoDrafter(Drafter):
    """Proposes nothing: plain pipeline parallelism."""

    def propose(self, params: Any, state: Any, view: View) -> tuple[Any, Proposals]:
        """No guesses."""
        none = jnp.full((1,), view.tree.capacity, jnp.int32)
        return state, Proposals(parent=none, token=none[:, None], log_prob=jnp.full((1, 1), -jnp.inf, jnp.float32))
