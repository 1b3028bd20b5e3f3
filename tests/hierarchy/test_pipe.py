"""What of a pipe can be seen without a model: which rows enter it, and which are dropped."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from pipedec_jax.hierarchy.buffers import Buffer
from pipedec_jax.hierarchy.pipe import Pipe, append, begin, send
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


def test_rows_behind_one_that_is_not_finite_are_dropped_and_its_choice_is_made_again() -> None:
    """They would choose for places that the buffer does not reach, and leave a hole in it."""
    pipe = Pipe(width=3, target=None, mode=GREEDY.mode, sizes=(3,), stages=2)
    state = begin(pipe, make_request([5], 7, 8, GREEDY))
    state = state.replace(
        fed=jnp.asarray([5, 6, 7, 8, 9, 0, 0, 0], jnp.int32),
        sent=jnp.int32(5),
        start=jnp.asarray([3, 0], jnp.int32),
        count=jnp.asarray([2, 3], jnp.int32),
        entered=jnp.asarray([11, 12, 13, 14, 15, 0, 0, 0], jnp.int32),
        unsound=jnp.asarray([[0, 0, 0], [0, 2, 1]], jnp.int32),
    )
    request = make_request([5], 7, 8, GREEDY)
    found = append(pipe, state, request, jnp.asarray([6, 7, 8], jnp.int32), jnp.asarray([-1.0, jnp.nan, -3.0]))
    assert found.own.token[: int(found.own.length)].tolist() == [5, 6]
    assert (int(found.stuck), int(found.stuck_pass), int(found.sent)) == (2, 12, 1)
    found = send(pipe, found, found.own)
    assert (found.start.tolist(), found.count.tolist()) == ([1, 3], [1, 0])


def test_choices_behind_a_wrong_token_are_made_again_where_a_larger_model_has_said_what_was_read() -> None:
    pipe = Pipe(width=3, target=None, mode=GREEDY.mode, sizes=(3,))
    request = make_request([5], 7, 8, GREEDY)
    state = begin(pipe, request).replace(
        fed=jnp.asarray([5, 6, 7, 8, 0, 0, 0, 0], jnp.int32), sent=jnp.int32(4), count=jnp.asarray([3], jnp.int32)
    )
    found = append(pipe, state, request, jnp.asarray([9, 7, 8], jnp.int32), jnp.zeros(3))
    assert found.own.token[: int(found.own.length)].tolist() == [5, 9]
    helped = Buffer(token=state.fed, length=jnp.int32(2))
    found = send(pipe, found, helped)
    assert (found.start.tolist(), found.count.tolist()) == ([1], [1])
