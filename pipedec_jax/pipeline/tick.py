"""One tick of the pipeline: send, compute, exchange, update. Every method is this function.

    send      the schedule's next batch enters the pipe; its embeddings are summed over the devices
    compute   every rank at once: stage k runs its layers on batch k of the pipe, the drafter makes its draft steps
              (an exit head right after the layers of its stage, on their rows)
    exchange  activations move one stage on; the tree as the drafter has grown it and the last stage's rows are
              broadcast, and the rows meet every rank's slice of the head (those behind an exit its head's slice)
    update    the same on all ranks: record the target's choices, walk the root, prune

The tree, the text and the pipe's bookkeeping are replicated, so all ranks agree without a coordinator. Only caches
and activations differ between ranks. Collectives over the stages stand at the top level of `tick`, never inside a
branch. A rank is one device or, with tensor parallelism, several, which split its layers and do all else alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from pipedec_jax import soundness, transcript, tree, vocabulary
from pipedec_jax.cache import give_slots, tree_rows
from pipedec_jax.drafters.base import Drafter, Proposals, View, check_proposals
from pipedec_jax.exchange import AXIS, gather_over_devices, leads, pass_on, sum_over_devices, vary
from pipedec_jax.pipeline.stage import StageCache, Target, TargetParams, run_head, run_stage
from pipedec_jax.sampling import SamplingArrays, SamplingMode
from pipedec_jax.schedules.base import Schedule
from pipedec_jax.tick_costs import TICKS, Curve, TickCosts, over_live_rows
from pipedec_jax.transcript import Transcript
from pipedec_jax.tree import PredictionTree


@dataclasses.dataclass(frozen=True)
class System:
    """Everything about a decoding method that is known at compile time."""

    target: Target
    drafter: Drafter
    schedule: Schedule
    sampling: SamplingMode
    draft_steps: int = 1
    """Draft steps in a tick (R)."""
    costs: TickCosts = TICKS
    """What a tick costs by the rows in it."""
    wait: Callable[[jax.Array], jax.Array] | None = None
    """What a stage's rows pass after its layers where a heavier stage is emulated (`analysis.emulation`)."""

    @property
    def stages(self) -> int:
        """The target's stages (N)."""
        return self.target.split.stages

    @property
    def ranks(self) -> int:
        """Places on the stage axis: the stages, then the drafter's ranks."""
        return self.stages + self.drafter.ranks

    @property
    def exit(self) -> int:
        """Stages of the exit path (e), whose last one drafts; 0 where the target has no exit."""
        return self.target.split.exit

    @property
    def drafts_alone(self) -> bool:
        """Whether one rank drafts; otherwise all do the same."""
        return bool(self.drafter.ranks or self.exit)

    @property
    def drafts_ahead(self) -> bool:
        """Whether draft steps may extend what was not sent, and so change the tree by more than guesses."""
        return self.draft_steps > 0 and not self.exit and self.schedule.drafts_ahead

    @property
    def drafting_rank(self) -> int:
        """The drafter's rank: its own, or the exit path's last; the first one where all ranks do the same."""
        return self.stages if self.drafter.ranks else max(0, self.exit - 1)


class Shared(struct.PyTreeNode):
    """The replicated state: the same on every rank."""

    tree: PredictionTree
    text: Transcript
    committed: jax.Array
    """[S] bool: slots that hold committed text."""
    pipe: jax.Array
    """[N, W] int32: the node of every row at every stage, as processed in the last tick; C for none or pruned."""
    tick: jax.Array
    """[] int32: ticks since the first root's entry."""
    cost: jax.Array
    """[] float32: what these ticks have cost (`System.costs`)."""
    sent: jax.Array
    """[] int32: nodes sent so far."""
    unsound: jax.Array
    """[C] int32: where a node that was sent first gave anything but numbers (`soundness`), 0 for nowhere; stale for
    others."""
    spoiled: jax.Array
    """[] int32: the same for the prompt, in prefill."""
    sampling: SamplingArrays


