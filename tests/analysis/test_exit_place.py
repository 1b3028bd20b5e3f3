"""Where an exit head's vocabulary stands: what the model says, and that both places take the same ticks."""

import jax
import numpy as np
import pytest

from pipedec_jax.analysis.exit_place import measure_exit_places, modeled_exit
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.exit_head import ExitHead, ExitHeadConfig, initialize_head
from pipedec_jax.model.parameters import MemorySource, initialize

TINY = LlamaConfig(vocab_size=101, width=32, feed_forward=48, layers=4, heads=4, kv_heads=2, head_size=8, context=128)
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32


def test_the_exits_stage_is_longer_for_a_vocabulary_of_its_own():
    head = ExitHeadConfig(2, "norm-linear")
    found = modeled_exit(TINY, head, 2, 4)
    vocabulary = 101 * 32
    assert found["exit"].tick == pytest.approx(4 * (2 * LAYER + 32 + vocabulary + vocabulary / 2))
    assert found["sharded"].tick == pytest.approx(4 * (2 * LAYER + 32 + 2 * vocabulary / 2))
    for one in found.values():
        assert one.token == pytest.approx(one.tick * (0.8 + 0.2 * 2))


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("variant", ["block", "target"])
def test_both_places_take_the_same_ticks_and_are_timed(variant, width):
    params = initialize(TINY, jax.random.key(0))
    config = ExitHeadConfig(2, variant)
    own = {} if variant == "target" else jax.tree.map(np.asarray, initialize_head(config, TINY, params, seed=0))
    found = measure_exit_places(MemorySource(TINY, params), ExitHead(config, own), 2, width, tokens=12, repeats=1)
    assert set(found) == {"exit", "sharded"}
    assert min(found.values()) > 0
