"""Costs by rows: the sizes they tell apart, computing live rows alone, and what is worth sending."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipedec_jax.exchange import AXIS
from pipedec_jax.schedules.best_first import BestFirstSchedule
from pipedec_jax.tick_costs import FLAT, TickCosts, over_live_rows

W = 6


def test_sizes_are_where_the_cost_rises() -> None:
    assert FLAT.sizes(8) == (8,)
    assert TickCosts((0.5, 1, 1, 2, 2, 2, 3)).sizes(6) == (2, 5, 6)
    assert TickCosts((0.5, 1, 1, 2, 2, 2, 3)).sizes(4) == (2, 4)
    assert TickCosts((1, 2)).sizes(4) == (4,)
    assert TickCosts((1.0, 2.0, 3.0)).of(jnp.asarray([0, 1, 2, 9])).tolist() == [1, 2, 3, 3]
    for cost in ((), (1, -1), (float("nan"),), ("1",)):
        with pytest.raises(ValueError, match="cost"):
            TickCosts(cost)


@pytest.mark.parametrize("sizes", [(W,), (1, 3, W)])
def test_live_rows_alone_are_computed_in_the_least_size_that_holds_them(sizes: tuple[int, ...]) -> None:
    def run(carry: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        return carry + rows.shape[0], 10 * rows

    def program(live: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        return over_live_rows(sizes, live, run, jnp.zeros(1, jnp.int32), rows)

    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((1,), (AXIS,), devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,))
    program = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=(spec(), spec()), out_specs=spec(AXIS)))
    rows = np.arange(1, W + 1, dtype=np.int32)
    for bits in range(2**W):
        live = np.asarray([bits >> i & 1 for i in range(W)], bool)
        computed, found = program(live, rows)
        assert np.array_equal(np.asarray(found)[live], 10 * rows[live])
        assert int(computed[0]) == (min(size for size in sizes if size >= live.sum()) if bits else 0)


@settings(max_examples=50)
@given(
    chances=st.lists(st.floats(0.001, 1), max_size=12),
    steps=st.lists(st.floats(0, 2), min_size=W, max_size=W),
    gain=st.floats(0.1, 8),
    root=st.booleans(),
)
def test_so_many_are_sent_that_their_gain_exceeds_the_cost_by_most(
    chances: list[float], steps: list[float], gain: float, root: bool
) -> None:
    costs = TickCosts(tuple(np.cumsum([1.0, *steps]).tolist()))
    score = np.full((4, 4), -np.inf, np.float32)
    score.ravel()[: len(chances) + root] = [*[np.inf] * root, *np.log(chances)]
    least = float(BestFirstSchedule(W, costs=costs, gain=gain).least_worth_sending(jnp.asarray(score)))
    best = sorted(np.minimum(np.exp(score.ravel()), 1).tolist(), reverse=True)[:W]
    worth = [gain * costs.cost[1] * sum(best[:count]) - costs.cost[count] for count in range(int(root), W + 1)]
    sent = int(np.sum(score >= least)) if least > -np.inf else W
    # Equal chances may be sent beyond the best count, which ties or is next to it.
    assert worth[min(sent, W) - int(root)] >= max(worth) - 1e-3 or len(set(chances)) < len(chances)
    assert sent >= root
