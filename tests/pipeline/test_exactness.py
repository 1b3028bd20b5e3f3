"""The engine's tokens against plain decoding in NumPy, over the small grid of `tests.exactness`."""

from __future__ import annotations

import functools
from unittest import mock

import hypothesis
import pytest

from pipedec_jax import exchange
from tests.exactness import Combination, Outcome, Shape, bench, compare
from tests.grids import SMALL_GRID, any_combination, combinations
from tests.random_pairs import FIVE


@functools.cache
def outcomes(number: int, dtype: str = "float64") -> list[Outcome]:
    """What one compiled program of the grid gave for each of its combinations.

    Of every second program activations move alone, as large ones do.
    """
    shape, kind, count = SMALL_GRID[number]
    with mock.patch.object(exchange, "SMALL", 0 if number % 2 else exchange.SMALL):
        return [compare(c, dtype) for c in combinations(shape, kind, count, offset=number)]


@pytest.mark.parametrize("number", range(len(SMALL_GRID)), ids=[f"{shape}, {kind}" for shape, kind, _ in SMALL_GRID])
def test_tokens_and_their_log_probabilities_equal_plain_decoding_in_float64(number: int) -> None:
    for outcome in outcomes(number):
        assert not outcome.other, outcome
        # Stored in float32. Far more sensitive than the tokens: a wrong mask or position anywhere shows here.
        assert outcome.log_prob_error < 2e-6, outcome


def test_the_grid_is_as_large_and_as_varied_as_it_claims() -> None:
    everything = [outcome for number in range(len(SMALL_GRID)) for outcome in outcomes(number)]
    assert len(everything) >= 200
    assert {outcome.combination.shape.stages for outcome in everything} >= {1, 2, 3, 4, 8, 14, 16}
    assert len(set(SMALL_GRID)) == len(SMALL_GRID) <= 25
    assert len({outcome.combination for outcome in everything}) == len(everything)
    real = [outcome for outcome in everything if 0.3 <= outcome.hit_rate <= 0.95]
    assert len(real) >= len(everything) / 2, f"{len(real)} of {len(everything)} have a hit rate in 0.3..0.95"
    assert sum(outcome.late for outcome in everything) > 0, "no late hit was seen"


@hypothesis.settings(max_examples=2)
@hypothesis.given(combination=any_combination())
def test_any_settings_give_the_tokens_of_plain_decoding(combination: Combination) -> None:
    """A program to compile each, so few here; `scripts/check_exactness.py --drawn N` tries more."""
    outcome = compare(combination, "float64")
    assert not outcome.other, outcome
    assert outcome.log_prob_error < 2e-6, outcome


FLOAT32 = [
    (Shape("pipedec", 4, 8, 4, FIVE), "filtered", 7),
]


@pytest.mark.parametrize(("shape", "kind", "count"), FLOAT32, ids=[str(shape) for shape, _, _ in FLOAT32])
def test_tokens_differ_from_plain_decoding_in_float32_only_at_near_ties(shape: Shape, kind: str, count: int) -> None:
    for combination in combinations(shape, kind, count):
        outcome = compare(combination, "float32")
        assert outcome.distance < 1e-3, outcome
        assert outcome.log_prob_error < 1e-3, outcome


def test_one_program_per_shape_and_mode_serves_all_prompts_seeds_and_filters() -> None:
    number = next(i for i, (shape, _, _) in enumerate(SMALL_GRID) if shape.stages == 2)
    outcomes(number)
    shape, _, _ = SMALL_GRID[number]
    engine = bench(shape, "float64").engine
    assert engine is not None
    assert len({len(outcome.combination.prompt) for outcome in outcomes(number)}) > 5
    assert len(engine._programs) == 1
