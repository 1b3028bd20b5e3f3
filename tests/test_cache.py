"""Attention over the slots in use: the same as over all of them, however many there are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipedec_jax import cache as caches
from pipedec_jax.cache import LayerCache, read_in_use, read_sizes
from pipedec_jax.model.llama import attention
from tests.exactness import Bench, Shape
from tests.oracle import GREEDY
from tests.random_pairs import Pair, plain_steps


def test_sizes_double_and_end_with_all_slots():
    assert read_sizes(256) == (256,)
    assert read_sizes(512) == (512,)
    assert read_sizes(700) == (512, 700)
    assert read_sizes(4096) == (512, 1024, 2048, 4096)


@pytest.mark.parametrize("last", [0, 1, 511, 512, 513, 1023, 1024, 1600])
def test_slots_that_nobody_sees_make_no_difference(last):
    random = np.random.default_rng(last)
    slots, seen = 1601, random.random((3, 1601)) < 0.3
    seen[:, last] = True
    seen[:, last + 1 :] = False
    cache = LayerCache(
        key=jnp.asarray(random.normal(size=(2, 8, slots)), jnp.float32),
        value=jnp.asarray(random.normal(size=(2, slots, 8)), jnp.float32),
    )
    query = jnp.asarray(random.normal(size=(3, 4, 8)), jnp.float32)
    found = jax.jit(read_in_use)(query, cache, jnp.asarray(seen))
    np.testing.assert_allclose(found, attention(query, cache.key, cache.value, jnp.asarray(seen)), rtol=1e-5, atol=1e-6)


def test_tokens_are_plain_decodings_while_the_text_grows_over_a_border(monkeypatch):
    monkeypatch.setattr(caches, "LEAST_READ", 32)
    pair = Pair("five layers", seed=1)
    bench = Bench(Shape("best-first", 2, 4, 3, "five layers", steps=2), longest=300)
    for length in (6, 50):
        prompt = tuple(int(x) for x in np.random.default_rng(length).integers(0, 101, length))
        progress = bench.decode(pair, prompt, 100)
        assert progress.tokens == [step.token for step in plain_steps(pair, prompt, GREEDY, 100)]
        assert sum(progress.hits) > 20
