"""The prediction tree: a fixed-capacity array structure with masked updates that compiles under jit.

A node is one guessed token. The root is the last committed token; every living node descends from it. Nodes live in
`C` places and are allocated from the dead ones; the node index that means "none" is `C`, and a write to it is dropped.
What the drafter has guessed to follow a node is kept with it, K guesses each. A guess becomes a node only when it is
sent or extended, so that nothing known is ever thrown away for want of a place.

Every function here is pure and keeps these invariants (tests/test_tree.py holds them against a plain Python tree):

* `ancestor[i, j]` is true only when i and j both live and j lies on the path from the root to i (i itself included);
* the root lives, and a living node's ancestors all live;
* a node that was sent or drafted has a slot, and so have its ancestors.

Source: the dynamic prediction tree of PipeDec (arXiv 2504.04104), as arrays.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

NO_SLOT = 2**31 - 1
"""Slot of a node that has none: past the end of every cache, so a write to it is dropped."""

DRAFTING = (
    "token",
    "parent",
    "child_index",
    "position",
    "log_prob",
    "alive",
    "slot",
    "sent_tick",
    "drafted",
    "known",
    "ancestor",
)
"""The fields of a tree that draft steps change, but for the guesses."""

SUREST = -1e-4
"""Log-probability of a guess at most. A path is thus always less likely than what it extends, and comes after it in any
order by probability, also where a drafter's chance is rounded to 1."""


class PredictionTree(struct.PyTreeNode):
    """The tree's arrays. C is the capacity, K the number of guesses for each node."""

    token: jax.Array
    """[C] int32: the guessed token."""
    parent: jax.Array
    """[C] int32: index of the parent; C for the root, whose parent is committed text."""
    child_index: jax.Array
    """[C] int32: which of its parent's guesses the node was."""
    position: jax.Array
    """[C] int32: absolute position of the token in the text."""
    log_prob: jax.Array
    """[C] float32: log-probability of the path from the root (0) to this node, as the drafter sees it."""
    alive: jax.Array
    """[C] bool: whether the place holds a node that can still be committed."""
    slot: jax.Array
    """[C] int32: the KV cache slot, given when the node is first sent or drafted; NO_SLOT before."""
    sent_tick: jax.Array
    """[C] int32: the tick in which the node entered the pipe; 0 before."""
    drafted: jax.Array
    """[C] bool: whether the drafter has guessed what follows."""
    guess_token: jax.Array
    """[C, K] int32: those guesses, where `drafted`."""
    guess_log_prob: jax.Array
    """[C, K] float32: their log-probabilities given the node; minus infinity for none."""
    choice: jax.Array
    """[C] int32: the target's next token after this node, once `known`."""
    choice_log_prob: jax.Array
    """[C] float32: the target's log-probability of `choice`."""
    known: jax.Array
    """[C] bool: whether the node has left the last stage."""
    ancestor: jax.Array
    """[C, C] bool: `ancestor[i, j]`, j is i or above it."""
    root: jax.Array
    """[] int32: index of the last committed token's node."""

    @property
    def capacity(self) -> int:
        """Number of places (C)."""
        return self.token.shape[0]

    @property
    def children(self) -> int:
        """Guesses for each node (K)."""
        return self.guess_token.shape[1]

    @property
    def sent(self) -> jax.Array:
        """[C] bool: whether the node has entered the pipe."""
        return self.sent_tick > 0

    @property
    def waiting(self) -> jax.Array:
        """[C] bool: living nodes that have not been sent."""
        return self.alive & ~self.sent


