"""Delays that are injected, and the copy of a model with noise."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pipedec_jax.analysis.hierarchy_study import bounds, delay_cases, perturbed, places, turns
from pipedec_jax.model.parameters import MemorySource, initialize
from tests.analysis.test_tick_cost import CONFIG
from tests.hierarchy.test_choice import made_up


@pytest.mark.parametrize("models", [2, 3])
def test_every_model_is_delayed_alone_always_and_at_random_with_the_same_mean(models):
    cases = delay_cases(models, 0.01)
    assert len(cases) == 2 * models + 2
    for name, delay in cases.items():
        means = [np.mean([delay(index) for _ in range(4000)]) for index in range(models)]
        late = [mean == pytest.approx(0.01, rel=0.1) for mean in means]
        assert all(one or mean == 0 for one, mean in zip(late, means, strict=True))
        assert sum(late) == {"nobody": 0, "all, at random": models}.get(name, 1)
        assert (len({delay(late.index(True)) for _ in range(9)}) > 1) == ("random" in name) if any(late) else True


def test_a_perturbed_copy_is_near_and_its_norms_are_the_same():
    source = MemorySource(CONFIG, initialize(CONFIG, jax.random.key(0)))
    copy = perturbed(source, 0.02)
    norm, matrix = source.read("final_norm"), source.read("embedding")
    assert np.array_equal(copy.read("final_norm"), norm)
    assert np.std(copy.read("embedding") - matrix) == pytest.approx(0.02 * np.std(matrix), rel=0.1)


def test_bounds_and_turns_are_rows_of_markdown():
    measured = made_up((0.8,), ({1: 0.1, 16: 0.1}, {1: 1.0, 16: 2.0}), exchange={2: 0.1})
    rows = [line.strip("|").split("|") for line in bounds(measured, (1, 2))]
    assert {len(row) for row in rows} == {4}
    assert [row[0].strip() for row in rows[2:]] == ["1", "1", "1", "1", "2"]
    # No passes of the smaller model give more than the bound.
    ratios = [float(row[3].strip().rstrip("x")) for row in rows[2:]]
    assert all(1 < ratio < 5 for ratio in ratios)

    class Names:
        def name(self, models):
            return ",".join(map(str, models))

    assert [line.count("|") for line in turns(measured, Names())] == [6, 6, 6]


def test_every_smaller_model_is_spread_alone():
    seconds = ({1: 0.1, 4: 0.1}, {1: 0.3, 4: 0.3}, {1: 1.0, 4: 2.0})
    measured = made_up((0.8, 0.9), seconds, length=60, exchange=({2: 0.01}, {2: 0.02}, {4: 0.1}))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in places(measured, (0, 1, 2), (1, 4), (2,))]
    assert [row[0] for row in rows[2:]] == ["1, 1, 1", "2, 1, 1", "1, 2, 1", "1, 1, 4", "2, 1, 4", "1, 2, 4"]
    assert [int(row[1]) for row in rows[2:]] == [3, 4, 4, 6, 7, 7]
