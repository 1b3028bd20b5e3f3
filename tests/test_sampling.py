"""Filters and choice against the oracle and against Hugging Face's warpers, whole and over vocabulary shards."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis.extra.numpy import arrays
from jax.sharding import PartitionSpec as P
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pipedec_jax.config import LlamaConfig
from pipedec_jax.exchange import AXES, gather_over_devices, sum_over_devices
from pipedec_jax.model import llama
from pipedec_jax.pipeline import placement
from pipedec_jax.sampling import Sampling, SamplingArrays, SamplingMode, gumbel_noise, keep, scale
from pipedec_jax.vocabulary import choice_part, choose, embed_part, head_part, noise_part, shard_size
from tests import oracle
from tests.oracle import Draw

W, V = 3, 17

SPREAD = arrays(np.float32, (W, V), elements=st.integers(-800, 800).map(lambda n: n / 64))
"""Logits as they come, but no two nearly equal: those may round to the same probability."""
TIED = arrays(np.float32, (W, V), elements=st.integers(-3, 3).map(float))
"""Logits with many ties."""
LOGITS = SPREAD | TIED
TEMPERATURES = st.sampled_from([0.25, 0.5, 1.0, 2.0]) | st.floats(0.125, 3, width=32)
TOP_K = st.integers(0, V + 3)
TOP_P = st.sampled_from([1.0, 0.5, 0.9, 0.01]) | st.floats(0.01, 1)
EDGE = 1e-5
"""How near to top-p's border float32 sums may land on either side."""


@jax.jit
def kept(sampling: SamplingArrays, logit_WV: jax.Array) -> jax.Array:
    return keep(sampling, scale(sampling, logit_WV))


def at_border(filtered: oracle.Filtered, draw: Draw) -> np.ndarray:
    """Tokens that a rounding error could move over top-p's border."""
    near = np.abs(filtered.cumulative - (1 - draw.top_p)) < EDGE
    # Among equals the order is a convention, so all of them are where one is.
    return np.isin(filtered.scaled, filtered.scaled[near])


@hypothesis.given(logits=LOGITS, temperature=TEMPERATURES, top_k=TOP_K, top_p=TOP_P)
def test_filters_equal_the_oracle(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> None:
    found = np.asarray(kept(Sampling(temperature, top_k, top_p).arrays(), logits))
    for row, logit in zip(found, logits, strict=True):
        draw = Draw(temperature, top_k, top_p)
        filtered = oracle.warp(logit, draw)
        unsure = at_border(filtered, draw)
        assert np.array_equal(row[~unsure], filtered.kept[~unsure])
        assert row[np.argmax(logit)], "the most likely token always stays"


@hypothesis.given(logits=LOGITS, temperature=TEMPERATURES, top_k=TOP_K, top_p=TOP_P)
def test_filters_equal_hugging_face(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> None:
    found = np.asarray(kept(Sampling(temperature, top_k, top_p).arrays(), logits))
    scores: Any = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits))
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    for row, expected, logit in zip(found, torch.isfinite(scores).numpy(), logits, strict=True):
        draw = Draw(temperature, top_k, top_p)
        filtered = oracle.warp(logit, draw)
        unsure = at_border(filtered, draw)
        # Which of several equal tokens stay at top-p's border hangs on torch's sort there; how many does not.
        for value in np.unique(logit[~unsure]):
            same = logit == value
            assert row[same].sum() == expected[same].sum()
        whole = [v for v in np.unique(logit[~unsure]) if (logit == v).sum() == 1 or expected[logit == v].all()]
        certain = np.isin(logit, whole)
        assert np.array_equal(row[certain], expected[certain])


@pytest.mark.parametrize(("top_p", "count"), [(0.25, 2), (0.125, 1), (0.3, 3), (0.75, 6)])
def test_a_top_p_that_is_reached_exactly_takes_no_more_tokens(top_p: float, count: int) -> None:
    """Of eight equal ones, whose sums are exact."""
    logits = np.zeros((1, 8), np.float32)
    assert np.flatnonzero(kept(Sampling(1.0, 0, top_p).arrays(), logits)[0]).tolist() == list(range(count))
    assert oracle.warp(logits[0], Draw(1.0, 0, top_p)).kept.sum() == count


