"""What several processes share and measure together, where there is one: which numbers, on which devices."""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipedec_jax.hierarchy import together
from pipedec_jax.hierarchy.exchange import TOLD, BufferExchange, is_here, pack_told, put, told, unpack_told
from pipedec_jax.hierarchy.pipe import Pipe, begin
from pipedec_jax.pipeline.engine import make_request
from pipedec_jax.pipeline.placement import make_mesh, replicate
from pipedec_jax.sampling import GREEDY


@pytest.mark.parametrize("of", [(2, 2), (4, 2), (1, 3), (3, 1), (2, 2, 2)], ids=str)
def test_stages_lie_on_both_sides_of_the_first_processs_border(monkeypatch: pytest.MonkeyPatch, of: Any) -> None:
    processes = [index for index, count in enumerate(of) for _ in range(count)]
    devices: list[Any] = [
        types.SimpleNamespace(process_index=process, place=place) for place, process in enumerate(processes)
    ]
    monkeypatch.setattr(together, "_exchange_seconds", lambda models, _, capacity: (models, capacity))
    monkeypatch.setattr(together, "staged_ticks", lambda *asked: asked[-1])
    workload: Any = types.SimpleNamespace(capacity=256)
    across, shared = together.measure_together([None] * 3, workload, [], devices)
    assert shared == (3, 256)
    for count in range(2, len(devices) + 1):
        found = across(count)
        assert [device.place for device in found] == [found[0].place + place for place in range(count)]
        assert {device.process_index for device in found} >= {0, 1}


@pytest.mark.parametrize("models", [1, 3])
def test_an_exchange_is_timed(models: int) -> None:
    assert 0 < together._exchange_seconds(models, jax.devices()[:4], 8) < 60


def test_what_each_model_publishes_is_known_on_all_devices() -> None:
    devices = jax.devices()
    meshes = [make_mesh(stages, devices[first : first + stages]) for first, stages in ((0, 1), (1, 2), (3, 1))]
    exchange, said = BufferExchange(meshes), [[5, -6, 7], [-8, 9, 2**31 - 1]]
    published = [replicate(mesh, np.asarray(words, np.int32)) for mesh, words in zip(meshes, said, strict=False)]
    found = exchange.share([*published, None], 3)
    assert [buffer.tolist() for buffer in found] == [*said, [0, 0, 0]]
    assert all(buffer.sharding.device_set == set(devices[:4]) for buffer in found)
    (_, _, last) = exchange.share([None, None, np.asarray(said[0], np.int32)], 3)
    assert last.tolist() == said[0], "of the host, as what it wants to know of a model"
    # To a model it goes as it lies there, or is brought there, in part or whole.
    for mesh, value in ((meshes[1], found[1]), (meshes[1], published[0]), (make_mesh(2, devices[:2]), published[0])):
        placed = put(mesh, value)
        assert placed.sharding.device_set == set(mesh.devices.flat)
        assert placed.tolist() == value.tolist()
    assert not exchange.needed
    elsewhere: Any = type("Elsewhere", (), {"process_index": 1})()
    exchange._model[elsewhere] = 2
    assert exchange.needed


def test_what_the_host_knows_of_a_model_is_the_same_in_every_process() -> None:
    state = begin(Pipe(width=2, target=None, mode=GREEDY.mode, sizes=(2,)), make_request([5], 3, 4, GREEDY))
    figures = {name: jnp.int32(20 + place) for place, name in enumerate(TOLD)}
    state = state.replace(
        own=state.own.replace(length=figures.pop("length")),
        tick=jnp.asarray([0, 1, 2, 3]),
        delay=jnp.asarray([-1, 0, 4, 5]),
        log_prob=jnp.asarray([0.0, -0.5, -jnp.inf, jnp.nan], jnp.float32),
        **figures,
    )
    for found in (told(state), unpack_told(pack_told(told(state)))):
        assert [getattr(found, name) for name in TOLD] == [20 + place for place in range(len(TOLD))]
        assert [found.length, found.read, found.passes, found.rollbacks] == [20, 21, 22, 23]
        assert (found.undone, found.stuck, found.stuck_pass) == (24, 25, 26)
        assert (found.token.tolist(), found.tick.tolist()) == ([5, 0, 0, 0], [0, 1, 2, 3])
        assert found.delay.tolist() == [-1, 0, 4, 5]
        np.testing.assert_array_equal(found.log_prob, state.log_prob)
    with pytest.raises(AttributeError, match="width"):
        _ = found.width


@pytest.mark.parametrize(
    ("kind", "local", "here"), [("cpu", 0, False), ("cpu", 1, True), ("compile_only_runtime", 0, True)]
)
def test_a_model_is_here_with_a_device_of_its_own_or_described(kind: str, local: int, here: bool) -> None:
    device = types.SimpleNamespace(client=types.SimpleNamespace(runtime_type=kind))
    mesh: Any = types.SimpleNamespace(devices=np.array([device]), local_devices=[device] * local)
    assert is_here(mesh) == here