class Local(struct.PyTreeNode):
    """The state that each device has its own of."""

    x: jax.Array
    """[W, D]: activations received from the previous stage."""
    cache: StageCache
    drafter: Any
    """The drafter's state."""


class Weights(struct.PyTreeNode):
    """The weights as one device holds them."""

    target: TargetParams
    drafter: Any


class DraftSteps(struct.PyTreeNode):
    """What the draft steps of a tick extend, and with what: R steps of F nodes, K guesses for each."""

    node: jax.Array
    """[R, F] int32: the frontiers; C for none."""
    token: jax.Array
    """[R, F] int32: their tokens. A node that a later step drops leaves its place to another."""
    position: jax.Array
    """[R, F] int32: their positions in the text."""
    guess_token: jax.Array
    """[R, F, K] int32: what is guessed to follow."""
    guess_log_prob: jax.Array
    """[R, F, K] float32: the log-probabilities of that given the node; minus infinity for none."""


class Moment(struct.PyTreeNode):
    """What passes in a tick and is gone afterwards: for those who look (`recording`). It is the same on all ranks."""

    sent: Shared
    """After sending: what every stage has in this tick."""
    steps: DraftSteps
    grown: Shared
    """With all guesses and the target's choices, before the root walks."""


def tick(system: System, weights: Weights, shared: Shared, local: Local) -> tuple[Shared, Local]:
    """One stage-step of the whole system. Runs under `shard_map`."""
    shared, local, _ = watched_tick(system, weights, shared, local)
    return shared, local


def watched_tick(system: System, weights: Weights, shared: Shared, local: Local) -> tuple[Shared, Local, Moment]:
    """The same, and what passed in it: values that are there in any case, so that nothing is computed for them."""
    target = system.target
    rank = lax.axis_index(AXIS)

    # Send.
    shared = send(system, shared)
    token = tree.at(shared.tree.token, shared.pipe[0], 0)
    embedded = sum_over_devices(vocabulary.embed_part(weights.target.embedding, token))

    # Compute: no collective over the stages in here, so every rank works on its own at the same time.
    batch = shared.pipe[jnp.minimum(rank, system.stages - 1)]
    x = jnp.where(rank == 0, embedded, local.x)

    def stage(cache: StageCache, rows: tuple[jax.Array, jax.Array]) -> tuple[StageCache, jax.Array]:
        batch, x = rows
        cache, x = run_stage(target, weights.target, cache, tree_rows(shared.tree, shared.committed, batch), x)
        return cache, x if system.wait is None else system.wait(x)

    live = (batch < shared.tree.capacity) & (rank < system.stages)
    cache, x = over_live_rows(system.costs.stage.sizes(system.schedule.width), live, stage, local.cache, (batch, x))
    state, drafted = draft(system, weights.drafter, local.drafter, shared, x)

    # Exchange. What every rank has drafted alike is broadcast too: it is small, and the path is one. The bits of the
    # stages do not overlap, so that all ranks know a part of them.
    found = soundness.to_bits(soundness.not_finite(x, live), rank, system.stages)
    known = [(drafted, leads() & (rank == system.drafting_rank)), (found, leads())]
    received, hidden, (drafted, found) = pass_on(x, system.stages, known)
    share = system.drafter.share(weights.drafter, drafted, exit_view(system, shared)) if system.exit else ()
    leaving = shared.pipe[-1]
    part = run_head(
        target,
        weights.target,
        system.sampling,
        shared.sampling,
        hidden,
        tree.at(shared.tree.position, leaving, 0) + 1,
        leaving < shared.tree.capacity,
        system.costs.head.sizes(system.schedule.width),
    )
    part, share = gather_over_devices((part, share))
    choice, log_prob = vocabulary.choose(part)

    shared = note_unsound(shared, soundness.from_bits(found, system.stages), log_prob)
    if system.exit:
        nodes, steps = draft_at_exit(system, shared, drafted, share)
    else:
        fields, steps = drafted
        nodes = keep_guesses(shared.tree, steps).replace(**fields)
    grown = record(system, shared, nodes, steps, choice, log_prob)
    moment = Moment(sent=shared, steps=steps, grown=grown)
    return walk(system.schedule, grown), Local(x=received, cache=cache, drafter=state), moment


