"""The tick's cost is measured on the engine's own ticks; no time is asserted, only what was run."""

import jax
import jax.numpy as jnp
import pytest

from pipedec_jax.analysis.tick_cost import measure_tick_cost, replay_engine
from pipedec_jax.config import LlamaConfig
from pipedec_jax.drafters.replay import Replay
from pipedec_jax.model.parameters import MemorySource, initialize
from pipedec_jax.pipeline.settings import EngineSettings

CONFIG = LlamaConfig(vocab_size=31, width=16, feed_forward=24, layers=2, heads=2, kv_heads=1, head_size=8, context=128)
SETTINGS = EngineSettings(stages=2, width=2, children=2, prefill_width=8, capacity=64)


@pytest.fixture(scope="module")
def target():
    return MemorySource(CONFIG, jax.tree.map(lambda x: 4 * x, initialize(CONFIG, jax.random.key(0))))


def test_a_cost_has_a_tick_and_its_compute(target):
    cost = measure_tick_cost(target, SETTINGS, [1, 2, 3], vocab_size=31, ticks=10, repeats=2)
    assert (cost.stages, cost.width) == (2, 2)
    assert cost.tick_ms > 0
    assert cost.compute_ms > 0
    assert cost.fixed_ms == cost.tick_ms - cost.compute_ms


def test_a_replay_that_is_always_right_fills_every_tick(target):
    engine = replay_engine(target, SETTINGS, [1, 2, 3], range(12), 1.0, vocab_size=31)
    engine.start([1, 2, 3], max_new_tokens=12)
    progress = engine.run(12)
    # The replayed text is not the target's, so a hit is luck; the formula holds whatever the hits are.
    hits = sum(progress.hits[:-1])
    assert progress.ticks[-1] == 2 + hits + 2 * (11 - hits)
    engine.start([1, 2, 3], max_new_tokens=12, drafter_params=_replay([1, 2, 3, *progress.tokens]))
    assert engine.run(12).ticks == [2 + k for k in range(12)]


def _replay(tokens):
    return Replay(token=jnp.asarray(tokens, jnp.int32), place=jnp.zeros(len(tokens), jnp.int32))
