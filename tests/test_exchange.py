"""What passes between devices, against arrays put together in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pipedec_jax import exchange
from pipedec_jax.exchange import AXES, AXIS, broadcast, gather_over_devices, leads, pass_on, sum_over_devices, vary
from pipedec_jax.pipeline.placement import make_mesh


@pytest.fixture(autouse=True)
def wide_floats():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("together", [False, True], ids=["alone", "in the broadcast"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("stages", "ranks", "parts"), [(1, 1, 1), (3, 4, 1), (2, 3, 2), (2, 2, 3)])
def test_activations_move_one_stage_on_and_the_last_ones_are_known_to_all(
    monkeypatch, stages, ranks, parts, dtype, together
):
    monkeypatch.setattr(exchange, "SMALL", 10**6 if together else 0)
    # All devices of a rank have the same rows.
    rows = jax.random.normal(jax.random.key(0), (ranks, 2, 5), jnp.float32).astype(dtype)
    rows = rows.at[0, 0, 0].set(jnp.nan).at[-1, 0, 1].set(-jnp.inf)

    def run(rows_RWD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        rank = jax.lax.axis_index(AXIS)
        note = vary(jnp.asarray([7, -3], jnp.int32))
        received, last, (note,) = pass_on(rows_RWD[rank], stages, [(note, leads() & (rank == ranks - 1))])
        return received[None], last, note

    mesh = make_mesh(ranks, jax.devices()[: ranks * parts], parts)
    spread = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(P(),), out_specs=(P(AXES), P(), P())))
    received, last, note = jax.device_get(spread(rows))
    moves = str(jax.make_jaxpr(spread)(rows)).count("ppermute")
    assert moves == (stages > 1 and not together)
    before = [rows[k - 1] if 0 < k < stages else jnp.zeros_like(rows[0]) for k in range(ranks)]
    assert received.tobytes() == np.repeat(jnp.stack(before), parts, axis=0).tobytes()
    assert last.tobytes() == np.asarray(rows[stages - 1]).tobytes()
    assert note.tolist() == [7, -3]


def test_bits_of_any_shape_arrive_beside_other_kinds():
    kinds = {"bits": (5, 13), "flag": (), "none": (0, 3), "word": (32,), "words": (2, 33)}
    keys = jax.random.split(jax.random.key(1), len(kinds))
    sent = {
        name: jax.random.bernoulli(key, shape=shape) for key, (name, shape) in zip(keys, kinds.items(), strict=True)
    }
    sent |= {"half": jnp.arange(3, dtype=jnp.bfloat16) - 1, "count": jnp.asarray([-(2**31), 5], jnp.int32)}

    def run(sent: Any) -> tuple[Any, Any]:
        rank = jax.lax.axis_index(AXIS)
        mine = jax.tree.map(lambda leaf: vary(jnp.where(rank == 2, leaf, jnp.zeros_like(leaf))), sent)
        (received,) = broadcast([(mine, leads() & (rank == 2))])
        return received, gather_over_devices(mine)

    mesh = make_mesh(3, jax.devices()[:3])
    received, gathered = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(P(),), out_specs=P()))(sent)
    assert jax.tree.map(lambda leaf: leaf.dtype, received) == jax.tree.map(lambda leaf: leaf.dtype, sent)
    for name, leaf in sent.items():
        assert np.array_equal(received[name], leaf), name
        assert gathered[name].shape == (3, *leaf.shape)
        assert np.array_equal(gathered[name][2], leaf), name
        assert not np.any(gathered[name][:2]), name


@pytest.mark.parametrize("sent", [np.arange(6.0).reshape(2, 3), np.asarray([7, -3], np.int32)], ids=["floats", "whole"])
def test_sums_over_all_devices_keep_shape_and_kind(sent):
    def run(sent: jax.Array) -> jax.Array:
        rank = jax.lax.axis_index(AXES)
        return sum_over_devices(sent * (1 + rank).astype(sent.dtype))

    spread = jax.shard_map(run, mesh=make_mesh(2, jax.devices()[:4], 2), in_specs=(P(),), out_specs=P())
    found = jax.jit(spread)(sent)
    assert found.dtype == sent.dtype
    assert np.array_equal(found, 10 * sent)
