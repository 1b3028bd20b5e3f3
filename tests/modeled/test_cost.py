"""Modeled time by hand-computed examples, and the formulas of the papers."""

import math

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.parameters import parameter_count
from pipedec_jax.modeled import cost


def config(**changes) -> LlamaConfig:
    sizes = {"vocab_size": 100, "width": 8, "feed_forward": 16, "layers": 4, "heads": 2, "kv_heads": 1, "head_size": 4}
    return LlamaConfig(**{**sizes, "context": 32, **changes})


def test_bytes_count_every_weight_once():
    target = config(layers=7, tied_embeddings=True)
    layers = 7 * cost.layer_bytes(target, 2)
    assert layers + cost.head_bytes(target, 2) + 2 * target.width == 2 * parameter_count(target)
    # By hand: two norms, query and output of 2 heads, key and value of 1, three feed-forward matrices.
    assert cost.layer_bytes(target, 1) == 2 * 8 + 2 * (8 * 8) + 2 * (8 * 4) + 3 * (8 * 16)
    assert cost.head_bytes(target, 1) == 800


def tick(costs, layers, stages, draft_ranks=0, steps=1, rows=1, leaving=1):
    """Cost of a tick with so many draft steps over one node each."""
    table = cost.tick_costs(costs, layers, stages, draft_ranks, width=8)
    return float(table.of(jnp.int32(rows), steps * table.draft.of(jnp.int32(1)), jnp.int32(leaving)))


def test_a_tick_lasts_as_long_as_its_slowest_rank():
    costs = cost.Costs(layer=10, head=6, draft=15)
    assert tick(costs, layers=4, stages=2, draft_ranks=1) == 20 + 6 / 3
    assert tick(costs, layers=4, stages=4, draft_ranks=1) == pytest.approx(15 + 6 / 5)
    assert tick(costs, layers=4, stages=4, draft_ranks=1, steps=2) == pytest.approx(30 + 6 / 5)
    # Uneven: 5 layers on 4 stages cost two layers a tick.
    assert tick(costs, layers=5, stages=4, draft_ranks=1) == pytest.approx(20 + 6 / 5)
    # A drafter without a rank and without weights.
    assert tick(costs, layers=4, stages=4) == 10 + 6 / 4
    # Nothing leaves, nothing is drafted, nothing at all.
    assert tick(costs, layers=4, stages=2, draft_ranks=1, leaving=0) == 20
    assert tick(costs, layers=4, stages=4, draft_ranks=1, steps=0, leaving=0) == 10
    assert tick(cost.Costs(layer=10, head=6, exchange=1), 4, 4, rows=0, leaving=0) == 1


def test_pp_pays_the_sum_of_its_stages_and_the_head_once():
    costs = cost.Costs(layer={1: 10, 8: 99}, head={1: 6, 8: 99}, draft=99, exchange=1)
    assert cost.pp_token_cost(costs, layers=5, stages=3) == 50 + 2 + 3


def test_a_free_draft_on_even_stages_gives_the_ratio_of_ticks():
    costs = cost.Costs(layer=1, head=0)
    assert cost.pp_token_cost(costs, layers=8, stages=8) == 8 * tick(costs, 8, 8, draft_ranks=1)


def test_costs_by_rows_are_those_of_the_next_larger_batch_measured():
    costs = cost.Costs(layer={1: 10, 4: 12, 16: 30}, head={1: 6, 16: 9}, draft={1: 1, 4: 14}, exchange=1)
    assert [cost.at_rows(costs.layer, rows) for rows in (0, 1, 2, 4, 5, 16, 99)] == [10, 10, 12, 12, 30, 30, 30]
    table = cost.tick_costs(costs, layers=4, stages=2, draft_ranks=1, width=6)
    assert table.stage.cost == (0, 20, 24, 24, 24, 60, 60)
    assert table.head.cost == (0, 6 / 3, *[9 / 3] * 5)
    assert table.draft.cost == (0, 1, *[14] * 5)
    assert [curve.sizes(6) for curve in (table.stage, table.head, table.draft)] == [(1, 4, 6), (1, 6), (1, 6)]
    assert cost.tick_costs(cost.Costs(layer=1, head=1), 4, 2, width=6).stage.sizes(6) == (6,)
    assert cost.draft_steps_beside_a_stage(costs, 4, 2, width=1) == 4
    assert cost.draft_steps_beside_a_stage(costs, 4, 2, width=4) == 1