def draft(system: System, params: Any, state: Any, shared: Shared, x: jax.Array) -> tuple[Any, Any]:
    """The tick's draft steps, on the drafter's rank alone if it has one; `x [W, D]` is what this rank's stage gave.

    Returns:
        The drafter's state, and what all shall know: the tree's fields that may have changed, but for the guesses, and
        the steps, which hold these; at an exit the drafter's offer. Elsewhere than on that rank it is zeros.
    """

    @jax.jit
    def run(state: Any) -> tuple[Any, Any]:
        if system.exit:
            return system.drafter.offer(params, state, exit_view(system, shared, x))
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
    nodes, steps = shared.tree, []
    for step in range(system.draft_steps):
        nodes, frontier = system.schedule.frontier(nodes, step)
        nodes, frontier = give_slots(nodes, shared.committed, frontier)
        view = make_view(system, shared, nodes, frontier, system.costs.draft)
        state, proposals = system.drafter.propose(params, state, view)
        nodes, taken = take_proposals(system, nodes, frontier, proposals)
        steps.append(taken)
    if not steps:
        none = jnp.zeros((0, system.schedule.width), jnp.int32)
        guess = jnp.zeros((*none.shape, nodes.children), jnp.int32)
        return state, nodes, DraftSteps(none, none, none, guess, guess.astype(jnp.float32))
    return state, nodes, jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps)


