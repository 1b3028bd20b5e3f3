"""Simulated ticks are the engine's."""

import jax
import jax.numpy as jnp
import pytest

from pipedec_jax.analysis.simulator import Simulator
from pipedec_jax.drafters.replay import Replay, ReplayDrafter
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.sampling import Sampling
from tests.exactness import Shape, bench
from tests.grids import SMALL_GRID
from tests.oracle import GREEDY, Draw
from tests.random_pairs import FIVE, PAIRS, VOCAB, as_source, draft_weights, prompt_of, target_weights

DRAWN = Draw(0.8, seed=2)
SHAPES = [
    (shape, GREEDY if kind == "greedy" else DRAWN)
    for shape, kind, _ in SMALL_GRID
    if (shape.method, shape.stages, kind) in {("stpp", 3, "sampled"), ("best-first", 4, "greedy")}
]


@pytest.mark.parametrize(("shape", "draw"), SHAPES, ids=[str(shape) for shape, _ in SHAPES])
def test_ticks_and_delays_equal_the_engines(shape: Shape, draw: Draw) -> None:
    pair = PAIRS[shape.geometry][1]
    decoder = bench(shape, "float64")
    engine = decoder.load(pair)
    target = as_source(pair.target_config, target_weights(pair)).config
    draft = as_source(pair.draft_config, draft_weights(pair)) if shape.drafts else None
    with jax.enable_x64(True):
        simulator = Simulator(target, draft, engine.settings, vocab_size=VOCAB, drafter=shape.drafter)
        for seed, length in ((1, 9), (2, 30)):
            prompt = prompt_of(length, seed)
            real = decoder.decode(pair, prompt, 60, draw)
            found = simulator.run(prompt, real.tokens, sampling=Sampling(draw.temperature, seed=draw.seed))
            assert (found.tokens, found.ticks, found.delays) == (real.tokens, real.ticks, real.delays)


def test_any_hit_rate_gives_the_ticks_of_a_filled_pipe() -> None:
    target = as_source(PAIRS[FIVE][0].target_config, target_weights(PAIRS[FIVE][0])).config
    text = [*range(1, VOCAB)] * 3
    right = [position % 4 != 0 for position in range(len(text))]
    replay = Replay(token=jnp.asarray(text, jnp.int32), place=jnp.where(jnp.asarray(right), 0, 2))
    settings = EngineSettings(method="pipedec", stages=5, width=4, children=2)
    drafter = ReplayDrafter(children=2, vocab_size=VOCAB)
    simulator = Simulator(target, None, settings, vocab_size=VOCAB, drafter=drafter)
    found = simulator.run(text[:10], text[10:], drafter_params=replay)
    assert found.hits[:-1] == right[10:-1]
    assert found.ticks[-1] == 5 + sum(right[10:-1]) + 5 * right[10:-1].count(False)
    rows = simulator.rows(text[:10], text[10:])
    assert rows.shape == (found.ticks[-1], 5)
    assert rows[0].tolist() == [1, 0, 0, 0, 0]  # the root
    assert rows[:3, 0].tolist() == [1, 2, 4]  # the root, its two guesses, and theirs
    assert (rows[1:, 1:] <= rows[:-1, :-1]).all()  # a batch moves on, and only loses rows
    assert all(rows[tick - 1, -1] > 0 for tick in found.ticks)


def test_nothing_to_simulate_is_an_error() -> None:
    target = as_source(PAIRS[FIVE][0].target_config, target_weights(PAIRS[FIVE][0])).config
    simulator = Simulator(target, None, EngineSettings(method="pp"), vocab_size=VOCAB)
    with pytest.raises(ValueError, match="at least one token each"):
        simulator.run([1, 2], [])