def plant(capacity: int, children: int, token: jax.Array, position: jax.Array) -> PredictionTree:
    """A tree of one unsent node, the root (index 0), with the given token and position, in C places with K guesses."""
    first = jnp.arange(capacity, dtype=jnp.int32) == 0
    return PredictionTree(
        token=jnp.where(first, token.astype(jnp.int32), 0),
        parent=jnp.full(capacity, capacity, jnp.int32),
        child_index=jnp.zeros(capacity, jnp.int32),
        position=jnp.where(first, position.astype(jnp.int32), 0),
        log_prob=jnp.zeros(capacity, jnp.float32),
        alive=first,
        slot=jnp.full(capacity, NO_SLOT, jnp.int32),
        sent_tick=jnp.zeros(capacity, jnp.int32),
        drafted=jnp.zeros(capacity, bool),
        guess_token=jnp.zeros((capacity, children), jnp.int32),
        guess_log_prob=jnp.full((capacity, children), -jnp.inf, jnp.float32),
        choice=jnp.zeros(capacity, jnp.int32),
        choice_log_prob=jnp.zeros(capacity, jnp.float32),
        known=jnp.zeros(capacity, bool),
        ancestor=first[:, None] & first[None, :],
        root=jnp.zeros((), jnp.int32),
    )


def select(mask_C: jax.Array, size: int) -> jax.Array:
    """Indices of the first `size` true places of a mask, `[size]` int32, padded with C."""
    C = mask_C.shape[0]
    count = min(size, C)
    # The highest of falling numbers, in float32, which holds them exactly up to 2**24: XLA on CPU finds the best few
    # floats at once, where `nonzero` scatters every place (4.9 us for 35 at 4,096 places and 32 wanted).
    order = -lax.iota(jnp.float32, C)
    found, _ = lax.top_k(jnp.where(mask_C, order, -jnp.float32(C)), count)
    return jnp.pad(-found.astype(jnp.int32), (0, size - count), constant_values=C)


def at(array: jax.Array, index: jax.Array, fill: bool | int | float) -> jax.Array:
    """`array[index]`, with `fill` where the index is "none"."""
    return jnp.asarray(array).at[index].get(mode="fill", fill_value=fill)


def guess(tree: PredictionTree, node_W: jax.Array, token_WK: jax.Array, log_prob_WK: jax.Array) -> PredictionTree:
    """Keep a drafter's guesses for nodes, which are then drafted. One whose log-probability is no number is none."""
    log_prob_WK = log_prob_WK.astype(jnp.float32)
    log_prob_WK = jnp.where(jnp.isnan(log_prob_WK), -jnp.inf, jnp.minimum(log_prob_WK, SUREST))
    return tree.replace(
        drafted=tree.drafted | mark(tree, node_W),
        guess_token=tree.guess_token.at[node_W].set(token_WK.astype(jnp.int32), mode="drop"),
        guess_log_prob=tree.guess_log_prob.at[node_W].set(log_prob_WK, mode="drop"),
    )


def open_guesses(tree: PredictionTree) -> jax.Array:
    """`[C, K]`: path log-probability of every guess that is not a node, minus infinity in place of the others."""
    parent = jnp.where(tree.alive, tree.parent, tree.capacity)
    taken = jnp.zeros(tree.guess_token.shape, bool).at[parent, tree.child_index].set(True, mode="drop")
    there = (tree.alive & tree.drafted)[:, None] & ~taken
    return jnp.where(there, tree.log_prob[:, None] + tree.guess_log_prob, -jnp.inf)


