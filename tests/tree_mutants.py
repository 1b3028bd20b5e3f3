"""Operations on the tree that are wrong in one way each, which the tests of the tree must notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pipedec_jax import cache, tree
from pipedec_jax.schedules.base import Schedule, take
from pipedec_jax.tree import NO_SLOT, PredictionTree


def _stale_column(nodes: PredictionTree, child: jax.Array) -> PredictionTree:
    right = tree.advance(nodes, child)
    return right.replace(ancestor=nodes.ancestor & right.alive[:, None])


def _no_pruning(nodes: PredictionTree, child: jax.Array) -> PredictionTree:
    alive = nodes.alive & (jnp.arange(nodes.capacity) != nodes.root)
    return tree.advance(nodes, child).replace(alive=alive, ancestor=nodes.ancestor & alive[:, None] & alive[None, :])


def _keeps(field: str) -> Callable[..., Any]:
    """An add that forgets to reset a field of the place it takes."""

    def add(nodes: PredictionTree, *arguments: jax.Array) -> tuple[PredictionTree, jax.Array]:
        right, index = tree.add(nodes, *arguments)
        return right.replace(**{field: getattr(nodes, field)}), index

    return add


def _first_child(nodes: PredictionTree, token: jax.Array) -> jax.Array:
    return tree.select(nodes.alive & (nodes.parent == nodes.root) & (nodes.token == token), 1)[0]


def _anywhere(field: str) -> Callable[..., Any]:
    """An add that takes every parent for alive, or for drafted."""

    def add(nodes: PredictionTree, parent: jax.Array, rank: jax.Array) -> tuple[PredictionTree, jax.Array]:
        return tree.add(nodes.replace(**{field: getattr(nodes, field).at[parent].set(True, mode="drop")}), parent, rank)

    return add


def _only_committed_taken(
    nodes: PredictionTree, committed: jax.Array, node: jax.Array
) -> tuple[PredictionTree, jax.Array]:
    wanted = node[jnp.argsort(tree.at(nodes.slot, node, 0) != NO_SLOT, stable=True)]
    new = tree.at(nodes.slot, wanted, 0) == NO_SLOT
    slot = tree.select(~committed, node.shape[0])
    slot = jnp.where(slot < committed.shape[0], slot, NO_SLOT)
    return nodes.replace(slot=nodes.slot.at[jnp.where(new, wanted, nodes.capacity)].set(slot, mode="drop")), node


def _shallow_drop(nodes: PredictionTree, mask: jax.Array) -> PredictionTree:
    alive = nodes.alive & ~mask
    return nodes.replace(alive=alive, ancestor=nodes.ancestor & alive[:, None] & alive[None, :])


def _closed_under_parents(nodes: PredictionTree, node: jax.Array, ready: jax.Array) -> jax.Array:
    parent = tree.at(nodes.parent, node, nodes.capacity)
    there = tree.at(ready, parent, True) & tree.at(ready, node, True)
    return jnp.where(there, node, nodes.capacity)


MUTANTS: dict[str, Callable[..., Any]] = {
    "advance:leaves stale bits of dead ancestors": _stale_column,
    "advance:does not prune": _no_pruning,
    "advance:keeps log-probabilities": lambda nodes, child: tree.advance(nodes, child).replace(log_prob=nodes.log_prob),
    "add:keeps a dead node's choice known": _keeps("known"),
    "add:keeps a dead node's slot": _keeps("slot"),
    "add:keeps a dead node's sent tick": _keeps("sent_tick"),
    "add:extends dead parents": _anywhere("alive"),
    "add:extends undrafted parents": _anywhere("drafted"),
    "score:counts dead nodes": lambda nodes: Schedule(1).score(nodes.replace(alive=jnp.ones_like(nodes.alive))),
    "score:counts guesses that are nodes": lambda nodes: Schedule(1).score(
        nodes.replace(parent=jnp.full_like(nodes.parent, nodes.capacity))
    ),
    "take:children without their parents": lambda nodes, score, size: take(
        nodes, score, size, jnp.ones_like(nodes.sent)
    ),
    "take:any order": lambda nodes, score, size: take(nodes, jnp.minimum(score, 0), size, nodes.sent),
    "find_child:prefers the first, sent or not": _first_child,
    "add:keeps a dead node's drafted mark": _keeps("drafted"),
    "drop:leaves what is below": _shallow_drop,
    "closed:looks at parents alone": _closed_under_parents,
    "give_slots:forgets the tree's own": _only_committed_taken,
    "owners:counts dead nodes": lambda nodes, slots: cache.owners(
        nodes.replace(alive=jnp.ones_like(nodes.alive)), slots
    ),
}
"""By the operation that each replaces (up to the colon)."""