@pytest.mark.parametrize("top_p", [1e-37, 1e-39, 1e-44, 1e-46, 5e-324])
def test_a_top_p_too_small_for_float32_still_keeps_the_most_likely_token(top_p: float, x64: None) -> None:
    for dtype in (np.float32, np.float64):
        logits = np.asarray([[0.5, 2.0, 2.0, 1.0]], dtype)
        assert np.flatnonzero(kept(Sampling(1.0, 0, top_p).arrays(), logits)[0]).tolist() == [1]


def test_both_zeros_are_tied() -> None:
    logits = np.asarray([[-1.0, 0.0, -0.0, 1.0]], np.float32)
    assert np.asarray(kept(Sampling(1.0, 2).arrays(), logits))[0].tolist() == [False, True, True, True]


def test_a_top_p_of_one_keeps_tokens_that_sums_do_not_notice() -> None:
    logits = np.asarray([[0.0, -30.0, -40.0]], np.float32)
    assert np.asarray(kept(Sampling(1.0, 2, 1.0).arrays(), logits))[0].tolist() == [True, True, False]


@hypothesis.given(seed=st.integers(0, 2**32 - 1), position=st.integers(0, 2**17))
def test_noise_is_the_definition(seed: int, position: int) -> None:
    sampling = Sampling(1.0, seed=seed).arrays()
    noise = jax.jit(gumbel_noise, static_argnums=2)(sampling, np.asarray([position], np.int32), V)
    np.testing.assert_allclose(noise[0], oracle.gumbel(seed, position, V), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_a_seed_means_the_same_with_64_bit_types(seed: int) -> None:
    narrow = np.asarray(Sampling(1.0, seed=seed).arrays().key)
    with jax.enable_x64(True):
        wide = np.asarray(Sampling(1.0, seed=seed).arrays().key)
    assert np.array_equal(narrow, wide)


MODES = {
    "greedy": SamplingMode(sampled=False, filtered=False),
    "sampled": SamplingMode(sampled=True, filtered=False),
    "filtered": SamplingMode(sampled=True, filtered=True),
}


@functools.cache
def sharded_choice(rows: int, vocab: int, ranks: int, mode: SamplingMode) -> Any:
    """The choice over `ranks` shards of `rows` embedding rows, of which `vocab` are tokens: tokens and log-probs."""
    mesh = placement.make_mesh(ranks)
    size = shard_size(rows, ranks)

    def run(sampling: SamplingArrays, logit_WVr: jax.Array, position_W: jax.Array) -> tuple[jax.Array, jax.Array]:
        token = jax.lax.axis_index(AXES) * size + jnp.arange(size, dtype=jnp.int32)
        logit_WVr = jnp.where((token < vocab)[None, :], logit_WVr, -jnp.inf)
        drawn = noise_part(sampling, logit_WVr, position_W, vocab) if mode.sampled else jnp.zeros_like(logit_WVr)
        return choose(gather_over_devices(choice_part(mode, sampling, logit_WVr, drawn, vocab, position_W >= 0)))

    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(P(), P(None, AXES), P()), out_specs=P()))


SHARDS = [(17, 17, 1), (17, 17, 2), (23, 17, 3), (17, 17, 5), (20, 19, 7), (5, 3, 9), (101, 101, 17), (2, 1, 4)]
"""Rows, tokens, ranks: odd sizes, padded rows, ranks without a token, ranks without a row."""


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("jax_threefry_partitionable", False),
        ("jax_high_dynamic_range_gumbel", True),
        ("jax_random_seed_offset", 3),
        ("jax_default_prng_impl", "rbg"),
    ],
)
def test_noise_is_the_same_whatever_jax_is_configured_to(option: str, value: Any) -> None:
    def noise() -> np.ndarray:
        return np.asarray(gumbel_noise(Sampling(temperature=1.0, seed=5).arrays(), jnp.arange(3), 40))

    expected, before = noise(), jax.config.values[option]
    jax.config.update(option, value)
    try:
        np.testing.assert_array_equal(noise(), expected)
    finally:
        jax.config.update(option, before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("rows", "vocab", "ranks"), SHARDS)