@given(layers=st.integers(2, 80), data=st.data(), draft=st.floats(0, 50), head=st.floats(0, 50))
def test_modeled_time_never_flatters_ticks(layers, data, draft, head):
    """Uneven stages and a heavy draft can only make the speedup smaller than the ratio of ticks.

    From two stages on: beside a single stage the draft's rank takes half of the target's head.
    """
    stages = data.draw(st.integers(2, layers))
    costs = cost.Costs(layer=1, head=head, draft=draft)
    modeled = cost.pp_token_cost(costs, layers, stages) / tick(costs, layers, stages, draft_ranks=1)
    assert modeled <= stages * (1 + 1e-6)


def test_bytes_are_the_same_at_any_width_and_for_the_draft():
    target, draft = config(), config(layers=2, width=4, head_size=2)
    costs = cost.byte_costs(target, draft, 4)
    assert costs.layer == cost.layer_bytes(target, 4)
    assert costs.head == 4 * 100 * 8
    assert costs.draft == 2 * cost.layer_bytes(draft, 4) + cost.head_bytes(draft, 4)
    assert cost.byte_costs(target, None, 4).draft == 0


@pytest.mark.parametrize(
    "seconds",
    [
        {"layer": 1.0},
        {"layer": -1.0, "head": 0.0},
        {"layer": {}, "head": 0.0},
        {"layer": {"0": 1.0}, "head": 0.0},
        {"layer": {"wide": 1.0}, "head": 0.0},
        {"layer": 1.0, "head": {"1": "fast"}},
        {"layer": 0.0, "head": {"1": 1.0}},
    ],
)
def test_bad_calibrations_are_refused(seconds):
    with pytest.raises(ValueError, match=r"layer|head"):
        cost.calibrated_costs(seconds)


def test_the_speedup_of_a_filled_pipe():
    assert cost.speedup_filled_pipe(0.0, 14) == 1
    assert cost.speedup_filled_pipe(1.0, 14) == 14
    # Headlines of the papers and the hit rates they need.
    assert cost.speedup_filled_pipe(0.835, 14) == pytest.approx(4.46, abs=0.02)
    assert cost.speedup_filled_pipe(0.939, 14) == pytest.approx(7.79, abs=0.05)
    # Played: the fill, a tick for each hit, a refill for each miss.
    n, tokens = 8, 10**6
    long = n + round(0.9 * tokens) + n * round(0.1 * tokens)
    assert math.isclose(n * tokens / long, cost.speedup_filled_pipe(0.9, n), rel_tol=1e-4)
    for hit_rate, stages in ((1.1, 4), (-0.1, 4), (0.5, 0)):
        with pytest.raises(ValueError, match="hit rate from 0 to 1"):
            cost.speedup_filled_pipe(hit_rate, stages)


def test_draft_steps_are_as_many_as_fit_beside_a_stage():
    costs = cost.Costs(layer=10, head=6, draft=15)
    assert [cost.draft_steps_beside_a_stage(costs, 16, stages) for stages in (16, 8, 5, 4, 1)] == [1, 1, 2, 2, 4]
    assert cost.draft_steps_beside_a_stage(cost.Costs(layer=1, head=0), 4, 4) == 4


def test_a_batch_is_free_until_multiplying_takes_longer_than_reading():
    seconds = [cost.roofline_seconds(1000, 2, width, bandwidth=10, operations=400) for width in (1, 40, 80)]
    assert seconds == [100, 100, 200]


def test_a_pass_of_one_model_pays_for_its_longest_stage_and_its_part_of_the_head():
    assert cost.pass_cost(cost.Costs(layer=10, head=6, exchange=1), layers=5, stages=2) == 3 * 10 + 6 / 2 + 1


def test_a_tick_of_several_models_lasts_as_long_as_the_slowest():
    assert cost.lockstep_tick_cost([(2, 4), (5, 1)], exchange=1) == 9
    assert cost.lockstep_tick_cost([(2, 2), (5, 1)]) == 5
