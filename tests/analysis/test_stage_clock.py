"""A tick's work is that of the stages that have rows; no time is asserted."""

import numpy as np
import pytest

from pipedec_jax.analysis.stage_clock import StageClock, measure_work
from pipedec_jax.analysis.tick_cost import replay_engine
from tests.analysis.test_tick_cost import SETTINGS, target

__all__ = ["target"]


@pytest.fixture(scope="module")
def clock(target):
    return StageClock(replay_engine(target, SETTINGS, [1, 2, 3], range(12), 1.0, vocab_size=31), 20)


def written(clock: StageClock) -> list[bool]:
    """Whether each rank has keys in its cache."""
    return [bool(np.any(keys)) for keys in np.asarray(clock._local.cache[0].key)]


def test_only_stages_with_rows_work(clock):
    seen = [written(clock)]
    for rows in ([(0, 0)], [(0, 0), (0, 1), (0, 0)], [(2, 0)]):
        clock.run(np.array(rows))
        seen.append(written(clock))
    assert seen == [[False, False], [False, False], [False, True], [True, True]]


def test_every_engine_is_measured_with_its_own_ticks(clock):
    found = measure_work({"a": clock, "b": clock}, {"a": np.array([[1, 0]] * 2), "b": np.array([[2, 2]])}, repeats=1)
    assert list(found) == ["a", "b"]
    assert all(np.isfinite(seconds) for seconds in found.values())
