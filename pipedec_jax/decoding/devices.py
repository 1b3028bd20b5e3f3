"""Which devices decode: accelerators where there are enough, else as many virtual CPU devices as are needed."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence

import jax

from pipedec_jax.hosts.processes import process_count

_FLAG = "--xla_force_host_platform_device_count"


def use_cpu_devices(count: int) -> None:
    """Make the CPU show at least `count` devices. Must be called before JAX runs anything.

    `Decoder` calls it by itself; call it first when a later decoder of the same process needs more devices.

    Raises:
        RuntimeError: when JAX has already started with fewer.
    """
    if count <= max(getattr(jax.config, "jax_num_cpu_devices", -1), _flag_count()):
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise RuntimeError(
            f"JAX has already started, so the CPU cannot be made to show {count} devices; {_advice(count)}"
        ) from error


def pick_devices(ranks: int, parts: int = 1) -> list[jax.Device]:
    """The devices to decode on: JAX's default ones if they suffice, else virtual CPU devices.

    With several processes, these have as equal numbers of ranks as their devices allow, and each at least one.

    Args:
        ranks: places on the stage axis.
        parts: devices of each of them.

    Raises:
        ValueError: when there are fewer of either, or more processes than ranks.
    """
    count, processes = ranks * parts, process_count()
    # Before JAX has started nobody knows whether there is an accelerator; asking for CPU devices takes nothing away
    # from it. Each of several processes shows its own.
    started = None
    try:
        use_cpu_devices(-(-ranks // processes) * parts)
    except RuntimeError as error:
        started = error
    devices = jax.devices()
    if len(devices) >= count:
        return devices[:count] if processes == 1 else _spread(devices, ranks, parts)
    platform = devices[0].platform
    if platform != "cpu":
        cpus = _cpu_devices()
        if len(cpus) >= count:
            warnings.warn(
                f"decoding on virtual CPU devices: {count} are needed and there are {len(devices)} of {platform}",
                stacklevel=3,
            )
            return cpus[:count]
    raise ValueError(
        f"{count} devices are needed (see stages) but there are {len(devices)} ({platform}): use fewer "
        f"stages, or {_advice(count)}"
    ) from started


def _spread(devices: Sequence[jax.Device], ranks: int, parts: int) -> list[jax.Device]:
    """Ranks one after the other, process by process; a rank's devices belong to one process."""
    held: dict[int, list[jax.Device]] = {}
    for device in devices:
        held.setdefault(device.process_index, []).append(device)
    if ranks < len(held):
        raise ValueError(
            f"there are {len(held)} processes for {ranks} ranks (stages, and one of the draft): each needs one at least"
        )
    room = {process: len(own) // parts for process, own in held.items()}
    if sum(room.values()) < ranks:
        raise ValueError(
            f"the processes have room for {sum(room.values())} ranks of {parts} devices each, and {ranks} are needed "
            "(a rank's devices, see tensor_parallel, belong to one process)"
        )
    taken = dict.fromkeys(held, 0)
    for _ in range(ranks):
        taken[min((p for p in held if taken[p] < room[p]), key=lambda p: (taken[p], p))] += 1
    return [device for process, own in held.items() for device in own[: taken[process] * parts]]


def _cpu_devices() -> list[jax.Device]:
    try:
        return jax.devices("cpu")
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out.
        return []


def _flag_count() -> int:
    found = re.findall(rf"{_FLAG}=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return int(found[-1]) if found else 1


def _advice(count: int) -> str:
    return f"call pipedec_jax.use_cpu_devices({count}) first thing, or start with XLA_FLAGS={_FLAG}={count}"