def add(tree: PredictionTree, parent_M: jax.Array, child_index_M: jax.Array) -> tuple[PredictionTree, jax.Array]:
    """Make nodes of up to M guesses, in dead places, in order.

    Args:
        tree: the tree.
        parent_M: the nodes they follow; rows of a dead or undrafted one are skipped, and those of "none".
        child_index_M: which of the parent's guesses each is.

    Returns:
        The new tree and the index of each new node, C where it was skipped or no place was left.
    """
    C, M = tree.capacity, parent_M.shape[0]
    valid = at(tree.alive & tree.drafted, parent_M, False)
    free = select(~tree.alive, M)
    index = jnp.where(valid, at(free, jnp.cumsum(valid, dtype=jnp.int32) - 1, C), C)
    # By place, not by row: reading where to write from fuses, where a write for every field would be a kernel each.
    row = jnp.full(C, M, jnp.int32).at[index].set(jnp.arange(M, dtype=jnp.int32), mode="drop")
    new = row < M
    parent, child_index = at(parent_M, row, 0), at(child_index_M, row, 0)
    itself = jnp.eye(C, dtype=bool)
    tree = tree.replace(
        token=jnp.where(new, tree.guess_token[parent, child_index], tree.token),
        parent=jnp.where(new, parent, tree.parent),
        child_index=jnp.where(new, child_index, tree.child_index),
        position=jnp.where(new, tree.position[parent] + 1, tree.position),
        log_prob=jnp.where(new, tree.log_prob[parent] + tree.guess_log_prob[parent, child_index], tree.log_prob),
        alive=tree.alive | new,
        slot=jnp.where(new, NO_SLOT, tree.slot),
        sent_tick=jnp.where(new, 0, tree.sent_tick),
        drafted=tree.drafted & ~new,
        known=tree.known & ~new,
        ancestor=jnp.where(new[:, None], tree.ancestor[parent] | itself, tree.ancestor),
    )
    return tree, index


def drop(tree: PredictionTree, mask_C: jax.Array) -> PredictionTree:
    """Remove nodes and all below them. The root must not be among them."""
    alive = tree.alive & ~jnp.any(tree.ancestor & mask_C[None, :], axis=1)
    return tree.replace(alive=alive, ancestor=tree.ancestor & alive[:, None] & alive[None, :])


def closed(tree: PredictionTree, node_W: jax.Array, ready_C: jax.Array) -> jax.Array:
    """The nodes that are ready with all their ancestors, C in place of the others."""
    return jnp.where(jnp.any(at(tree.ancestor, node_W, True) & ~ready_C[None, :], axis=1), tree.capacity, node_W)


def mark(tree: PredictionTree, node_W: jax.Array) -> jax.Array:
    """`[C]` bool: which nodes are in the list."""
    return jnp.zeros(tree.capacity, bool).at[node_W].set(True, mode="drop")


def send(tree: PredictionTree, node_W: jax.Array, tick: jax.Array) -> PredictionTree:
    """Mark nodes as sent in `tick` (counted from 1)."""
    return tree.replace(sent_tick=tree.sent_tick.at[node_W].set(tick.astype(jnp.int32), mode="drop"))


def record(
    tree: PredictionTree, node_W: jax.Array, choice_W: jax.Array, choice_log_prob_W: jax.Array
) -> PredictionTree:
    """Record the target's choices for the nodes that left the last stage."""
    return tree.replace(
        choice=tree.choice.at[node_W].set(choice_W, mode="drop"),
        choice_log_prob=tree.choice_log_prob.at[node_W].set(choice_log_prob_W.astype(jnp.float32), mode="drop"),
        known=tree.known.at[node_W].set(True, mode="drop"),
    )


def find_child(tree: PredictionTree, token: jax.Array) -> jax.Array:
    """Index of the root's living child with this token, a sent one before an unsent one; C when there is none."""
    match = tree.alive & (tree.parent == tree.root) & (tree.token == token)
    sent = match & tree.sent
    return select(jnp.where(jnp.any(sent), sent, match), 1)[0]


def advance(tree: PredictionTree, child: jax.Array) -> PredictionTree:
    """Make a living child of the root the new root and prune everything that does not descend from it."""
    C = tree.capacity
    alive = tree.alive & tree.ancestor[:, child]
    is_root = jnp.arange(C, dtype=jnp.int32) == child
    return tree.replace(
        root=child.astype(jnp.int32),
        parent=jnp.where(is_root, C, tree.parent),
        log_prob=tree.log_prob - tree.log_prob[child],
        alive=alive,
        # Stale bits go now, all at once: a place freed here may be reused by the next `add`.
        ancestor=tree.ancestor & alive[:, None] & alive[None, :],
    )
