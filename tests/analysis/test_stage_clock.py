"""A tick's work is that of the stages that have rows; no time is asserted."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipedec_jax.analysis.stage_clock import StageClock, measure_work
from pipedec_jax.analysis.tick_cost import replay_engine
from pipedec_jax.drafters.base import View
from pipedec_jax.drafters.replay import Replay, ReplayAtExit
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.settings import EngineSettings
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


@dataclasses.dataclass(frozen=True)
class Watched(ReplayAtExit):
    """At an exit, says with how many rows every device is given its share of the work."""

    rows: list[int] = dataclasses.field(default_factory=list, hash=False)

    def share(self, params: Any, offer: Any, view: View) -> jax.Array:
        count = jnp.sum(view.live)
        jax.debug.callback(lambda count: self.rows.append(int(count)), count)
        return count


def test_all_ranks_do_their_share_for_the_rows_that_pass_an_exit(target):
    drafter = Watched(children=2, vocab_size=31)
    settings = EngineSettings(method="ppsd", stages=2, width=2, children=2, exit_layer=1)
    replay = Replay(token=jnp.arange(20), place=jnp.zeros(20, jnp.int32))
    engine = Engine(target, None, settings, vocab_size=31, drafter=drafter, drafter_params=replay)
    StageClock(engine, 20).run(np.array([(0, 2), (1, 0), (2, 1)]))
    jax.effects_barrier()
    assert sorted(drafter.rows) == [0, 0, 1, 1, 2, 2]
