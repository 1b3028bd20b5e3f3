"""The most likely tokens of a vocabulary that is sliced over the devices are those of the whole one."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pipedec_jax import transcript, tree
from pipedec_jax.drafters.base import Proposals, View
from pipedec_jax.drafters.chances import Noise, likely_part, most_likely, most_likely_of
from pipedec_jax.exchange import AXES, gather_over_devices
from pipedec_jax.pipeline import placement
from pipedec_jax.sampling import Sampling, SamplingArrays, SamplingMode
from pipedec_jax.vocabulary import shard_size

W = 3
"""Rows, the last of them none."""
CASES: list[tuple[int, int, int, int]] = [(17, 17, 1, 4), (23, 17, 3, 5), (20, 19, 7, 8), (5, 3, 9, 3), (64, 61, 4, 1)]
"""Rows of the matrix, tokens, devices, guesses: odd sizes, slices of fewer tokens than guesses, and of none."""
WAYS: dict[str, tuple[Sampling, Noise]] = {
    "greedy": (Sampling(), "shared"),
    "drawn": (Sampling(0.7, seed=5), "shared"),
    "drawn under other noise": (Sampling(1.3, seed=5), "independent"),
    "drawn, guessed without noise": (Sampling(0.7, seed=5), "none"),
    "top-k and top-p": (Sampling(0.9, 9, 0.8, 5), "shared"),
    "top-k, guessed without noise": (Sampling(0.9, 2, seed=5), "none"),
}


def view(sampling: SamplingArrays, mode: SamplingMode) -> View:
    """Two nodes, at positions 6 and 7."""
    nodes = tree.plant(4, 1, jnp.int32(1), jnp.int32(6))
    nodes = tree.guess(nodes, jnp.zeros(1, jnp.int32), jnp.ones((1, 1), jnp.int32), jnp.zeros((1, 1)))
    nodes, _ = tree.add(nodes, jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
    text = transcript.begin(jnp.zeros(8, jnp.int32), jnp.int32(7), jnp.int32(8), jnp.asarray([-1]))
    frontier = jnp.asarray([1, 0, 4], jnp.int32)
    return View(nodes, text, jnp.zeros(8, bool), frontier, sampling, mode, (W,))


@functools.cache
def both(rows: int, vocab: int, devices: int, children: int, way: str) -> Any:
    """A program that gives the guesses over the slices, and over the whole vocabulary."""
    mode, noise = WAYS[way][0].mode, WAYS[way][1]
    size = shard_size(rows, devices)

    def run(sampling: SamplingArrays, logit_WVr: jax.Array, whole_WV: jax.Array) -> tuple[Proposals, Proposals]:
        seen = view(sampling, mode)
        token = jax.lax.axis_index(AXES) * size + jnp.arange(size, dtype=jnp.int32)
        logit_WVr = jnp.where((token < vocab)[None, :], logit_WVr, -jnp.inf)
        part = likely_part(logit_WVr, seen, seen.frontier, children, vocab, 1.2, noise)
        found = most_likely_of(gather_over_devices(part), seen, children, vocab, 1.2, noise)
        return found, most_likely(whole_WV, seen, seen.frontier, children, 1.2, noise)

    spread = jax.shard_map(
        run, mesh=placement.make_mesh(devices), in_specs=(P(), P(None, AXES), P()), out_specs=(P(), P())
    )
    return jax.jit(spread)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rows", "vocab", "devices", "children"), CASES)
def test_guesses_over_slices_are_those_over_the_whole_vocabulary(
    rows: int, vocab: int, devices: int, children: int, way: str
) -> None:
    program = both(rows, vocab, devices, children, way)

    @hypothesis.settings(max_examples=10, deadline=None)
    @hypothesis.given(seed=st.integers(0, 2**32 - 1), ties=st.booleans())
    def check(seed: int, ties: bool) -> None:
        logit = np.random.default_rng(seed).normal(scale=3, size=(W, vocab)).astype(np.float32)
        logit = np.round(logit) + 0.0 if ties else logit  # one zero only: top_k tells the two apart
        # Rows that are padding hold large numbers, which must not count.
        padded = np.full((W, devices * shard_size(rows, devices)), 50, np.float32)
        padded[:, :vocab] = logit
        found, whole = program(WAYS[way][0].arrays(), padded, logit)
        assert np.array_equal(found.token[:2], whole.token[:2])
        np.testing.assert_allclose(found.log_prob[:2], whole.log_prob[:2], rtol=1e-5, atol=1e-5)

    check()


@pytest.mark.parametrize("way", ["greedy", "drawn"])
def test_a_slice_that_is_no_number_leaves_no_guess_of_that_row(way: str) -> None:
    program = both(23, 17, 3, 5, way)
    logit = np.random.default_rng(0).normal(size=(W, 24)).astype(np.float32)
    logit[0, 12] = np.nan
    found, _ = program(WAYS[way][0].arrays(), logit, logit[:, :17])
    assert np.all(np.isnan(found.log_prob[0]))
    assert np.all(np.isfinite(found.log_prob[1]))
