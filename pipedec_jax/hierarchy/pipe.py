"""One model of a hierarchy as a pipe: it reads the buffer below, verifies it, and writes its own.

PipeSpec's loop (arXiv 2505.01572) for model M_i of M_0 .. M_k with output buffer O_i, and where each step of it is:

1. Where O_i is not what a model above holds, it is rolled back to that (`step`, `buffers.aligned`).
2. M_i takes what O_(i-1) holds beyond O_i, or with nothing to verify its own last token (`make_pass`,
   `buffers.continuation`, `send`), and runs it in one pass (`compute`).
3. It appends to O_i the prefix that it agrees with, and one token of its own (`append`).
4. It publishes O_i, for M_(i-1) to follow and M_(i+1) to verify (`publish`), and goes on without waiting for either.
   All ends when O_k is complete.

A pass is a tick of the pipe's stages (one stage: a whole pass of the model): the next rows enter, at most W, and others
leave. A token's slot in the cache is its position and the mask is causal, so a rollback only moves the cursor of what
was read back: the right tokens are written over the wrong ones. `fed` remembers what was read where, and is compared
with the text before every pass; rows in flight that no longer belong to it are dropped.

Everything here runs under `shard_map` over the stages of this model alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from pipedec_jax import soundness, vocabulary
from pipedec_jax.cache import Rows, chunk_rows
from pipedec_jax.exchange import AXIS, gather_over_devices, leads, pass_on, sum_over_devices
from pipedec_jax.hierarchy.buffers import Buffer, aligned, complete, continuation, difference, pack, unpack
from pipedec_jax.pipeline.prefill import RequestArrays
from pipedec_jax.pipeline.stage import StageCache, Target, TargetParams, run_head, run_stage
from pipedec_jax.pipeline.state import Local
from pipedec_jax.sampling import SamplingMode
from pipedec_jax.tick_costs import over_live_rows
from pipedec_jax.transcript import MISS


@dataclasses.dataclass(frozen=True)
class Pipe:
    """What is known of one model's pipe at compile time."""

    width: int
    """Most tokens that a pass reads (W)."""
    target: Target | None
    """The model; `None` for one whose words are known (`program.KnownModel`)."""
    mode: SamplingMode
    sizes: tuple[int, ...]
    """Numbers of rows that are computed, rising, the last one W: a pass computes the least that holds what it reads."""
    stages: int = 1
    """Stages (N), of known words as well: what is read leaves so many passes later."""


class State(struct.PyTreeNode):
    """The state of a pipe that is the same on all its ranks. T is the capacity, N the stages."""

    own: Buffer
    fed: jax.Array
    """[T] int32: the token that was read at each position, up to `sent`."""
    sent: jax.Array
    """[] int32: up to here the cache holds, or will hold when the rows in flight have passed, the text."""
    start: jax.Array
    """[N] int32: the first position of the rows at each stage."""
    count: jax.Array
    """[N] int32: how many rows there are, those dropped since not counted."""
    entered: jax.Array
    """[T] int32: the pass in which each position was read."""
    tick: jax.Array
    """[T] int32: the pass in which each token of the buffer was appended."""
    delay: jax.Array
    """[T] int32: as `transcript.Transcript.delay`, in passes."""
    log_prob: jax.Array
    """[T] float32: the model's log-probability of each token it appended."""
    said: jax.Array
    """[T] int32: what the model chose for each position when it last read the text before it, appended or not."""
    passes: jax.Array
    """[] int32: passes made."""
    read: jax.Array
    """[] int32: rows read in all of them."""
    rollbacks: jax.Array
    """[] int32: times the buffer was rolled back."""
    undone: jax.Array
    """[] int32: tokens it lost to that."""
    unsound: jax.Array
    """[N, W] int32: where the rows at each stage first gave anything but numbers (`soundness`), 0 for nowhere."""
    stuck: jax.Array
    """[] int32: the place of the row, or in prefill, that the next token would have come from; 0 while all is well."""
    stuck_pass: jax.Array
    """[] int32: the pass in which that row was read; 0 for prefill."""


