"""What several processes measure together, where there is one: on which devices, and that it is measured."""

from __future__ import annotations

import types
from typing import Any

import jax
import pytest

from pipedec_jax.hierarchy import together


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
