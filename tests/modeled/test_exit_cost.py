"""Closed forms of PPSD and EESD against counted ticks, and what a tick with an exit costs."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pipedec_jax.analysis.simulator import Simulator
from pipedec_jax.config import LlamaConfig
from pipedec_jax.drafters.replay import Replay, ReplayAtExit
from pipedec_jax.model.exit_head import ExitHeadConfig
from pipedec_jax.modeled import closed_forms as forms
from pipedec_jax.modeled import exit_cost
from pipedec_jax.modeled.cost import Costs, byte_costs, head_bytes, layer_bytes, pp_token_cost
from pipedec_jax.modeled.exit_cost import Cycle
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.pipeline.split import StageSplit
from pipedec_jax.tick_costs import Curve, TickCosts

TARGET = LlamaConfig(vocab_size=97, width=16, feed_forward=24, layers=12, heads=2, kv_heads=1, head_size=8, context=512)
TOKENS = 201
TEXT = np.random.default_rng(0).integers(97, size=TOKENS + 1).astype(np.int32)
SIZES = {"ppsd": [(6, 4)], "eesd": [(4, 3)]}
"""Stages and exit layer: exit paths of 2 stages and of 1, all stages equal."""


@functools.cache
def simulator(method: str, stages: int, exit_layer: int) -> Simulator:
    settings = EngineSettings(
        method=method, stages=stages, exit_layer=exit_layer, width=1, children=1, draft_length=3, capacity=256
    )
    drafter = ReplayAtExit(children=1, vocab_size=97)
    return Simulator(TARGET, None, settings, vocab_size=97, drafter=drafter)


def run(method: str, stages: int, exit_layer: int, right: np.ndarray) -> tuple[int, list[bool], int]:
    """Ticks, hits and stages of the exit path where the guesses of these positions are right."""
    found = simulator(method, stages, exit_layer)
    replay = Replay(token=jnp.asarray(TEXT), place=jnp.asarray(np.where(right, 0, 1), jnp.int32))
    progress = found.run(TEXT[:1].tolist(), TEXT[1:].tolist(), drafter_params=replay)
    return progress.ticks[-1], progress.hits, found.split.exit


@pytest.mark.parametrize("rate", [0, 0.3, 0.6, 0.8, 0.9, 1])
@pytest.mark.parametrize(("stages", "exit_layer"), SIZES["ppsd"])
def test_a_chain_takes_the_ticks_of_the_closed_form(stages: int, exit_layer: int, rate: float) -> None:
    right = np.zeros(TOKENS + 1, bool)
    right[np.random.default_rng(1).permutation(TOKENS - 1)[: round(rate * (TOKENS - 1))] + 1] = True
    ticks, hits, e = run("ppsd", stages, exit_layer, right)
    assert e == 2
    assert hits[:-1] == right[1:-1].tolist()
    wrong = TOKENS - 1 - sum(right[1:-1])
    assert ticks == exit_cost.ppsd_ticks(stages, e, sum(right[1:-1]), wrong)
    per_token = forms.ppsd_ticks_per_token(rate, e, stages)
    assert ticks / TOKENS == pytest.approx(per_token, abs=stages / TOKENS)
    # For equal stages, and a head that costs nothing, it is the form in layers as well.
    assert stages / per_token == pytest.approx(forms.ppsd_speedup(rate, exit_layer, TARGET.layers))


@pytest.mark.parametrize("rate", [0, 0.5, 0.8, 1])
@pytest.mark.parametrize(("stages", "exit_layer"), SIZES["eesd"])
def test_rounds_of_eesd_take_the_ticks_of_the_closed_form(stages: int, exit_layer: int, rate: float) -> None:
    right = np.random.default_rng(2).random(TOKENS + 1) < rate
    ticks, hits, e = run("eesd", stages, exit_layer, right)
    rounds = accepted = 0
    for hit, guess in zip(hits[:-1], right[1:-1], strict=True):
        assert hit == (guess and accepted < 3)
        accepted = accepted + 1 if hit else 0
        rounds += not hit
    assert ticks == (rounds + 1) * (3 * e + stages)
    expected = forms.eesd_ticks_per_token(np.mean(right[1:-1]), 3, e, stages)
    assert ticks / TOKENS == pytest.approx(expected, rel=0.08)


def test_ppsd_is_never_slower_than_plain_decoding_and_eesd_is() -> None:
    rates = np.linspace(0, 1, 21)
    ppsd, eesd = forms.ppsd_ticks_per_token(rates, 2, 8), forms.eesd_ticks_per_token(rates, 4, 2, 8)
    assert np.max(ppsd) == 8
    assert np.array_equal(eesd > 8, rates < 0.52)
    assert np.all(ppsd <= eesd)


def test_a_tick_lasts_as_long_as_the_longest_stage_with_the_head_whose_vocabulary_all_share() -> None:
    head = ExitHeadConfig(3, "norm-linear", width=8)
    costs = byte_costs(TARGET, None, 4, head)
    layer = layer_bytes(TARGET, 4)
    # Norm, map and norm; and the vocabulary.
    assert costs.exit_head == 4 * (16 + 16 * 8 + 8)
    assert costs.exit_vocabulary == 4 * 8 * 97
    weight, vocabulary = costs.exit_head / layer, costs.exit_vocabulary / layer
    assert exit_cost.cycle(costs, StageSplit((3, 3, 3, 3), 1)) == Cycle(1, 3 + weight, weight, vocabulary)
    assert exit_cost.cycle(costs, StageSplit((1, 1, 4, 6), 2)) == Cycle(4, 6, weight, vocabulary)
    ticks = exit_cost.exit_tick_costs(costs, StageSplit((3, 3, 3, 3), 1), 2)
    assert ticks.stage.cost == pytest.approx([0, (3 + weight) * layer, (3 + weight) * layer])
    assert ticks.head.cost == pytest.approx([0, head_bytes(TARGET, 4) / 4, head_bytes(TARGET, 4) / 4])
    assert ticks.exit_vocabulary is not None
    assert ticks.exit_vocabulary.cost == pytest.approx([0, costs.exit_vocabulary / 4, costs.exit_vocabulary / 4])
    # Where rows cost, the head's do as well, and another stage may be the longest.
    rising = Costs(
        layer={1: 1.0, 4: 2.0},
        head={1: 2.0, 4: 4.0},
        exit_head={1: 2.0, 4: 5.0},
        exit_vocabulary={1: 3.0, 4: 6.0},
        exchange=0.5,
    )
    ticks = exit_cost.exit_tick_costs(rising, StageSplit((2, 4, 6), 1), 3)
    assert (ticks.stage.cost, ticks.head.cost, ticks.exchange) == ((0, 6, 12, 12), (0, 2 / 3, 4 / 3, 4 / 3), 0.5)
    assert ticks.exit_vocabulary is not None
    assert ticks.exit_vocabulary.cost == (0, 1, 2, 2)
    assert exit_cost.cycle(rising, StageSplit((4, 4, 4), 1), 3) == Cycle(1, 6.5, 2.5, 3)


@pytest.mark.parametrize("head", [ExitHeadConfig(3, "target"), ExitHeadConfig(3, "block", tied=True)])
def test_a_head_that_shares_the_targets_vocabulary_is_not_charged_for_it_twice(head: ExitHeadConfig) -> None:
    costs, split = byte_costs(TARGET, None, 4, head), StageSplit((3, 3, 3, 3), 1)
    part = head_bytes(TARGET, 4) / 4
    assert exit_cost.cycle(costs, split).vocabulary == 0
    ticks = exit_cost.exit_tick_costs(costs, split, 2)
    # Up to two rows that leave, and two that pass the exit.
    assert (ticks.exit_vocabulary, ticks.head.cost) == (None, (0, part, part, part, part))
    assert ticks.slices(1, 1) == ticks.slices(2, 0) == ticks.slices(0, 1) == part
    # By itself, as a draft of EESD is, it needs all of it.
    (tick,) = exit_cost.eesd_tick_costs(costs, split, 2).stage.cost
    draft = 3 * layer_bytes(TARGET, 4) + costs.exit_head + part
    assert tick * (2 * 1 + 4) == pytest.approx(2 * draft + pp_token_cost(costs, 12, 4))


def test_eesd_is_charged_for_what_does_not_overlap() -> None:
    costs = byte_costs(TARGET, None, 4, ExitHeadConfig(3, "norm-linear", width=8))
    costs = dataclasses.replace(costs, exchange=float(layer_bytes(TARGET, 4)))
    split = StageSplit((2, 1, 3, 3, 3), 2)
    # It passes the exchange of both stages of the exit path.
    draft = 5 * layer_bytes(TARGET, 4) + costs.exit_head + 4 * 8 * 97 / 5
    (tick,) = exit_cost.eesd_tick_costs(costs, split, 4).stage.cost
    # A round of four drafts on an exit path of two of five stages.
    assert tick * (4 * 2 + 5) == pytest.approx(4 * draft + pp_token_cost(costs, 12, 5))


def test_ticks_cost_what_the_rows_that_are_at_the_stages_the_exit_and_the_end_cost() -> None:
    costs = TickCosts(
        stage=Curve((0, 1, 1.5, 2.5)),
        head=Curve((0, 0.125, 0.25, 0.625)),
        exit_vocabulary=Curve((0, 1 / 64, 3 / 64, 7 / 64)),
        exchange=1 / 1024,
    )
    settings = EngineSettings(method="ppsd", stages=4, exit_layer=6, width=3, children=2, capacity=256, costs=costs)
    drafter = ReplayAtExit(children=2, vocab_size=97)
    found = Simulator(TARGET, None, settings, vocab_size=97, drafter=drafter)
    place = np.where(np.random.default_rng(3).random(TOKENS + 1) < 0.7, 0, 2)
    replay = Replay(token=jnp.asarray(TEXT), place=jnp.asarray(place, jnp.int32))
    request = TEXT[:1].tolist(), TEXT[1:41].tolist()
    progress = found.run(*request, drafter_params=replay)
    rows_TN = found.rows(*request)
    assert found.split.exit == 2
    expected = 0.0
    for rows in rows_TN:
        slices = costs.head.cost[rows[-1]] + costs.exit_vocabulary.cost[rows[1]]
        expected += costs.stage.cost[max(rows)] + slices + costs.exchange
    assert progress.costs[-1] == pytest.approx(expected)
    # Stages differ in rows, so that none could stand for another.
    assert len({tuple(rows_TN[:, stage]) for stage in range(4)}) == 4
