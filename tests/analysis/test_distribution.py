"""The statistics of the check of distributions, and the check itself on few draws."""

import dataclasses

import numpy as np
import pytest

from pipedec_jax.analysis.distribution import check, chi_square, distort, pair_of_models, upper_tail
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.parameters import MemorySource
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.sampling import Sampling

LAW = np.array([0.4, 0.2, 0.15, 0.1, 0.08, 0.05, 0.02, 0.0])


def count(token: np.ndarray) -> np.ndarray:
    return np.bincount(token, minlength=LAW.size)


@pytest.mark.parametrize(
    ("statistic", "degrees", "tail"),
    # From tables: the statistic that is exceeded in 5 %, 1 % and 0.1 % of cases.
    [(3.841, 1, 0.05), (6.635, 1, 0.01), (5.991, 2, 0.05), (16.812, 6, 0.01), (18.307, 10, 0.05), (59.703, 30, 0.001)],
)
def test_the_tail_is_that_of_the_tables(statistic, degrees, tail):
    assert upper_tail(statistic, degrees) == pytest.approx(tail, rel=5e-3)


def test_the_tail_of_nothing_is_everything():
    assert upper_tail(0.0, 1) == upper_tail(0.0, 2) == 1


def test_rare_outcomes_are_pooled_until_five_are_expected():
    found = chi_square(np.array([40, 20, 15, 10, 8, 5, 2, 0]), LAW)  # 2 and 5 expected: one cell
    assert (found.draws, found.cells, found.statistic, found.p_value) == (100, 6, pytest.approx(0), pytest.approx(1))


def test_a_token_that_the_law_forbids_is_never_chance():
    assert chi_square(np.array([40, 20, 15, 10, 8, 5, 1, 1]), LAW).p_value == 0


def test_draws_of_the_law_pass_as_often_as_they_should_and_distorted_ones_do_not():
    random = np.random.default_rng(0)
    draws = [random.choice(LAW.size, size=20000, p=LAW) for _ in range(200)]
    p = np.array([chi_square(count(token), LAW).p_value for token in draws])
    assert 0.35 < np.median(p) < 0.65
    assert 2 <= (p < 0.05).sum() <= 25
    off = [chi_square(count(distort(token, LAW, 0.02, seed)), LAW).p_value for seed, token in enumerate(draws)]
    assert np.mean(np.array(off) < 1e-4) > 0.95


def test_a_distortion_has_the_distance_it_says():
    token = np.random.default_rng(1).choice(LAW.size, size=400000, p=LAW)
    moved = np.abs(count(token) - count(distort(token, LAW, 0.02, 0))).sum() / 2 / token.size
    assert moved == pytest.approx(0.02, abs=1e-3)


@pytest.mark.parametrize("law", [np.array([0.5, 0.4]), np.array([1.5, -0.5])])
def test_what_is_no_law_is_refused(law):
    with pytest.raises(ValueError, match="sum to 1"):
        chi_square(np.array([10, 10]), law)


def test_the_engines_draws_have_the_law_of_plain_sampling():
    config = LlamaConfig(
        vocab_size=11, width=16, feed_forward=24, layers=2, heads=2, kv_heads=1, head_size=8, context=64
    )
    target, draft = pair_of_models(config, seed=1)
    settings = EngineSettings(stages=2, width=2, children=2, prefill_width=4, capacity=32)
    engine = Engine(MemorySource(config, target), MemorySource(config, draft), settings, vocab_size=11)
    found = check(engine, target, [5, 3, 7], Sampling(temperature=1.0, top_p=0.9, seed=3), draws=2000, distance=0.1)
    assert found.first.draws == found.second.draws == found.pair.draws == 2000
    assert found.passed(1e-4)
    assert not dataclasses.replace(found, second=found.control_second).passed(1e-4)
    assert not dataclasses.replace(found, control_second=found.second).passed(1e-4)
