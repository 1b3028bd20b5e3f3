"""The drafter seam: who proposes the guesses.

A drafter is a frozen dataclass of static settings with pure methods. Only `children` and `propose` must be written:

    @dataclasses.dataclass(frozen=True)
    class Zero(Drafter):
        children: int = 1

        def propose(self, params, state, view):
            token = jnp.zeros((view.frontier.shape[0], self.children), jnp.int32)
            return state, Proposals(token=token, log_prob=jnp.full(token.shape, -1.0))

Give it as `Decoder(target, drafter=Zero())`, and arrays that it takes as `params`, if any, with each request:
`generate(prompt, drafter_params=...)`.

A drafter without ranks of its own (`ranks` 0) runs on every rank alike; it has parameters, the same on all, but no
state. One with a rank runs there alone, beside the target's stages, and may keep a state, such as a KV cache. One at
the target's exit (`at_exit`) runs on the rank of the exit path's last stage, after its layers, and extends the nodes
that have just passed them. Either way `propose` holds no collective. What it proposes never changes a token of the
answer, only how soon it comes.

A drafter at the exit may leave a part of its work to all devices, each with a slice of its weights, as the target does
with its LM head. It then defines `offer`, `share` and `settle` in place of `propose`: what is computed at the exit and
sent to all, what each device makes of that, and what all of that together proposes. Where that begins with the target's
own LM head, `head_rows` says of which rows: the head is then read once for them and for the target's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from pipedec_jax.cache import Rows, tree_rows
from pipedec_jax.sampling import SamplingArrays, SamplingMode
from pipedec_jax.transcript import Transcript
from pipedec_jax.tree import PredictionTree


class Proposals(struct.PyTreeNode):
    """What may follow the nodes of the frontier. Rows of nodes that are none are ignored."""

    token: jax.Array
    """[W, K] int32: guessed tokens, distinct within a row."""
    log_prob: jax.Array
    """[W, K] float32: their log-probabilities given the node; minus infinity for none."""


class View(struct.PyTreeNode):
    """What a drafter sees in a draft step, the same on every rank."""

    tree: PredictionTree
    """The tree, with this tick's batch sent and the guesses of earlier draft steps added."""
    text: Transcript
    """Prompt and committed tokens."""
    committed: jax.Array
    """[S] bool: slots that hold committed text."""
    frontier: jax.Array
    """[W] int32: the nodes to extend, chosen by the schedule (at an exit, those that passed it in this tick); C for
    none. Each has a slot."""
    sampling: SamplingArrays
    """How the target draws its tokens."""
    mode: SamplingMode = struct.field(pytree_node=False)
    """The static part of that."""
    sizes: tuple[int, ...] = struct.field(pytree_node=False)
    """Rows of a frontier that are worth a program of their own; the last is W."""
    hidden: jax.Array | None = None
    """[W, D]: hidden rows of the frontier after the exit layer; `None` for a drafter that is not at an exit."""
    logit: jax.Array | None = None
    """[W, Vr]: this device's slice of the logits that `head_rows` asked for (`vocabulary.head_part`), or `None`."""
    least_rows: int = struct.field(pytree_node=False, default=1)
    """Rows that are computed at least, dead ones added (`placement.least_rows`)."""

    @property
    def live(self) -> jax.Array:
        """[W] bool: which rows of the frontier are nodes."""
        return self.frontier < self.tree.capacity

    def rows(self, node: jax.Array | None = None) -> Rows:
        """The frontier, or other nodes, as rows of a cache. Call it in the branch that needs it: it costs O(W S)."""
        return tree_rows(self.tree, self.committed, self.frontier if node is None else node)


class Drafter:
    """Base of all drafters. `params` is a pytree of arrays, `None` when it has none."""

    children: int
    """Guesses for each node (K)."""

    @property
    def ranks(self) -> int:
        """Ranks the drafter takes behind the target's stages: 0 or 1."""
        return 0

    @property
    def at_exit(self) -> bool:
        """Whether the drafter sits at the target's exit, on a rank that the target has in any case."""
        return False

    def new_state(self, slots: int, dtype: Any) -> Any:
        """The state of the drafter's rank for a cache of so many slots: a pytree of arrays of at least one axis."""
        return ()

    def prefill(self, params: Any, state: Any, chunk: jax.Array, rows: Rows) -> Any:
        """Take a chunk of the prompt into the state, on the drafter's rank alone.

        The chunk is its tokens `[W]`; at an exit, their hidden rows `[W, D]` after the exit layer.
        """
        return state

    def propose(self, params: Any, state: Any, view: View) -> tuple[Any, Proposals]:
        """The new state, and guesses for the nodes of the frontier."""
        raise NotImplementedError(f"{type(self).__name__} must define propose()")

    def offer(self, params: Any, state: Any, view: View) -> tuple[Any, Any]:
        """At an exit, on its rank alone: the new state, and a pytree of arrays that is sent to all devices."""
        state, proposals = proposed(self, params, state, view)
        check_proposals(self, proposals, view.frontier.shape[0])
        return state, Proposals(proposals.token.astype(jnp.int32), proposals.log_prob.astype(jnp.float32))

    def head_rows(self, params: Any, offer: Any) -> tuple[jax.Array, jax.Array] | None:
        """At an exit, on every device: rows `[W, D]` of an offer for the target's LM head, and their norm `[D]`.

        The logits are `View.logit` of `share`; `None` for none.
        """
        return None

    def share(self, params: Any, offer: Any, view: View) -> Any:
        """At an exit, on every device: its part of the work on an offer, a pytree of arrays. `view.hidden` is stale.

        It stands at the top level of the tick, and holds no collective. Parameters of a drafter of one's own are the
        same on all devices; which of them this one is, and of how many, `lax.axis_index(pipedec_jax.exchange.AXES)`
        and `lax.axis_size` of it say.
        """
        return ()

    def settle(self, offer: Any, shares: Any, view: View) -> Proposals:
        """At an exit, the same on all devices: the guesses, from an offer and all devices' shares `[devices, ...]`."""
        return offer


