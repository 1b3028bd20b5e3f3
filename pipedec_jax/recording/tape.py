"""The recorder on the devices: the loop of ticks, with what passes in each written into arrays of fixed capacity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from pipedec_jax.pipeline.state import Local, Moment, Shared, System, Weights
from pipedec_jax.pipeline.tick import loop, watched_tick

TAPE_TICKS = 64
"""Ticks that a tape holds; the host takes them off, and goes on, when it is full."""


class Frame(struct.PyTreeNode):
    """What is kept of a tick. On a tape every array has an axis of ticks in front.

    N stages, W rows, C places of the tree, R draft steps of F rows, K guesses.
    """

    tick: jax.Array
    """[] int32: from 1 on, at the root's entry into the pipe; 0 where the tape is empty."""
    cost: jax.Array
    """[] float32: what all ticks up to this one have cost."""
    pipe: jax.Array
    """[N, W] int32: the node of every row at every stage in this tick; C for none."""
    frontier: jax.Array
    """[R, F] int32: the nodes that each draft step extended; C for none."""
    frontier_token: jax.Array
    """[R, F] int32: their tokens. A node that a later step dropped has left its place to another."""
    frontier_position: jax.Array
    """[R, F] int32: their positions in the text."""
    guess_token: jax.Array
    """[R, F, K] int32: what was guessed to follow."""
    guess_log_prob: jax.Array
    """[R, F, K] float32: the log-probabilities of that given the node; minus infinity for none."""
    token: jax.Array
    """[C] int32: of the tree's nodes before the root walks; so are the next ones (see `tree.PredictionTree`)."""
    parent: jax.Array
    """[C] int32"""
    position: jax.Array
    """[C] int32"""
    log_prob: jax.Array
    """[C] float32"""
    sent_tick: jax.Array
    """[C] int32"""
    choice: jax.Array
    """[C] int32: the target's token after the node, where it has left the last stage."""
    alive: jax.Array
    """[C] bool"""
    root: jax.Array
    """[] int32"""
    left: jax.Array
    """[C] bool: which of the nodes live on after the walk; where the root is new, that one."""
    new_root: jax.Array
    """[] int32: the root after the walk."""


def frame(moment: Moment, after: Shared) -> Frame:
    """What to keep of a tick that ended so."""
    nodes, steps = moment.grown.tree, moment.steps
    return Frame(
        tick=after.tick,
        cost=after.cost,
        pipe=moment.sent.pipe,
        frontier=steps.node,
        frontier_token=steps.token,
        frontier_position=steps.position,
        guess_token=steps.guess_token,
        guess_log_prob=steps.guess_log_prob,
        token=nodes.token,
        parent=nodes.parent,
        position=nodes.position,
        log_prob=nodes.log_prob,
        sent_tick=nodes.sent_tick,
        choice=nodes.choice,
        alive=nodes.alive,
        root=nodes.root,
        left=after.tree.alive,
        new_root=after.tree.root,
    )


def record_ticks(
    system: System,
    weights: Weights,
    shared: Shared,
    local: Local,
    new_tokens: jax.Array,
    max_ticks: jax.Array,
) -> tuple[tuple[Shared, Frame], Local]:
    """As `tick.run_ticks`, with a tape of the ticks made; `max_ticks` is at most `TAPE_TICKS`."""
    first = shared.tick

    def step(carry: tuple[Shared, Local, Frame]) -> tuple[Shared, Local, Frame]:
        shared, local, tape = carry
        after, local, moment = watched_tick(system, weights, shared, local)
        place = shared.tick - first
        tape = jax.tree.map(lambda held, one: held.at[place].set(one, mode="drop"), tape, frame(moment, after))
        return after, local, tape

    def one(shared: Shared, local: Local) -> Frame:
        after, _, moment = watched_tick(system, weights, shared, local)
        return frame(moment, after)

    shapes = jax.eval_shape(one, shared, local)
    tape = jax.tree.map(lambda leaf: jnp.zeros((TAPE_TICKS, *leaf.shape), leaf.dtype), shapes)
    shared, local, tape = loop(step, (shared, local, tape), new_tokens, max_ticks)
    return (shared, tape), local