def test_choice_over_shards_equals_the_choice_over_the_whole_vocabulary(
    rows: int, vocab: int, ranks: int, mode: str
) -> None:
    choice = sharded_choice(rows, vocab, ranks, MODES[mode])

    @hypothesis.settings(max_examples=15)
    @hypothesis.given(data=st.data())
    def check(data: st.DataObject) -> None:
        random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        logits = random.normal(scale=3, size=(W, vocab)).astype(np.float32)
        if data.draw(st.booleans()):
            logits = np.round(logits)  # many ties
        draw = Draw()
        if mode != "greedy":
            draw = Draw(data.draw(TEMPERATURES), seed=data.draw(st.integers(0, 2**32 - 1)))
        if mode == "filtered":
            draw = Draw(draw.temperature, data.draw(TOP_K), data.draw(TOP_P), draw.seed)
        # Rows that are padding hold large numbers: they must not be chosen, nor count in the log-probabilities.
        padded = np.full((W, ranks * shard_size(rows, ranks)), 50, np.float32)
        padded[:, :vocab] = logits
        position = random.integers(1000, size=W).astype(np.int32)
        sampling = Sampling(draw.temperature, draw.top_k, draw.top_p, draw.seed).arrays()
        tokens, log_probs = (np.asarray(part) for part in choice(sampling, padded, position))
        for row in range(W):
            step = oracle.choose(logits[row], draw, int(position[row]))
            if mode == "greedy":
                assert tokens[row] == np.argmax(logits[row])
            elif not at_border(step.filtered, draw).any():
                assert step.distance(int(tokens[row])) < 1e-5
            exact = jax.nn.log_softmax(logits[row].astype(np.float32))
            np.testing.assert_allclose(log_probs[row], exact[tokens[row]], rtol=1e-5, atol=1e-5)

    check()


