"""Counted ticks of a chain are those that hits and misses predict, and a table of them can tell where they are not."""

import dataclasses

import pytest

from pipedec_jax.analysis.exit_counts import ChainCount, replayed
from pipedec_jax.pipeline.split import StageSplit
from tests.analysis.planning import TINY


def test_a_replayed_chain_takes_the_ticks_predicted_at_every_rate():
    found = replayed(TINY, 4, 4, [0, 0.5, 0.9, 1], tokens=60)
    assert [count.ticks for count in found] == [count.predicted for count in found]
    assert [(count.hits, count.misses, count.ticks) for count in (found[0], found[-1])] == [
        (0, 59, 4 * 60),
        (59, 0, 4 + 2 * 59),
    ]
    for count in found:
        # Longer answers come nearer: the first token takes a fill, whatever is guessed.
        assert count.speedup == pytest.approx(count.speedup_in_layers, rel=4 / 60)


def test_another_count_is_told_and_uneven_stages_have_no_form_in_layers():
    count = ChainCount(StageSplit((4, 4, 4, 4), 1), answers=2, tokens=12, hits=6, misses=4, ticks=8 + 6 + 16)
    assert count.exact
    assert count.speedup_in_layers == pytest.approx(16 / (0.6 * 4 + 0.4 * 16))
    assert not dataclasses.replace(count, ticks=29).exact
    assert dataclasses.replace(count, split=StageSplit((5, 3, 4, 4), 1)).speedup_in_layers is None
