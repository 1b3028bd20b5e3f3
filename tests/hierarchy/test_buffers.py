"""Buffers against plain Python lists."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
from hypothesis import given

from pipedec_jax.hierarchy import buffers
from pipedec_jax.hierarchy.buffers import Buffer

T = 12
texts = st.lists(st.integers(0, 1), min_size=1, max_size=T)


def make(text: list[int]) -> Buffer:
    """With stale tokens behind the text."""
    token = np.full(T, 7, np.int32)
    token[: len(text)] = text
    return Buffer(token=jnp.asarray(token), length=jnp.asarray(len(text), jnp.int32))


def read(buffer: Buffer) -> list[int]:
    return buffer.token[: int(buffer.length)].tolist()


def differ(one: list[int], two: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), T)


@given(mine=texts, upper=texts)
def test_a_buffer_follows_the_one_above(mine, upper):
    found = read(buffers.follow(make(mine), make(upper)))
    assert buffers.difference(make(mine), make(upper)) == differ(mine, upper)
    if differ(mine, upper) < T:
        assert found == upper
    else:
        assert found == max(mine, upper, key=len)


@given(chain=st.lists(texts, min_size=1, max_size=4))
def test_aligned_buffers_continue_each_other_from_the_target_down(chain):
    found = [read(buffer) for buffer in buffers.aligned([make(text) for text in chain])]
    assert found[-1] == chain[-1]
    for smaller, larger in itertools.pairwise(found):
        assert smaller[: len(larger)] == larger


@given(own=texts, below=texts)
def test_only_a_buffer_that_continues_ones_own_is_worth_verifying(own, below):
    continues = below[: len(own)] == own and len(below) > len(own)
    assert read(buffers.continuation(make(own), make(below))) == (below if continues else own)


@given(text=texts, prompt=st.integers(1, T), limit=st.integers(1, T + 1))
def test_an_answer_is_complete_at_its_limit_or_with_an_end_token_of_its_own(text, prompt, limit):
    end = jnp.asarray([1, -1], jnp.int32)
    found = buffers.complete(make(text), jnp.int32(prompt), jnp.int32(limit), end)
    assert found == (len(text) >= limit or (text[-1] == 1 and len(text) > prompt))


@given(text=texts, passes=st.integers(0, 9))
def test_what_is_published_can_be_read(text, passes):
    numbers = [jnp.asarray(number, jnp.int32) for number in (passes, 3, 5, 2)]
    packed = buffers.pack(make(text), *numbers)
    assert read(buffers.unpack(packed)) == text
    assert dict(zip(buffers.FIGURES, packed.tolist(), strict=False)) == {
        "length": len(text),
        "passes": passes,
        "rollbacks": 3,
        "undone": 5,
        "stuck": 2,
    }
