"""What several processes can only measure together: stages of a model in more than one, and the exchange of buffers.

A process times passes of a whole model alone (`measure`). What parting it at the border between processes adds to a
tick, and what it takes to bring every model's buffer to all of them, is timed here, every process taking part.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax

from pipedec_jax.hierarchy.buffers import FIGURES
from pipedec_jax.hierarchy.exchange import BufferExchange
from pipedec_jax.hierarchy.measure import REPEATS, Workload, staged_ticks
from pipedec_jax.model.parameters import ParameterSource
from pipedec_jax.pipeline import placement

SHARES = 16
"""Exchanges that are timed at a time."""


def measure_together(
    sources: Sequence[ParameterSource],
    workload: Workload,
    stages: Sequence[Sequence[int]],
    devices: Sequence[jax.Device],
) -> tuple[list[dict[int, float]], float]:
    """Time ticks of stages across processes, and a tick's exchange of buffers. All processes call it alike.

    Args:
        sources: the models' weights, the smallest first.
        workload: what is decoded.
        stages: of each model, numbers of stages.
        devices: of all processes, the first one's first.

    Returns:
        `measure.staged_ticks`, complete in the first process, whose devices are among those of every number of stages;
        and seconds of an exchange.
    """
    own = sum(device.process_index == devices[0].process_index for device in devices)

    def across(count: int) -> Sequence[jax.Device]:
        first = min(max(0, own - count // 2), len(devices) - count)
        return devices[first : first + count]

    ticks = staged_ticks(sources, workload, stages, across)
    return ticks, _exchange_seconds(len(sources), devices, workload.capacity)


def _exchange_seconds(models: int, devices: Sequence[jax.Device], capacity: int) -> float:
    """Least seconds in which the buffers of so many models come to all processes, a model being on one device."""
    first = list({device.process_index: device for device in reversed(devices)}.values())
    spare = [device for device in devices if device not in first]
    used = sorted([*first, *spare[: max(0, models - len(first))]], key=devices.index)
    exchange = BufferExchange([placement.make_mesh(1, [device]) for device in used])
    length = len(FIGURES) + capacity
    times = []
    for _ in range(REPEATS + 1):  # the first one compiles
        shared: list[Any] = [None] * len(used)
        jax.block_until_ready(exchange.share(shared, length))
        begun = time.perf_counter()
        for _ in range(SHARES):
            shared = exchange.share(shared, length)
        jax.block_until_ready(shared)
        times.append(time.perf_counter() - begun)
    return min(times[1:]) / SHARES
