"""Which process this is and how many there are, known before JAX has looked at any device.

`jax.process_index()` and `jax.process_count()` start the devices, which must wait until their number is chosen.
"""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

MOST_CORES = 4096
"""Of a machine; those beyond are not counted where several processes share it."""


def process_count() -> int:
    """Processes that have joined (P); 1 where `jax.distributed` is not in use."""
    return _joined().num_processes if jax.distributed.is_initialized() else 1


def process_index() -> int:
    """This process's number, from 0."""
    return _joined().process_id if jax.distributed.is_initialized() else 0


def _joined() -> Any:
    """What `jax.distributed.initialize` made: there is no public way to it, and only several processes need it."""
    from jax._src import distributed

    return distributed.global_state


def store() -> Any:
    """The client of JAX's coordination service: a key-value store and barriers for all processes.

    Raises:
        RuntimeError: where `jax.distributed` is not in use.
    """
    client = _joined().client if jax.distributed.is_initialized() else None
    if client is None:
        raise RuntimeError("this process has joined no others: call jax.distributed.initialize first")
    return client


def usable_cores() -> int:
    """Processor cores that this process may run on, by its affinity (as `taskset` and containers set it)."""
    return len(_core_numbers())


def cores_in_all(devices: Sequence[jax.Device]) -> int:
    """How many CPU devices of all processes work at the same time: of a machine, no more than cores that these may use.

    Args:
        devices: of all processes. All processes call it alike.
    """
    machine = np.asarray([zlib.crc32(socket.gethostname().encode())], np.uint32)
    usable = np.isin(np.arange(MOST_CORES), _core_numbers())
    mine = np.concatenate((machine.view(np.int32), np.packbits(usable).view(np.int32)))
    facts = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, len(mine))
    cores: dict[int, np.ndarray] = {}
    held: dict[int, int] = {}
    for process, (name, *mask) in enumerate(facts.tolist()):
        cores[name] = cores.get(name, 0) | np.asarray(mask, np.int32)
        held[name] = held.get(name, 0) + sum(device.process_index == process for device in devices)
    return sum(min(int(np.bitwise_count(mask.view(np.uint32)).sum()), held[name]) for name, mask in cores.items())


def _core_numbers() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))  # not Linux