def proposed(drafter: Drafter, params: Any, state: Any, view: View) -> tuple[Any, Proposals]:
    """What `propose` gives; `ValueError` unless it is a state like the one it took, and something beside it."""
    found = drafter.propose(params, state, view)
    name = type(drafter).__name__
    if not isinstance(found, tuple) or len(found) != 2:
        what = f"{len(found)} things" if isinstance(found, tuple) else type(found).__name__
        raise ValueError(f"{name}.propose() must give two things, the new state and Proposals, not {what}")

    def kinds(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)} {list(jnp.shape(leaf))}", tree)

    before, after = kinds(state), kinds(found[0])
    if before != after:
        raise ValueError(f"{name}.propose() must give a state of such arrays as it took, {before}, not {after}")
    return found


def check_proposals(drafter: Drafter, proposals: Proposals, rows: int) -> None:
    """Raise `ValueError` unless what a drafter has proposed for so many nodes has the shapes and kinds it must have.

    One row may stand for all of them.
    """
    method = "propose" if type(drafter).settle is Drafter.settle else "settle"
    if not isinstance(proposals, Proposals):
        raise ValueError(f"{type(drafter).__name__}.{method}() must give Proposals, not {type(proposals).__name__}")
    for name, kind in (("token", jnp.integer), ("log_prob", jnp.floating)):
        found = getattr(proposals, name)
        an_array = isinstance(found, jax.Array | np.ndarray)
        fits = an_array and found.shape in ((rows, drafter.children), (1, drafter.children))
        if not fits or not jnp.issubdtype(found.dtype, kind):
            what = f"{found.dtype} {list(found.shape)}" if an_array else type(found).__name__
            raise ValueError(
                f"{type(drafter).__name__}.{method}() must give {name} as {kind.__name__} numbers "
                f"[{rows}, {drafter.children}] (nodes of the frontier, children), not {what}"
            )


def new_state_of(drafter: Drafter, slots: int, dtype: Any) -> Any:
    """A drafter's new state; `ValueError` where an array of it has no axis along which devices could have their own."""
    state = drafter.new_state(slots, dtype)
    for leaf in jax.tree.leaves(state):
        if jnp.ndim(leaf) == 0:
            raise ValueError(
                f"{type(drafter).__name__}.new_state() must give arrays of at least one axis, not a single "
                f"{jnp.result_type(leaf)}: make it an array of shape [1]"
            )
    return state


def check_drafter(drafter: Drafter) -> None:
    """Raise `ValueError` unless an object of a drafter's class has what every drafter must have."""
    name = type(drafter).__name__
    if type(drafter).propose is Drafter.propose and type(drafter).offer is Drafter.offer:
        raise ValueError(f"{name} must define propose(), which guesses (see pipedec_jax.drafters)")
    children = getattr(drafter, "children", None)
    if isinstance(children, bool) or not isinstance(children, int | np.integer) or children < 1:
        raise ValueError(
            f"{name}.children must be a whole number of at least 1, the guesses for each node, not {children!r}"
        )
    if drafter.ranks not in (0, 1):
        raise ValueError(f"{name}.ranks must be 0 or 1 (ranks behind the target's stages), not {drafter.ranks!r}")
    if drafter.at_exit and drafter.ranks:
        raise ValueError(f"{name}.ranks must be 0: at_exit it is on the rank of the exit, whose hidden rows it sees")


@dataclasses.dataclass(frozen=True)
class NoDrafter(Drafter):
    """Proposes nothing: plain pipeline parallelism."""

    children: int = 1

    def propose(self, params: Any, state: Any, view: View) -> tuple[Any, Proposals]:
        """No guesses."""
        shape = (view.frontier.shape[0], self.children)
        return state, Proposals(token=jnp.zeros(shape, jnp.int32), log_prob=jnp.full(shape, -jnp.inf, jnp.float32))