@pytest.mark.parametrize(("rows", "vocab", "ranks"), [(12, 11, 4), (13, 13, 3)])
def test_embeddings_and_logits_over_shards_are_those_of_the_whole(rows: int, vocab: int, ranks: int) -> None:
    """Of every token, those at the borders of shards as well, for rows with norms of their own."""
    config = LlamaConfig(
        vocab_size=rows, width=4, feed_forward=4, layers=1, heads=1, kv_heads=1, head_size=4, context=8
    )
    random = np.random.default_rng(0)
    table, norm = (random.normal(size=(rows, 4)).astype(np.float32) for _ in range(2))
    mesh = placement.make_mesh(ranks)
    shards = placement.place_rows(mesh, rows, 4, np.float32, lambda part: table[part])

    def run(shard: jax.Array, norm: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        embedded = sum_over_devices(embed_part(shard, jnp.arange(rows, dtype=jnp.int32)))
        logit = head_part(config, norm, shard, embedded, vocab, least_rows=rows + 3)
        # Where some rows are dead, filters hold for the others: the noise alone would choose the least likely token.
        noise, live = jnp.where(jnp.isfinite(logit), -3 * logit, 0), jnp.arange(rows) == 2
        part = choice_part(MODES["filtered"], Sampling(1.0, top_k=1).arrays(), logit, noise, vocab, live)
        return embedded, logit, choose(gather_over_devices(part))[0]

    spread = jax.shard_map(run, mesh=mesh, in_specs=(P(AXES), P()), out_specs=(P(), P(None, AXES), P()))
    embedded, logits, tokens = jax.device_get(jax.jit(spread)(shards, norm))
    np.testing.assert_array_equal(embedded, table)
    expected = np.asarray(llama.logits(config, jnp.asarray(norm), jnp.asarray(table), jnp.asarray(table)))[:, :vocab]
    np.testing.assert_allclose(logits[:, :vocab], expected, rtol=1e-6)
    assert np.all(logits[:, vocab:] == -np.inf)
    assert tokens[2] == np.argmax(expected[2])
    assert f"f32[{rows + 3},4]" in str(jax.make_jaxpr(spread)(shards, norm)), "as many rows as the device wants"
    assert [shard_size(size, 4) for size in (9, 12, 13)] == [3, 3, 4], "no row too many"


def test_sampled_tokens_follow_the_filtered_distribution() -> None:
    logits, count = np.asarray([2.0, 1.0, 0.0, -1.0, 1.5], np.float32), 20_000
    draw = Draw(0.8, top_k=4, top_p=0.95, seed=3)
    sampling = Sampling(draw.temperature, draw.top_k, draw.top_p, draw.seed).arrays()
    choice = sharded_choice(5, 5, 2, MODES["filtered"])
    rows = np.broadcast_to(np.pad(logits, (0, 1)), (count, 6))
    tokens, _ = choice(sampling, rows, np.arange(count, dtype=np.int32))
    counts = np.bincount(tokens, minlength=5)
    expected = oracle.softmax(np.where(oracle.warp(logits, draw).kept, logits / 0.8, -np.inf))
    assert 1 < np.sum(expected == 0) < 4
    assert counts[expected == 0].sum() == 0
    # Four standard deviations of a binomial count.
    assert np.all(np.abs(counts - count * expected) <= 4 * np.sqrt(count * expected * (1 - expected)) + 1e-9)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"temperature": 1e-46}, "temperature"),
        ({"temperature": 1e-39}, "temperature"),
        ({"temperature": 1e39}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": True}, "top_p"),
        ({"temperature": "1"}, "temperature"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_a_bad_value_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as refusal:
        Sampling(**({"temperature": 1.0} | values))
    assert str(next(iter(values.values()))) in str(refusal.value)


@pytest.mark.parametrize("temperature", [1e-3, 1e-6])
def test_a_small_temperature_is_greedy_in_effect(temperature: float) -> None:
    logits = np.asarray([[40.0, -3.0, 39.9, 5.0, -60.0]], np.float32)
    choice = sharded_choice(5, 5, 1, MODES["filtered"])
    token, log_prob = choice(Sampling(temperature, 3, 0.9, 7).arrays(), logits, np.zeros(1, np.int32))
    assert token[0] == 0
    assert np.isfinite(log_prob[0])


def test_a_large_temperature_chooses_no_padding() -> None:
    choice = sharded_choice(23, 17, 3, MODES["sampled"])
    logits = np.full((200, 24), 50, np.float32)
    tokens, log_probs = choice(Sampling(1e6).arrays(), logits, np.arange(200, dtype=np.int32))
    assert np.max(tokens) == 16, "all tokens are about as likely"
    assert np.isfinite(log_probs).all()


def test_a_top_k_of_one_keeps_the_most_likely_token_and_those_tied_with_it() -> None:
    logits = np.asarray([[1.0, 3.0, 2.0, 3.0]], np.float32)
    assert np.flatnonzero(kept(Sampling(1.0, top_k=1).arrays(), logits)[0]).tolist() == [1, 3]


def test_numbers_of_numpy_are_numbers() -> None:
    assert Sampling(np.float32(0.5), np.int64(3), np.float64(0.5), np.uint32(7)) == Sampling(0.5, 3, 0.5, 7)  # pyright: ignore[reportArgumentType]


def test_a_top_k_over_any_vocabulary_keeps_all_tokens() -> None:
    logits = np.random.default_rng(0).normal(size=(W, V)).astype(np.float32)
    assert np.asarray(kept(Sampling(1.0, top_k=2**40).arrays(), logits)).all()


def test_the_mode_is_what_must_be_known_to_compile() -> None:
    assert Sampling().mode == MODES["greedy"]
    assert Sampling(top_k=5, top_p=0.5).mode == MODES["greedy"], "filters cannot change a greedy choice"
    assert Sampling(0.7).mode == MODES["sampled"]
    assert Sampling(0.7, top_k=5).mode == Sampling(0.7, top_k=1).mode == MODES["filtered"]
    assert Sampling(0.7, top_p=0.5).mode == MODES["filtered"]
