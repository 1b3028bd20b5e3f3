"""Attention over the slots in use: the same as over all of them, however many there are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipedec_jax import cache as caches
from pipedec_jax.cache import (
    GpuCache,
    LayerCache,
    RowCache,
    Rows,
    at_least,
    chunk_rows,
    empty_layers,
    for_platform,
    over_layers,
    read_sizes,
)
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.exit_head import ExitHeadConfig
from pipedec_jax.model.llama import attention
from pipedec_jax.pipeline import placement
from pipedec_jax.tree import NO_SLOT
from tests.exactness import Bench, Shape
from tests.oracle import GREEDY
from tests.random_pairs import Pair, plain_steps


def test_sizes_double_and_end_with_all_slots():
    assert read_sizes(256) == (256,)
    assert read_sizes(512) == (512,)
    assert read_sizes(700) == (512, 700)
    assert read_sizes(4096) == (512, 1024, 2048, 4096)
    assert read_sizes(700, rows=63) == (512, 700)
    assert read_sizes(700, rows=64) == (128, 256, 512, 700)


@pytest.mark.parametrize("last", [0, 1, 511, 512, 513, 1023, 1024, 1600])
def test_slots_that_nobody_sees_make_no_difference(last):
    random = np.random.default_rng(last)
    slots, seen = 1601, random.random((3, 1601)) < 0.3
    seen[:, 0] = seen[1, last] = True  # of one row alone
    seen[:, last + 1 :] = False
    cache = LayerCache(
        key=jnp.asarray(random.normal(size=(2, 8, slots)), jnp.float32),
        value=jnp.asarray(random.normal(size=(2, slots, 8)), jnp.float32),
    )
    query = jnp.asarray(random.normal(size=(3, 4, 8)), jnp.float32)
    expected = attention(query, cache.key, cache.value, jnp.asarray(seen))
    unset = jnp.zeros(3, jnp.int32)
    rows = Rows(position=unset, slot=unset, mask=jnp.asarray(seen))
    found = jax.jit(LayerCache.mix)(cache, query, rows)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    few = jax.jit(LayerCache.mix)(cache, query, rows.replace(read=7))
    expected_of_few = attention(query, cache.key[..., :7], cache.value[:, :7], rows.mask[:, :7])
    np.testing.assert_allclose(few, expected_of_few, rtol=1e-5, atol=1e-6, err_msg="as many as were chosen for all")
    by_rows = RowCache(
        *(jnp.swapaxes(x, 0, 1).reshape(slots, -1) for x in (jnp.swapaxes(cache.key, 1, 2), cache.value))
    )
    # Also where the last block begins within the one before: 1,601 slots are no whole number of them.
    found = jax.jit(RowCache.mix)(by_rows, query, rows)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_tokens_are_plain_decodings_while_the_text_grows_over_a_border(monkeypatch):
    monkeypatch.setattr(caches, "LEAST_READ", 32)
    pair = Pair("five layers", seed=1)
    bench = Bench(Shape("best-first", 2, 4, 3, "five layers", steps=2), longest=300)
    for length in (6, 50):
        prompt = tuple(int(x) for x in np.random.default_rng(length).integers(0, 101, length))
        progress = bench.decode(pair, prompt, 100)
        assert progress.tokens == [step.token for step in plain_steps(pair, prompt, GREEDY, 100)]
        assert sum(progress.hits) > 20


def geometry(heads, kv_heads, size):
    """A model of one layer with these heads."""
    return LlamaConfig(
        vocab_size=50,
        width=16,
        feed_forward=22,
        layers=1,
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        context=64,
        rope_theta=1e4,
        norm_eps=1e-5,
        tied_embeddings=True,
    )


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(8, 4, 8), (4, 2, 64), (6, 3, 64), (2, 2, 128), (4, 1, 16)])
def test_a_cache_of_rows_holds_the_same(x64, heads, kv_heads, size):
    """What is written and read is what the other layout gives; rows without a slot write nothing."""
    random = np.random.default_rng(heads)
    config = geometry(heads, kv_heads, size)
    one, other = empty_layers(config, 1, 24, jnp.float64), for_platform(empty_layers(config, 1, 24, jnp.float64), "tpu")
    assert isinstance(other[0], RowCache)
    assert other[0].key.shape == (24, kv_heads * size)
    rows = Rows(
        position=jnp.arange(5, dtype=jnp.int32),
        slot=jnp.asarray([3, NO_SLOT, 20, 7, 0], jnp.int32),
        mask=jnp.asarray(random.random((5, 24)) < 0.6),
    )
    query, key, value = (jnp.asarray(random.normal(size=(5, count, size))) for count in (heads, kv_heads, kv_heads))
    (expected, by_heads), (found, by_rows) = (cache[0].attend(rows)(query, key, value) for cache in (one, other))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_array_equal(by_rows.value, jnp.swapaxes(by_heads.value, 0, 1).reshape(24, -1))
    np.testing.assert_array_equal(by_rows.key, jnp.moveaxis(by_heads.key, 2, 0).reshape(24, -1))
    assert np.count_nonzero(np.any(by_rows.key, axis=1)) == 4


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_query_that_is_not_finite_reads_no_slot_that_it_does_not_see(platform, value):
    config = geometry(4, 2, 4)
    (cache,) = for_platform(empty_layers(config, 1, 8, jnp.float32), platform)
    ones = jnp.ones((2, 2, 4), jnp.float32)
    rows = Rows(position=jnp.arange(2), slot=jnp.arange(2), mask=jnp.eye(2, 8, dtype=bool))
    query = jnp.ones((2, 4, 4), jnp.float32).at[0, 1].set(value)
    for sign in (1, -1):  # of one of them all scores are minus infinity
        mixed, _ = cache.attend(rows)(query, sign * ones, ones)
        assert np.all(np.isnan(mixed[0, 1]))
        np.testing.assert_allclose(mixed[1], ones[0].repeat(2, axis=0), rtol=1e-6)


def test_rows_that_are_added_see_nothing_and_write_nothing():
    mask = np.tri(2, 4, dtype=bool)
    rows = Rows(position=jnp.asarray([5, 6], jnp.int32), slot=jnp.asarray([0, 1], jnp.int32), mask=jnp.asarray(mask))
    more, x = at_least(5, rows, jnp.ones((2, 3)))
    assert more.slot.tolist() == [0, 1, *[NO_SLOT] * 3]
    assert np.array_equal(more.mask, np.pad(mask, ((0, 3), (0, 0))))
    assert np.array_equal(x, np.repeat([1.0, 0.0], (2, 3))[:, None] * np.ones(3))
    assert at_least(2, rows, x[:2])[0] is rows


def test_a_chunk_writes_its_tokens_alone_and_sees_what_is_before_them():
    rows = jax.jit(chunk_rows, static_argnums=(1, 3))(jnp.int32(4), 5, jnp.int32(7), 9)
    assert rows.position.tolist() == [4, 5, 6, 7, 8]
    assert rows.slot.tolist() == [4, 5, 6, NO_SLOT, NO_SLOT]
    assert np.array_equal(rows.mask, np.tri(9, dtype=bool)[4:])


def test_tokens_are_plain_decodings_from_caches_of_rows(monkeypatch):
    monkeypatch.setattr(caches, "TILED_PLATFORMS", ("cpu",))
    monkeypatch.setattr(caches, "LEAST_READ", 16)
    pair = Pair("five layers", seed=1)
    bench = Bench(Shape("best-first", 2, 4, 3, "five layers", steps=2), longest=64)
    prompt = tuple(int(x) for x in np.random.default_rng(0).integers(0, 101, 9))
    progress = bench.decode(pair, prompt, 30)
    assert progress.tokens == [step.token for step in plain_steps(pair, prompt, GREEDY, 30)]
    assert sum(progress.hits) > 5


@pytest.mark.parametrize("last", [0, 7, 8, 31, 32, 39])
def test_on_gpus_all_layers_read_the_same_number_of_slots(monkeypatch, last):
    monkeypatch.setattr(caches, "LEAST_READ", 8)
    seen = jnp.arange(40)[None, :] == jnp.asarray([[0], [last]])
    unset = jnp.zeros(2, jnp.int32)
    rows = Rows(position=unset, slot=unset, mask=seen)
    cache = tuple(LayerCache(key=jnp.zeros((1, 2, 40)), value=jnp.zeros((1, 40, 2))) for _ in range(2))
    chosen = []

    def step(index, cache, rows, x):
        chosen.append(rows.read)
        return cache, x if rows.read is None else x * 100 + rows.read

    over_layers(cache, rows, step, jnp.int32(0))
    assert chosen == [None, None], "elsewhere every layer chooses"
    chosen.clear()
    _, found = over_layers(for_platform(cache, "gpu"), rows, step, jnp.int32(0))
    assert chosen == [8, 8, 32, 32, 40, 40]
    assert found == 101 * min(size for size in chosen if size > last)


@pytest.mark.parametrize(
    "shape",
    [
        Shape("best-first", 2, 4, 3, "five layers", steps=2),
        Shape("ppsd", 5, 1, 1, "five layers", head=ExitHeadConfig(2, "block")),
    ],
    ids=str,
)
def test_tokens_are_plain_decodings_as_gpus_compute_them(monkeypatch, shape):
    """On CPU devices, that is: a cache of GPUs, and at least two rows."""
    monkeypatch.setattr(placement, "platform", lambda _: "gpu")
    monkeypatch.setattr(caches, "LEAST_READ", 16)
    pair = Pair("five layers", seed=1)
    bench = Bench(shape, longest=160)
    with jax.enable_x64(True):
        assert isinstance(bench.load(pair).new_local(200).cache[0], GpuCache)
    for length in (6, 50):
        prompt = tuple(int(x) for x in np.random.default_rng(length).integers(0, 101, length))
        progress = bench.decode(pair, prompt, 100)
        assert progress.tokens == [step.token for step in plain_steps(pair, prompt, GREEDY, 100)]
        assert sum(progress.hits) > 2
