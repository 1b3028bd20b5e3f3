"""A tick's work is that of the stages that have rows; no time is asserted."""

import numpy as np
import pytest

from pipedec_jax.analysis.stage_clock import StageClock, measure_work, predicted_seconds, rows_by_ticks
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
    for rows in ((0, 0), (0, 1), (2, 0)):
        clock.run(rows, 1)
        seen.append(written(clock))
    assert seen == [[False, False], [False, False], [False, True], [True, True]]


def test_what_ticks_need_is_measured_and_summed(clock):
    counts = rows_by_ticks(clock, [np.array([[1, 0], [2, 1]]), np.array([[2, 2], [0, 0]])])
    assert counts == {(2, 0): 1, (2, 2): 2, (0, 0): 1}  # one size: what lives is computed as two rows
    work = measure_work({"a": clock}, {"a": sorted(counts)}, passes=2, repeats=1)
    assert list(work["a"]) == [(0, 0), (2, 0), (2, 2)]
    assert predicted_seconds(counts, {(0, 0): 1.0, (2, 0): 10.0, (2, 2): 100.0}) == 211.0
