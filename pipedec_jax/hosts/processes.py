"""Which process this is and how many there are, known before JAX has looked at any device.

`jax.process_index()` and `jax.process_count()` start the devices, which must wait until their number is chosen.
"""

from __future__ import annotations

import socket
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # where JAX keeps what jax.distributed.initialize made; there is no public way to it
from jax.experimental import multihost_utils


def process_count() -> int:
    """Processes that have joined (P); 1 where `jax.distributed` is not in use."""
    return distributed.global_state.num_processes if jax.distributed.is_initialized() else 1


def process_index() -> int:
    """This process's number, from 0."""
    return distributed.global_state.process_id if jax.distributed.is_initialized() else 0


def store() -> Any:
    """The client of JAX's coordination service: a key-value store and barriers for all processes.

    Raises:
        RuntimeError: where `jax.distributed` is not in use.
    """
    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("this process has joined no others: call jax.distributed.initialize first")
    return client


def cores_in_all(devices: Sequence[jax.Device], cores: int) -> int:
    """How many CPU devices of all processes work at the same time: of a machine, no more than it has cores.

    Args:
        devices: of all processes.
        cores: of this machine. All processes call it alike.
    """
    machine = zlib.crc32(socket.gethostname().encode())
    facts = multihost_utils.process_allgather(np.asarray([machine, cores], np.int64).view(np.int32))
    told = np.ascontiguousarray(facts).reshape(-1, 4).view(np.int64)
    found: dict[int, list[int]] = {}
    for process, (name, count) in enumerate(told.tolist()):
        here = sum(device.process_index == process for device in devices)
        before = found.get(name, [count, 0])
        found[name] = [min(count, before[0]), before[1] + here]
    return sum(min(count, held) for count, held in found.values())
