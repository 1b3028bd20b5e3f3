"""Which process this is and how many there are, known before JAX has looked at any device.

`jax.process_index()` and `jax.process_count()` start the devices, which must wait until their number is chosen.
"""

from __future__ import annotations

from typing import Any

import jax
from jax._src import distributed  # where JAX keeps what jax.distributed.initialize made; there is no public way to it


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