def exit_view(system: System, shared: Shared, hidden: jax.Array | None = None) -> View:
    """What the drafter at an exit sees: the nodes that pass it in this tick, and on its rank their hidden rows."""
    frontier = shared.pipe[system.exit - 1]
    # An exit head is part of its stage, and has its rows.
    return make_view(system, shared, shared.tree, frontier, system.costs.stage, hidden)


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
    hidden: jax.Array | None = None,
) -> View:
    """What the drafter sees of these nodes; `costs` say which numbers of rows are worth a program of their own."""
    return View(
        tree=nodes,
        text=shared.text,
        committed=shared.committed,
        frontier=frontier,
        hidden=hidden,
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


def record(
    system: System,
    shared: Shared,
    nodes: PredictionTree,
    steps: DraftSteps,
    choice_W: jax.Array,
    log_prob_W: jax.Array,
) -> Shared:
    """The drafted tree with the target's choices, and what the tick has cost."""
    extended = jnp.sum(steps.node < nodes.capacity, axis=1, dtype=jnp.int32)
    drafting = jnp.sum(system.costs.draft.of(extended))
    rows = jnp.sum(shared.pipe < nodes.capacity, axis=1, dtype=jnp.int32)
    passing = rows[system.exit - 1] if system.exit else None
    cost = shared.cost + system.costs.of(jnp.max(rows), drafting, rows[-1], passing)
    return shared.replace(tree=tree.record(nodes, shared.pipe[-1], choice_W, log_prob_W), cost=cost)


def note_unsound(shared: Shared, place_NW: jax.Array, log_prob_W: jax.Array) -> Shared:
    """Remember the first place at which each row of the pipe was not finite: a stage, or the logits of what leaves."""
    capacity, stages = shared.tree.capacity, shared.pipe.shape[0]
    logits = jnp.where(jnp.isfinite(log_prob_W), 0, stages + 1)
    place_NW = place_NW.at[-1].set(jnp.where(place_NW[-1] > 0, place_NW[-1], logits))
    place_NW = jnp.where(shared.pipe < capacity, place_NW, 0)

    def note(unsound: jax.Array) -> jax.Array:
        here = jnp.zeros_like(unsound).at[shared.pipe].max(place_NW, mode="drop")
        return jnp.where(unsound > 0, unsound, here)

    return shared.replace(unsound=lax.cond(jnp.any(place_NW > 0), note, lambda unsound: unsound, shared.unsound))


def stuck(shared: Shared) -> jax.Array:
    """Where the answer cannot go on, `[]` int32 as in `soundness`: the root has its choice, but from an unsound row."""
    root = shared.tree.root
    return jnp.where(shared.spoiled > 0, shared.spoiled, jnp.where(shared.tree.known[root], shared.unsound[root], 0))


def send(system: System, shared: Shared) -> Shared:
    """Start a tick: the next batch gets its slots and enters the pipe, and what is in flight moves one stage on."""
    count = shared.tick + 1
    nodes, batch = system.schedule.next_batch(shared.tree)
    nodes, batch = give_slots(nodes, shared.committed, batch)
    return shared.replace(
        tree=tree.send(nodes, batch, count),
        pipe=jnp.concatenate((batch[None], shared.pipe[:-1])),
        tick=count,
        sent=shared.sent + jnp.sum(batch < nodes.capacity, dtype=jnp.int32),
        unsound=shared.unsound.at[batch].set(0, mode="drop"),
    )


def walk(schedule: Schedule, shared: Shared) -> Shared:
    """Move the root forward along the target's choices until one is not known yet, or the answer is complete.

    A choice that was sent as a child of the root is a hit: the child becomes the root and the rest is pruned. On a
    miss the choice becomes a new root, to be sent next, and everything in flight is dropped; what was drafted below
    it, where it is a node that waits, stays. Rows of pruned nodes become "none" here, in the same
    update that frees their places. A schedule that drafts first and verifies then holds the walk back until all it has
    sent is verified.
    """
    ready = schedule.ready(shared.tree)

    def more(shared: Shared) -> jax.Array:
        return ready & shared.tree.known[shared.tree.root] & (stuck(shared) == 0) & ~shared.text.done

    def step(shared: Shared) -> Shared:
        old = shared.tree
        token = old.choice[old.root]
        child = tree.find_child(old, token)
        hit = tree.at(old.sent, child, False)
        there = child < old.capacity
        delay = jnp.where(hit, tree.at(old.sent_tick, child, 0) - old.sent_tick[old.root], transcript.MISS)
        new = lax.cond(
            there,
            lambda: tree.advance(old, child),
            lambda: tree.plant(old.capacity, old.children, token, old.position[old.root] + 1),
        )
        return shared.replace(
            tree=new,
            text=transcript.commit(shared.text, token, shared.tick, shared.cost, delay, old.choice_log_prob[old.root]),
            committed=shared.committed.at[old.slot[old.root]].set(True, mode="drop"),
            pipe=jnp.where(there & tree.at(new.alive, shared.pipe, False), shared.pipe, old.capacity),
        )

    return lax.while_loop(more, step, shared)


def run_ticks(
    system: System,
    weights: Weights,
    shared: Shared,
    local: Local,
    new_tokens: jax.Array,
    max_ticks: jax.Array,
) -> tuple[Shared, Local]:
    """Tick until `new_tokens` more are committed, the answer is complete or stuck, or `max_ticks` have passed."""

    def step(carry: tuple[Shared, Local]) -> tuple[Shared, Local]:
        return tick(system, weights, *carry)

    return loop(step, (shared, local), new_tokens, max_ticks)


def loop(step: Callable[[Any], Any], carry: Any, new_tokens: jax.Array, max_ticks: jax.Array) -> Any:
    """Repeat a tick as `run_ticks` does; what is carried is a tuple whose first is the shared state."""
    goal = carry[0].text.length + new_tokens
    last = carry[0].tick + max_ticks

    def more(carry: Any) -> jax.Array:
        shared = carry[0]
        return ~shared.text.done & (shared.text.length < goal) & (shared.tick < last) & (stuck(shared) == 0)

    return lax.while_loop(more, step, carry)
