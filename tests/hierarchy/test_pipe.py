"""What of a pipe can be seen without a model: which rows enter it, and which are dropped."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from pipedec_jax.hierarchy.buffers import Buffer
from pipedec_jax.hierarchy.pipe import Pipe, begin, send
from pipedec_jax.pipeline.engine import make_request
from pipedec_jax.sampling import GREEDY


def test_rows_read_beyond_a_buffer_that_has_become_shorter_are_dropped() -> None:
    """Also where what is stale behind its end is still what was read."""
    pipe = Pipe(width=2, target=None, mode=GREEDY.mode, sizes=(2,), stages=2)
    state = begin(pipe, make_request([5], 7, 8, GREEDY))
    source = Buffer(token=jnp.asarray([5, 6, 7, 8, 0, 0, 0, 0], jnp.int32), length=jnp.int32(4))
    for _ in range(2):
        state = send(pipe, state, source)
    assert (int(state.sent), state.start.tolist(), state.count.tolist(), int(state.read)) == (4, [2, 0], [2, 2], 4)
    state = send(pipe, state, dataclasses.replace(source, length=jnp.int32(3)))
    assert (int(state.sent), state.start.tolist(), state.count.tolist(), int(state.read)) == (3, [3, 2], [0, 1], 4)
