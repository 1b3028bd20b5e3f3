"""Where the LM head stands: what the model says, and that both places choose the same tokens."""

import jax

from pipedec_jax.analysis.head_place import measure_places, modeled_ticks
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.parameters import MemorySource, initialize
from pipedec_jax.modeled.cost import Costs

TINY = LlamaConfig(
    vocab_size=101,
    width=32,
    feed_forward=48,
    layers=4,
    heads=4,
    kv_heads=2,
    head_size=8,
    context=128,
    rope_theta=1e4,
    norm_eps=1e-5,
    tied_embeddings=False,
)


def test_a_tick_lasts_as_long_as_its_slowest_stage():
    costs = Costs(layer=1.0, head=4.0, draft=0.0)
    ticks = modeled_ticks(costs, layers=16, stages=4)
    assert (ticks.last, ticks.sharded) == (4 + 4, 4 + 1)
    assert ticks.balanced == 5  # 5, 5, 5 layers and 1 with the head
    assert modeled_ticks(costs, layers=2, stages=2).balanced == 5


def test_both_places_choose_the_same_tokens_and_are_timed():
    seconds = measure_places(
        MemorySource(TINY, initialize(TINY, jax.random.key(0))), 2, 3, slots=16, ticks=2, repeats=1
    )
    assert set(seconds) == {"last", "sharded"}
    assert min(seconds.values()) > 0