def begin(pipe: Pipe, request: RequestArrays, spoiled: jax.Array | None = None) -> State:
    """The state after prefill, spoiled where that says so: the prompt's last token is the first to be read."""
    T, N = request.prompt.shape[0], pipe.stages
    zero = jnp.zeros((), jnp.int32)
    return State(
        own=Buffer(token=request.prompt, length=request.length),
        fed=request.prompt,
        sent=request.length - 1,
        start=jnp.zeros(N, jnp.int32),
        count=jnp.zeros(N, jnp.int32),
        entered=jnp.zeros(T, jnp.int32),
        tick=jnp.zeros(T, jnp.int32),
        delay=jnp.zeros(T, jnp.int32),
        log_prob=jnp.zeros(T, jnp.float32),
        said=jnp.zeros(T, jnp.int32),
        passes=zero,
        read=zero,
        rollbacks=zero,
        undone=zero,
        unsound=jnp.zeros((N, pipe.width), jnp.int32),
        stuck=zero if spoiled is None else spoiled,
        stuck_pass=zero,
    )


def publish(state: State) -> jax.Array:
    """The buffer as others see it (see `buffers.pack`)."""
    return pack(state.own, state.passes, state.rollbacks, state.undone, state.stuck)


def step(
    pipe: Pipe,
    weights: Any,
    request: RequestArrays,
    state: State,
    local: Local,
    below: jax.Array | None,
    above: Sequence[jax.Array],
    control: jax.Array,
) -> tuple[tuple[State, jax.Array], Local]:
    """Follow the models above, then make some passes.

    Args:
        pipe: this model, M_i.
        weights: its `TargetParams`; its words `[T]` where they are known.
        request: what is decoded.
        state: of the pipe, O_i in it.
        local: of each rank.
        below: the published buffer of the next smaller model, O_(i-1); `None` for the smallest.
        above: those of the larger models, O_(i+1) first.
        control: `[2]` int32: the most passes to make, and the most tokens to be ahead of the target.

    Returns:
        The state with the buffer to publish, and the ranks' own state.
    """
    uppers = [unpack(packed) for packed in above]
    lower = unpack(below) if below is not None else None
    own = aligned([state.own, *uppers])[0]
    border = difference(state.own, own)
    rolled = border < own.token.shape[0]
    state = state.replace(
        own=own,
        rollbacks=state.rollbacks + rolled.astype(jnp.int32),
        undone=state.undone + jnp.where(rolled, state.own.length - border, 0),
    )
    first = state.passes

    def more(carry: tuple[State, Local]) -> jax.Array:
        state, _ = carry
        done = complete(state.own, request.length, request.limit, request.end_token)
        ahead = state.own.length - uppers[-1].length if uppers else jnp.zeros((), jnp.int32)
        if not uppers:  # a smaller model is helped on by those above
            done |= state.stuck > 0
        return (state.passes - first < control[0]) & (ahead < control[1]) & ~done

    def once(carry: tuple[State, Local]) -> tuple[State, Local]:
        return make_pass(pipe, weights, request, *carry, lower)

    state, local = lax.while_loop(more, once, (state, local))
    return (state, publish(state)), local


def make_pass(
    pipe: Pipe, weights: Any, request: RequestArrays, state: State, local: Local, below: Buffer | None
) -> tuple[State, Local]:
    """One tick of the pipe: rows enter, all stages work, rows leave, their choices are compared."""
    state = send(pipe, state, continuation(state.own, below) if below is not None else state.own)
    if pipe.target is None:
        after = state.start[-1] + 1 + jnp.arange(pipe.width, dtype=jnp.int32)
        choice = weights.at[after].get(mode="clip")
        return append(pipe, state, request, choice, jnp.zeros(choice.shape, jnp.float32)), local
    choice, log_prob, place, local = compute(pipe, pipe.target, weights, request, state, local)
    state = state.replace(unsound=jnp.where(state.unsound > 0, state.unsound, place))
    return append(pipe, state, request, choice, log_prob), local


def send(pipe: Pipe, state: State, source: Buffer) -> State:
    """Drop what is in flight and does not belong to the text, move the rest on, and let the next rows in."""
    T = state.fed.shape[0]
    position = jnp.arange(T, dtype=jnp.int32)
    stale = (state.fed != source.token) | (position >= source.length)
    sent = jnp.minimum(state.sent, jnp.min(jnp.where(stale, position, T)))
    end = jnp.minimum(sent + pipe.width, source.length)
    new = (position >= sent) & (position < end)
    kept = jnp.clip(sent - state.start, 0, state.count)
    passes = state.passes + 1
    return state.replace(
        fed=jnp.where(new, source.token, state.fed),
        sent=end,
        start=jnp.concatenate((sent[None], state.start[:-1])),
        count=jnp.concatenate(((end - sent)[None], kept[:-1])),
        unsound=jnp.roll(state.unsound, 1, axis=0).at[0].set(0),
        entered=jnp.where(new, passes, state.entered),
        passes=passes,
        read=state.read + end - sent,
    )


