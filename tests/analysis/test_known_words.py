"""Closed forms counted: texts that a cell needs, and the engine behind known words."""

from __future__ import annotations

import numpy as np
import pytest

from pipedec_jax.analysis.known_words import KnownHierarchy, texts_needed


def test_so_many_texts_that_chance_stays_within_the_error():
    random = np.random.default_rng(0)
    ticks = random.normal(1000, 50, 400)
    needed = texts_needed(ticks, length=100, counted=100, error=0.03, deviations=4)
    assert needed == pytest.approx((4 * 0.05 / 0.03) ** 2, rel=0.15)
    # Texts four times as long need a fourth of them, and half the error four times as many.
    assert texts_needed(ticks, 100, 400, 0.03) == pytest.approx(needed / 4, abs=1)
    assert texts_needed(ticks, 100, 100, 0.015) == pytest.approx(4 * needed, abs=4)
    assert texts_needed([7, 7], 100, 100, 0.03) == 1
    # What it promises: hardly a mean of so many is off by more.
    means = random.normal(1000, 50, (2000, needed)).mean(1)
    assert np.mean(np.abs(means / 1000 - 1) > 0.03) < 0.01
    with pytest.raises(ValueError, match="two of them at least, not 1"):
        texts_needed([7], 100, 100, 0.03)


def test_what_is_counted_is_what_is_simulated():
    found = KnownHierarchy(2, 60, 6).count([0.8], [3], texts=2, seed=0)
    assert found.same
    assert (found.tokens, found.ticks) == (120, found.simulated)
