"""The choice of models and passes: from times and words that are made up, and what is measured of a small pair."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipedec_jax.hierarchy.choice import Measured, choose, measure, selections, tried
from pipedec_jax.model.parameters import MemorySource, initialize
from tests.analysis.test_tick_cost import CONFIG


def made_up(rates: tuple[float, ...], seconds: tuple[dict[int, float], ...], length: int = 400) -> Measured:
    """Each model but the target says the target's token with its own rate."""
    random = np.random.default_rng(0)
    words = random.integers(50, size=(len(rates) + 1, length))
    for model, rate in enumerate(rates):
        words[model] = np.where(random.random(length) < rate, words[-1], 50 + model)
    return Measured(seconds=seconds, words=words)


FLAT = {1: 1.0, 16: 1.0}


def test_a_middle_model_is_left_out_where_it_does_not_pay():
    draft, target = {1: 0.1, 16: 0.1}, FLAT
    worse = made_up((0.85, 0.85), (draft, {1: 0.4, 16: 0.4}, target))
    assert choose(worse).models == (0, 2)
    better = made_up((0.4, 0.97), (draft, {1: 0.2, 16: 0.2}, target))
    assert choose(better).models != (0, 2)
    assert choose(worse, all_models=True).models == (0, 1, 2)


def test_a_verification_is_narrow_where_rows_are_dear():
    draft = {1: 0.05, 16: 0.05}
    free = choose(made_up((0.8,), (draft, FLAT)))
    dear = choose(made_up((0.8,), (draft, {1: 1.0, 4: 1.1, 16: 4.0})))
    assert free.width > 4 >= dear.width
    assert free.speedup > dear.speedup > 1
    assert free.tick_seconds == pytest.approx(max(1.0, 0.05 * free.passes[0]))


def test_what_is_tried_includes_a_tick_that_is_not_worth_it():
    slow = made_up((0.3,), ({1: 0.9, 16: 0.9}, FLAT))
    assert all(option.passes == (1,) for option in tried(slow, (0, 1)))
    assert choose(slow).speedup == pytest.approx(1, abs=0.1)
    assert selections(3) == [(0, 2), (1, 2), (0, 1, 2)]


def test_times_are_interpolated_and_go_on_beyond_the_widest():
    measured = made_up((0.5,), (FLAT, {1: 1.0, 4: 1.0, 16: 4.0}))
    assert measured.pass_seconds(1, 10) == 2.5
    assert measured.pass_seconds(1, 32) == 8.0
    assert measured.pass_seconds(0, 32) == 1.0


def test_the_words_of_models_are_what_they_say_along_the_targets_texts():
    target = MemorySource(CONFIG, jax.tree.map(lambda x: 4 * x, initialize(CONFIG, jax.random.key(0))))
    measured = measure(
        [target, target],
        [[1, 2, 3], [7]],
        vocab_size=31,
        devices=jax.devices(),
        dtype=jnp.float32,
        new_tokens=20,
        widths=(2,),
    )
    assert measured.words.shape == (2, 41)
    assert measured.words[1, 0] == 3
    assert measured.agreement(0) == 1
    assert [set(seconds) for seconds in measured.seconds] == [{1, 2}, {2}]
    assert all(second > 0 for seconds in measured.seconds for second in seconds.values())