def compute(
    pipe: Pipe, target: Target, params: TargetParams, request: RequestArrays, state: State, local: Local
) -> tuple[jax.Array, jax.Array, jax.Array, Local]:
    """All stages at once; choices `[W]` of what leaves, log-probabilities, and where rows are unsound `[N, W]`."""
    W, T = pipe.width, request.prompt.shape[0]
    rank = lax.axis_index(AXIS)
    token = state.fed.at[state.start[0] + jnp.arange(W, dtype=jnp.int32)].get(mode="clip")
    embedded = sum_over_devices(vocabulary.embed_part(params.embedding, token))
    x = jnp.where(rank == 0, embedded, local.x)
    start, count = state.start[rank], state.count[rank]

    row = jnp.arange(W, dtype=jnp.int32)

    def stage(cache: StageCache, batch: tuple[Rows, jax.Array]) -> tuple[StageCache, jax.Array]:
        return run_stage(target, params, cache, *batch)

    rows = chunk_rows(start, W, start + count, T)
    cache, x = over_live_rows(pipe.sizes, row < count, stage, local.cache, (rows, x))
    found = soundness.to_bits(soundness.not_finite(x, row < count), rank, pipe.stages)
    received, hidden, (found,) = pass_on(x, pipe.stages, [(found, leads())])
    local = local.replace(x=received, cache=cache)
    after, live = state.start[-1] + 1 + row, row < state.count[-1]
    part, _ = run_head(target, params, pipe.mode, request.sampling, hidden, after, live, pipe.sizes)
    choice, log_prob = vocabulary.choose(gather_over_devices(part))
    return choice, log_prob, soundness.places(found, log_prob, pipe.stages), local


def append(pipe: Pipe, state: State, request: RequestArrays, choice: jax.Array, log_prob: jax.Array) -> State:
    """Compare the choices of the rows that leave with what was read after them, and append what is new.

    Nothing is appended from a row that is not finite: there the pipe is stuck.
    """
    T, length = state.fed.shape[0], state.own.length
    position = jnp.arange(T, dtype=jnp.int32)
    row = position - state.start[-1] - 1  # that chose the token of each position
    chosen = (row >= 0) & (row < state.count[-1])
    row = jnp.clip(row, 0, pipe.width - 1)
    token = choice[row]
    agrees = (token == state.fed) & (position < state.sent)
    # Rows read to catch up with the models above choose what is long decided.
    undecided = chosen & (position >= length)
    ends = jnp.any(token[:, None] == request.end_token[None, :], axis=1)
    last = undecided & (~agrees | ends)
    new = undecided & (position <= jnp.min(jnp.where(last, position, T))) & (position < request.limit)
    place = state.unsound[-1][row]
    border = jnp.min(jnp.where(new & (place > 0), position, T))
    stuck = border < T
    new &= position < border
    # What was read beyond a wrong token is dropped at once, and a choice that is not appended made again: were the
    # token rolled back to what had been read, later rows would choose for places that the buffer does not reach yet.
    wrong = new & (token != state.fed)
    unused = jnp.min(jnp.where(undecided & ~new, position, T)) - 1
    delay = jnp.where(agrees, state.entered - jnp.roll(state.entered, 1), MISS)
    return state.replace(
        sent=jnp.minimum(state.sent, jnp.minimum(unused, jnp.min(jnp.where(wrong, position, T)))),
        own=Buffer(jnp.where(new, token, state.own.token), length + jnp.sum(new, dtype=jnp.int32)),
        tick=jnp.where(new, state.passes, state.tick),
        delay=jnp.where(new, delay, state.delay),
        log_prob=jnp.where(new, log_prob.astype(jnp.float32)[row], state.log_prob),
        said=jnp.where(chosen, token, state.said),
        stuck=jnp.where(stuck, place.at[border].get(mode="clip"), state.stuck),
        stuck_pass=jnp.where(stuck, state.entered.at[border - 1].get(mode="clip"), state.stuck_pass),
    )
