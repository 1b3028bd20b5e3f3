"""Costs by rows: the sizes they tell apart, computing live rows alone, and what is worth sending."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipedec_jax import tree
from pipedec_jax.exchange import AXES
from pipedec_jax.pipeline.methods import batch_price
from pipedec_jax.pipeline.placement import make_mesh
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.schedules.best_first import BestFirstSchedule, widest_in_flight
from pipedec_jax.tick_costs import Curve, TickCosts, few_rows, over_live_rows

W = 6


def test_sizes_are_where_the_cost_rises() -> None:
    assert Curve((0.0, 1.0)).sizes(8) == (8,)
    assert Curve((0.5, 1, 1, 2, 2, 2, 3)).sizes(6) == (2, 5, 6)
    assert Curve((0.5, 1, 1, 2, 2, 2, 3)).sizes(4) == (2, 4)
    assert Curve((1, 2)).sizes(4) == (4,)
    assert Curve((1.0, 2.0, 3.0)).of(jnp.asarray([0, 1, 2, 9])).tolist() == [1, 2, 3, 3]
    for cost in ((), (1, -1), (float("nan"),), ("1",), (2, 1)):
        with pytest.raises(ValueError, match="cost"):
            Curve(cost)


def test_a_tick_costs_its_longest_part_then_both_slices_and_the_exchange() -> None:
    rows = {count: jnp.int32(count) for count in range(4)}
    costs = TickCosts(
        stage=Curve((0.0, 1.0, 2.0, 4.0)),
        head=Curve((0.0, 10.0, 20.0)),
        exit_vocabulary=Curve((0.0, 100.0, 200.0)),
        exchange=1000.0,
    )
    assert costs.of(rows[3], jnp.float32(3), rows[1]) == 1014
    assert costs.of(rows[2], jnp.float32(3), rows[0], rows[2]) == 1203
    assert costs.of(rows[1], jnp.float32(0), rows[2], rows[1]) == 1121
    assert (costs.slices(3), costs.slices(1, 1), costs.slices(0, 5)) == (20, 110, 200)
    # An exit that shares the target's head: the rows of both are one batch of it.
    shared = TickCosts(stage=costs.stage, head=Curve((0.0, 10.0, 20.0, 40.0)))
    assert shared.of(rows[1], jnp.float32(0), rows[1], rows[2]) == 41
    assert shared.of(rows[1], jnp.float32(0), rows[0], rows[1]) == 11
    assert (shared.slices(2), shared.slices(1, 1), shared.slices(3, 3)) == (20, 20, 40)


def on_one_device(program: Callable[[jax.Array, jax.Array], Any]) -> Callable[[np.ndarray, np.ndarray], Any]:
    spec = jax.sharding.PartitionSpec
    mesh = make_mesh(1)
    return jax.jit(jax.shard_map(program, mesh=mesh, in_specs=(spec(), spec()), out_specs=spec(AXES)))


def any_rows() -> Iterator[np.ndarray]:
    """All ways in which rows can live."""
    for alive in itertools.product((False, True), repeat=W):
        yield np.asarray(alive)


@pytest.mark.parametrize("sizes", [(W,), (1, 3, W)])
def test_live_rows_alone_are_computed_in_the_least_size_that_holds_them(sizes: tuple[int, ...]) -> None:
    def run(carry: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        return carry + rows.shape[0], 10 * rows

    def program(live: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        return over_live_rows(sizes, live, run, jnp.zeros(1, jnp.int32), rows)

    rows, program = np.arange(1, W + 1, dtype=np.int32), on_one_device(program)
    for live in any_rows():
        computed, found = program(live, rows)
        assert np.array_equal(np.asarray(found)[live], 10 * rows[live])
        assert int(computed[0]) == (min(size for size in sizes if size >= live.sum()) if live.any() else 0)


def test_without_a_carry_live_rows_alone_are_computed_too() -> None:
    def program(live: jax.Array, rows: jax.Array) -> jax.Array:
        def run(_: None, rows: jax.Array) -> tuple[None, jax.Array]:
            return None, 10 * rows + rows.shape[0]

        return over_live_rows((1, 3, W), live, run, None, rows)[1]

    rows, program = np.arange(1, W + 1, dtype=np.int32), on_one_device(program)
    for live in any_rows():
        found = np.asarray(program(live, rows))
        computed = min(size for size in (1, 3, W) if size >= live.sum())
        assert np.array_equal(found[live], 10 * rows[live] + computed)


@pytest.mark.parametrize(("width", "sizes"), [(1, (1,)), (4, (1, 4)), (5, (1, 4, 5)), (64, (1, 4, 16, 64))])
def test_few_rows_grow_by_four(width: int, sizes: tuple[int, ...]) -> None:
    assert few_rows(width) == sizes


@settings(max_examples=20)
@given(
    chances=st.lists(st.floats(0.001, 1), max_size=12),
    steps=st.lists(st.floats(0, 2), min_size=W, max_size=W),
    root=st.booleans(),
    flying=st.integers(0, W),
)
def test_so_many_are_sent_that_their_chances_exceed_what_they_cost_by_most(
    chances: list[float], steps: list[float], root: bool, flying: int
) -> None:
    price = Curve(tuple(np.cumsum([0.0, *steps]).tolist()))
    score = np.full((4, 4), -np.inf, np.float32)
    score.ravel()[: len(chances) + root] = [*[np.inf] * root, *np.log(chances)]
    # The root and a batch of as many of its children are in flight.
    nodes = tree.plant(W + 1, W, jnp.int32(0), jnp.int32(0))
    nodes = tree.guess(nodes, np.zeros(1, np.int32), np.arange(W, dtype=np.int32)[None], -np.ones((1, W), np.float32))
    parent = np.where(np.arange(W) < flying, 0, nodes.capacity).astype(np.int32)
    nodes, children = tree.add(nodes, parent, np.arange(W, dtype=np.int32))
    nodes = tree.send(tree.send(nodes, np.zeros(1, np.int32), jnp.int32(1)), children, jnp.int32(2))

    kept = np.asarray(BestFirstSchedule(W, price=price).worthwhile(nodes, jnp.asarray(score)))
    sent = int(np.sum(kept > -np.inf))
    assert sorted(kept.ravel())[::-1][:sent] == sorted(score.ravel())[::-1][:sent]
    assert sent >= root
    if len(set(chances)) == len(chances):  # equal ones are sent together
        best = sorted(np.minimum(np.exp(score.ravel()), 1).tolist(), reverse=True)[:W]
        worth = [sum(best[:count]) - price.cost[max(count, flying, 1)] for count in range(W + 1)]
        assert worth[sent] >= max(worth[int(root) :]) - 1e-3


def test_the_widest_batch_in_flight_is_counted_without_what_was_pruned_or_has_left() -> None:
    planted, widest = jax.jit(tree.plant, static_argnums=(0, 1))(8, 1, 0, 0), jax.jit(widest_in_flight)

    def flags(*places: int) -> np.ndarray:
        return np.isin(np.arange(8), places)

    assert widest(planted) == 1, "nothing flies"
    sent_tick = np.asarray([1, 2, 2, 2, 4, 4, 0, 0], np.int32)
    nodes = planted.replace(alive=flags(0, 1, 2, 3, 4, 5, 6), sent_tick=sent_tick)
    assert widest(nodes) == 3
    assert widest(nodes.replace(alive=flags(0, 2, 4, 5))) == 2
    assert widest(nodes.replace(known=flags(0, 1, 2))) == 2
    assert widest(nodes.replace(alive=flags(0, 4, 5), known=flags(0, 4))) == 1


def test_rows_are_the_cheaper_the_more_a_tick_takes_in_any_case() -> None:
    stage = Curve((0.0, 1.0, 2.0, 4.0))

    def price(**costs: Any) -> tuple[float, ...]:
        found = batch_price(
            EngineSettings(method="best-first", width=3, draft_steps=2, costs=TickCosts(stage=stage, **costs))
        )
        assert found is not None
        return found.cost

    assert price() == (0.0, 1.0, 2.0, 4.0)
    assert price(exchange=1.0) == (0.5, 1.0, 1.5, 2.5)
    assert price(draft=Curve((0.0, 1.5))) == (1.0, 1.0, 1.0, 4 / 3)
    assert batch_price(EngineSettings(width=3, adaptive=False, costs=TickCosts(stage=stage))) is None
