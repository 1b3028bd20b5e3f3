"""Prefill: the prompt, all but its last token, goes through the same stages in chunks, one chunk a tick.

Slots are positions and the mask is causal; the drafter takes each chunk beside the first stage, an exit head behind
its own. The prompt's last token is not part of it: it is the first root.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from pipedec_jax import soundness, transcript, vocabulary
from pipedec_jax.cache import chunk_rows
from pipedec_jax.exchange import AXIS, gather_over_devices, sum_over_devices, to_next_stage, vary
from pipedec_jax.pipeline.stage import run_stage_where
from pipedec_jax.pipeline.state import Local, Shared, System, Weights
from pipedec_jax.sampling import SamplingArrays
from pipedec_jax.tree import plant


class RequestArrays(struct.PyTreeNode):
    """What to decode, as arrays (`decoding.stream.Request` on the devices). S is the capacity."""

    prompt: jax.Array
    """[S] int32: the prompt's tokens, then anything."""
    length: jax.Array
    """[] int32: tokens of the prompt, at least 1."""
    limit: jax.Array
    """[] int32: length of prompt and answer at which the answer is complete."""
    end_token: jax.Array
    """[E] int32: tokens that complete the answer, padded with -1."""
    sampling: SamplingArrays


def begin(system: System, request: RequestArrays, spoiled: jax.Array) -> Shared:
    """The replicated state before the first tick: the prompt's last token is the root, nothing is in flight."""
    slots, width = request.prompt.shape[0], system.schedule.width
    capacity = system.schedule.capacity(system.stages)
    last = request.length - 1
    return Shared(
        tree=plant(capacity, system.drafter.children, request.prompt[last], last),
        text=transcript.begin(request.prompt, request.length, request.limit, request.end_token),
        committed=jnp.arange(slots, dtype=jnp.int32) < last,
        pipe=jnp.full((system.stages, width), capacity, jnp.int32),
        tick=jnp.zeros((), jnp.int32),
        cost=jnp.zeros((), jnp.float32),
        sent=jnp.zeros((), jnp.int32),
        unsound=jnp.zeros(capacity, jnp.int32),
        spoiled=spoiled,
        sampling=request.sampling,
    )


def prefill(system: System, width: int, weights: Weights, request: RequestArrays, local: Local) -> tuple[Shared, Local]:
    """Fill the caches with the prompt's first `length - 1` tokens, `width` at a time, and begin.

    One compiled program serves every prompt length: the number of chunks is a value, not a shape. A row that is not
    finite spoils the answer: what attends to its keys and values would be some text, but not the model's.
    """
    target, drafter, stages = system.target, system.drafter, system.stages
    rank = lax.axis_index(AXIS)
    slots = request.prompt.shape[0]
    length = request.length - 1
    chunks = (length + width - 1) // width
    token_S = jnp.pad(request.prompt, (0, width))

    def take_chunk(state: Any, chunk: jax.Array, count: jax.Array) -> Any:
        return vary(drafter.prefill(weights.drafter, state, chunk, chunk_rows(count * width, width, length, slots)))

    def step(carry: tuple[jax.Array, jax.Array, jax.Array, Local]) -> tuple[jax.Array, jax.Array, jax.Array, Local]:
        count, bad, x, local = carry
        token = lax.dynamic_slice_in_dim(token_S, jnp.minimum(count * width, slots), width)
        embedded = sum_over_devices(vocabulary.embed_part(weights.target.embedding, token))
        mine = count - rank  # the chunk that has reached this stage
        active = (mine >= 0) & (mine < chunks) & (rank < stages)
        x = jnp.where(rank == 0, embedded, x)
        rows = chunk_rows(mine * width, width, length, slots)
        cache, x = run_stage_where(active, target, weights.target, local.cache, rows, x)
        bad |= jnp.any(soundness.not_finite(x, active & (rows.position < length)))
        if system.exit:
            given, take, which = x, active & (rank == system.drafting_rank), mine
        else:
            given, take, which = token, (rank == stages) & (count < chunks) & (drafter.ranks > 0), count
        state = lax.cond(take, take_chunk, lambda state, *_: state, vary(local.drafter), given, which)
        x = to_next_stage(x, stages)
        return count + 1, bad, x, local.replace(cache=cache, drafter=state)

    def more(carry: tuple[jax.Array, jax.Array, jax.Array, Local]) -> jax.Array:
        return carry[0] < jnp.where(chunks > 0, chunks + stages - 1, 0)

    x = vary(jnp.zeros((width, target.config.width), local.x.dtype))
    bad = vary(jnp.zeros((), bool))
    _, bad, _, local = lax.while_loop(more, step, (jnp.zeros((), jnp.int32), bad, x, local))
    bad_N = jnp.any(gather_over_devices(bad).reshape(-1, target.parts), axis=1)[:stages]
    spoiled = jnp.where(jnp.any(bad_N), jnp.argmax(bad_N).astype(jnp.int32) + 1, 0)
    return begin(system, request, spoiled), local
