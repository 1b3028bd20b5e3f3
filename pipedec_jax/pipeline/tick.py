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

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pipedec_jax import soundness, transcript, tree, vocabulary
from pipedec_jax.cache import give_slots, tree_rows
from pipedec_jax.exchange import AXIS, gather_over_devices, leads, pass_on, sum_over_devices
from pipedec_jax.pipeline.drafting import draft, draft_at_exit, head_rows, keep_guesses, share_at_exit
from pipedec_jax.pipeline.stage import StageCache, run_head, run_stage
from pipedec_jax.pipeline.state import DraftSteps, Local, Moment, Shared, System, Weights
from pipedec_jax.schedules.base import Schedule, check_chosen
from pipedec_jax.tick_costs import over_live_rows
from pipedec_jax.tree import PredictionTree


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
    beside = head_rows(system, weights.drafter, shared, drafted)
    leaving = shared.pipe[-1]
    part, logit = run_head(
        target,
        weights.target,
        system.sampling,
        shared.sampling,
        hidden,
        tree.at(shared.tree.position, leaving, 0) + 1,
        leaving < shared.tree.capacity,
        system.costs.head.sizes(system.schedule.width * (1 if beside is None else 2)),
        beside,
    )
    share = share_at_exit(system, weights.drafter, shared, drafted, logit)
    part, share = gather_over_devices((part, share))
    choice, log_prob = vocabulary.choose(part)

    shared = note_unsound(shared, soundness.places(found, log_prob, system.stages))
    if system.exit:
        nodes, steps = draft_at_exit(system, shared, drafted, share)
    else:
        fields, steps = drafted
        nodes = keep_guesses(shared.tree, steps).replace(**fields)
    grown = record(system, shared, nodes, steps, choice, log_prob)
    moment = Moment(sent=shared, steps=steps, grown=grown)
    return walk(system.schedule, grown), Local(x=received, cache=cache, drafter=state), moment


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


def note_unsound(shared: Shared, place_NW: jax.Array) -> Shared:
    """Remember the first place at which each row of the pipe was not finite: a stage, or the logits of what leaves."""
    place_NW = jnp.where(shared.pipe < shared.tree.capacity, place_NW, 0)

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
    schedule = system.schedule
    nodes, batch = check_chosen(schedule, "next_batch", shared.tree, schedule.next_batch(shared.tree))
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

    A choice that was sent as a child of the root is a hit: the child becomes the root and the rest is pruned. On a miss
    the choice becomes a new root, to be sent next, and everything in flight is dropped; what was drafted below it,
    where it is a node that waits, stays. Rows of pruned nodes become "none" here, in the same update that frees their
    places. A schedule that drafts first and verifies then holds the walk back until all it has sent is verified.
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

    # The first step is a choice of its own: a GPU makes one by itself, where each look at a loop's condition waits for
    # the host, and in most ticks one token is committed.
    shared = lax.cond(more(shared), step, lambda shared: shared, shared)
    return shared if schedule.level_by_level else lax.while_loop(more, step, shared)


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
