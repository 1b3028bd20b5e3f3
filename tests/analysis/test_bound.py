"""The oracle's ticks against a drafter whose guesses are right or none, and against any schedule."""

import jax.numpy as jnp
import numpy as np
import pytest

from pipedec_jax.analysis.bound import every_guess, guessed, oracle_ticks
from pipedec_jax.analysis.simulator import Simulator
from pipedec_jax.drafters.replay import Replay, ReplayDrafter
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.sampling import Sampling
from tests.random_pairs import FIVE, PAIRS, VOCAB, as_source, target_weights

TARGET = as_source(PAIRS[FIVE][0].target_config, target_weights(PAIRS[FIVE][0])).config
TEXT = [*range(1, VOCAB)] * 2
PROMPT = 10


def simulator(place: np.ndarray, children: int, **settings: object) -> Simulator:
    replay = Replay(token=jnp.asarray(TEXT, jnp.int32), place=jnp.asarray(place, jnp.int32))
    drafter = ReplayDrafter(children=children, vocab_size=VOCAB)
    chosen = EngineSettings(children=children, **settings)
    return Simulator(TARGET, None, chosen, vocab_size=VOCAB, drafter=drafter, drafter_params=replay)


@pytest.mark.parametrize("steps", [3])
def test_a_chain_of_sure_guesses_takes_the_oracles_ticks(steps: int) -> None:
    place = np.where(np.random.default_rng(steps).random(len(TEXT)) < 0.8, 0, 1)
    found = simulator(place, 1, method="best-first", stages=4, width=steps + 1, draft_steps=steps)
    progress = found.run(TEXT[:PROMPT], TEXT[PROMPT:])
    right = (place[PROMPT:-1] == 0).tolist()
    assert guessed(every_guess(found), TEXT[:PROMPT], TEXT[PROMPT:], Sampling()) == right
    assert progress.ticks[-1] == oracle_ticks(4, right, steps)


def test_all_guesses_count_and_no_schedule_is_faster() -> None:
    place = np.random.default_rng(0).integers(0, 5, len(TEXT))
    found = simulator(place, 4, method="pipedec", stages=4, width=3)
    right = guessed(every_guess(found), TEXT[:PROMPT], TEXT[PROMPT:], Sampling())
    assert right == (place[PROMPT:-1] < 4).tolist()
    assert found.run(TEXT[:PROMPT], TEXT[PROMPT:]).ticks[-1] > oracle_ticks(4, right)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one stage"):
        oracle_ticks(0, [True])
