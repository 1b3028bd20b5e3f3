"""The draft steps of a tick: what the drafter is shown, where it runs, and how its guesses get into the tree.

With a draft model (or look-up) a tick makes R steps, each over the tree that the one before has grown, on the drafter's
rank alone if it has one. At an early exit the one step has three parts: the exit's rank offers hidden rows, every rank
holds them against its slice of the head's vocabulary, and all settle on the same guesses.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pipedec_jax import tree
from pipedec_jax.cache import give_slots
from pipedec_jax.drafters.base import Proposals, View, check_proposals, proposed
from pipedec_jax.exchange import AXIS, vary
from pipedec_jax.pipeline.stage import Beside
from pipedec_jax.pipeline.state import DraftSteps, Shared, System
from pipedec_jax.schedules.base import check_chosen
from pipedec_jax.tick_costs import Curve
from pipedec_jax.tree import PredictionTree


def draft(system: System, params: Any, state: Any, shared: Shared, x: jax.Array) -> tuple[Any, Any]:
    """The tick's draft steps, on the drafter's rank alone if it has one; `x [W, D]` is what this rank's stage gave.

    Returns:
        The drafter's state, and what all shall know: the tree's fields that may have changed, but for the guesses, and
        the steps, which hold these; at an exit the drafter's offer. Elsewhere than on that rank it is zeros.
    """

    @jax.jit  # traced once, and then known: its shapes are asked for as well
    def run(state: Any) -> tuple[Any, Any]:
        if system.exit:
            return system.drafter.offer(params, state, exit_view(system, shared, hidden=x))
        state, nodes, steps = draft_here(system, params, state, shared)
        return state, ({name: getattr(nodes, name) for name in tree.DRAFTING if system.drafts_ahead}, steps)

    if not system.drafts_alone or not system.draft_steps:
        return run(state)

    def rest(state: Any) -> Any:
        shapes = jax.eval_shape(run, state)[1]
        return state, jax.tree.map(lambda leaf: vary(jnp.zeros(leaf.shape, leaf.dtype)), shapes)

    mine = lax.axis_index(AXIS) == system.drafting_rank
    return lax.cond(mine, lambda state: vary(run(state)), rest, vary(state))


def draft_here(system: System, params: Any, state: Any, shared: Shared) -> tuple[Any, PredictionTree, DraftSteps]:
    """The tick's draft steps, each over the tree that the one before has grown; the state, that tree, and the steps."""
    schedule, nodes, steps = system.schedule, shared.tree, []
    for step in range(system.draft_steps):
        nodes, frontier = check_chosen(schedule, "frontier", nodes, schedule.frontier(nodes, step))
        nodes, frontier = give_slots(nodes, shared.committed, frontier)
        view = make_view(system, shared, nodes, frontier, system.costs.draft)
        state, proposals = proposed(system.drafter, params, state, view)
        nodes, taken = take_proposals(system, nodes, frontier, proposals)
        steps.append(taken)
    if not steps:
        none = jnp.zeros((0, schedule.width), jnp.int32)
        guess = jnp.zeros((*none.shape, nodes.children), jnp.int32)
        return state, nodes, DraftSteps(none, none, none, guess, guess.astype(jnp.float32))
    return state, nodes, jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps)


def exit_view(system: System, shared: Shared, **rows: jax.Array | None) -> View:
    """What the drafter at an exit sees: the nodes that pass it in this tick, and `rows` (`View`) of them."""
    frontier = shared.pipe[system.exit - 1]
    # An exit head is part of its stage, and has its rows.
    return make_view(system, shared, shared.tree, frontier, system.costs.stage).replace(**rows)


def head_rows(system: System, params: Any, shared: Shared, offer: Any) -> Beside | None:
    """The rows of an offer at the exit that go through the target's LM head, where they do."""
    rows = system.drafter.head_rows(params, offer) if system.exit else None
    return None if rows is None else Beside(*rows, exit_view(system, shared).live)


def share_at_exit(system: System, params: Any, shared: Shared, offer: Any, logit: jax.Array | None) -> Any:
    """This device's part of the work on an offer at the exit, `logit` those of its `head_rows`; else nothing."""
    return system.drafter.share(params, offer, exit_view(system, shared, logit=logit)) if system.exit else ()


def draft_at_exit(system: System, shared: Shared, offer: Any, shares: Any) -> tuple[PredictionTree, DraftSteps]:
    """The tick's draft step at an exit, the same on all ranks: the grown tree, and the step."""
    view = exit_view(system, shared)
    proposals = system.drafter.settle(offer, shares, view)
    nodes, step = take_proposals(system, shared.tree, view.frontier, proposals)
    return nodes, jax.tree.map(lambda leaf: leaf[None], step)


def make_view(
    system: System,
    shared: Shared,
    nodes: PredictionTree,
    frontier: jax.Array,
    costs: Curve,
) -> View:
    """What the drafter sees of these nodes; `costs` say which numbers of rows are worth a program of their own."""
    return View(
        tree=nodes,
        text=shared.text,
        committed=shared.committed,
        frontier=frontier,
        sampling=shared.sampling,
        mode=system.sampling,
        sizes=costs.sizes(frontier.shape[0]),
        least_rows=system.target.least_rows,
    )


def take_proposals(
    system: System, nodes: PredictionTree, frontier: jax.Array, proposals: Proposals
) -> tuple[PredictionTree, DraftSteps]:
    """A tree with what was proposed for a frontier, and that as a draft step (its arrays without the axis of steps)."""
    check_proposals(system.drafter, proposals, frontier.shape[0])
    nodes = tree.guess(nodes, frontier, proposals.token, proposals.log_prob)
    return nodes, DraftSteps(
        node=frontier,
        token=tree.at(nodes.token, frontier, 0),
        position=tree.at(nodes.position, frontier, 0),
        guess_token=tree.at(nodes.guess_token, frontier, 0),
        guess_log_prob=tree.at(nodes.guess_log_prob, frontier, -jnp.inf),
    )


def keep_guesses(nodes: PredictionTree, steps: DraftSteps) -> PredictionTree:
    """A tree with the guesses of all draft steps."""
    node = steps.node.ravel()
    # A place may have changed hands between two steps: the last one has it. Writes to one place come in any order.
    again = jnp.triu(node[:, None] == node[None, :], k=1).any(axis=1)
    K = nodes.children
    return tree.guess(
        nodes,
        jnp.where(again, nodes.capacity, node),
        steps.guess_token.reshape(-1, K),
        steps.guess_log_prob.reshape(-1, K),
    )
