"""Which devices decode, and in which dtype: accelerators, where there are enough, else virtual CPU devices."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pipedec_jax.checks import check_count
from pipedec_jax.hosts.processes import cores_in_all, process_count, usable_cores

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Dtypes of weights, activations and caches to decode in; float64 needs JAX's x64 mode."""
MOST_ON_CPU = 2**28
"""Weights of models that are decoded on virtual CPU devices where accelerators are too few: a GiB in float32."""
_FLAG = "--xla_force_host_platform_device_count"


def use_cpu_devices(count: int) -> None:
    """Make the CPU show at least `count` devices. Must be called before JAX runs anything.

    `Decoder` calls it by itself; call it first when a later decoder of the same process needs more devices.

    Raises:
        ValueError: for a count that is no whole number of at least 1.
        RuntimeError: when JAX has already started with fewer.
    """
    check_count("count", count)
    if count <= max(getattr(jax.config, "jax_num_cpu_devices", -1), _flag_count()):
        return
    try:
        jax.config.update("jax_num_cpu_devices", int(count))
    except RuntimeError as error:
        raise RuntimeError(
            f"JAX has already started, so the CPU cannot be made to show {count} devices; {_advice(count)}"
        ) from error


def pick_devices(ranks: int, parts: int = 1, weights: int = 0) -> list[jax.Device]:
    """The devices to decode on: JAX's default ones if they suffice, else, for small models, virtual CPU devices.

    With several processes, these have as equal numbers of ranks as their devices allow, and each at least one. Where
    there are too few ranks or devices of a process for that, a rank's devices are those of several processes.

    Args:
        ranks: places on the stage axis.
        parts: devices of each of them.
        weights: how many the models have together.

    Raises:
        ValueError: when there are too few devices, or more processes than devices are needed, or JAX cannot start.
    """
    count, processes = ranks * parts, process_count()
    # Before JAX has started nobody knows whether there is an accelerator; asking for CPU devices takes nothing away
    # from it. Each of several processes shows its own.
    started = None
    try:
        use_cpu_devices(-(-ranks // processes) * parts if ranks >= processes else -(-count // processes))
    except RuntimeError as error:
        started = error
    devices = _default_devices()
    if len(devices) >= count:
        return devices[:count] if processes == 1 else _spread(devices, ranks, parts)
    platform = devices[0].platform
    if platform != "cpu" and weights > MOST_ON_CPU:
        raise ValueError(
            f"{count} devices are needed (see stages) but there are {len(devices)} ({platform}): use fewer stages, or "
            "set JAX_PLATFORMS=cpu to decode on virtual CPU devices all the same"
        )
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
    """Ranks one after the other, process by process; whole ones where each process can have at least one."""
    held: dict[int, list[jax.Device]] = {}
    for device in devices:
        held.setdefault(device.process_index, []).append(device)
    room = {process: len(own) // parts for process, own in held.items()}
    if ranks < len(held) or min(room.values()) == 0 or sum(room.values()) < ranks:
        if ranks * parts < len(held):
            raise ValueError(
                f"there are {len(held)} processes for {ranks} ranks (stages, and one of the draft) of {parts} "
                "device(s) (see tensor_parallel): each needs a device at least"
            )
        ranks, parts, room = ranks * parts, 1, {process: len(own) for process, own in held.items()}
    taken = dict.fromkeys(held, 0)
    for _ in range(ranks):
        taken[min((p for p in held if taken[p] < room[p]), key=lambda p: (taken[p], p))] += 1
    return [device for process, own in held.items() for device in own[: taken[process] * parts]]


def room(devices: Sequence[jax.Device]) -> int:
    """How many of these work at the same time: accelerators all, CPU devices as many as there are cores.

    Where they are those of several processes, all of these call it alike.
    """
    if devices[0].platform != "cpu":
        return len(devices)
    return min(len(devices), usable_cores()) if process_count() == 1 else cores_in_all(devices)


def pick_room(ranks: int, weights: int = 0) -> list[jax.Device]:
    """All devices that can work at the same time, accelerators or this machine's cores, and at least so many.

    Of several processes, all that these have, and in each at least one.
    """
    if process_count() > 1:
        picked = pick_devices(max(ranks, process_count()), weights=weights)
        every = jax.devices() if picked[0].platform == jax.devices()[0].platform else picked
        return sorted(every, key=lambda device: device.process_index)
    cores = usable_cores()
    with contextlib.suppress(RuntimeError):  # JAX has started
        use_cpu_devices(max(ranks, cores))
    devices = _default_devices()
    if devices[0].platform != "cpu" and len(devices) >= ranks:
        return devices
    wanted = min(len(devices), max(ranks, cores)) if devices[0].platform == "cpu" else ranks
    return pick_devices(wanted, weights=weights)


def _default_devices() -> list[jax.Device]:
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX's assertion, where CUDA is not there, has no words.
        told = getattr(jax.config, "jax_platforms", None)
        raise ValueError(
            f"JAX cannot start the platforms that it was told to use (JAX_PLATFORMS={told}): leave it unset, or set it "
            f"to one that is here, such as cpu{f' ({error})' if str(error) else ''}"
        ) from error


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


def check_devices(devices: Sequence[jax.Device], count: int) -> list[jax.Device]:
    """The first `count` of the devices that are given.

    Raises:
        ValueError: when they are fewer, no devices, or one of them is there twice.
    """
    if not isinstance(devices, Sequence | np.ndarray) or not all(isinstance(one, jax.Device) for one in devices):
        raise ValueError(f"devices must be a list of JAX devices, not {devices!r}")
    if len(devices) < count:
        raise ValueError(f"{count} devices are needed (see stages) but {len(devices)} are given")
    taken = list(devices[:count])
    twice = [device for place, device in enumerate(taken) if device in taken[:place]]
    if twice:
        raise ValueError(f"devices must be different ones, but {twice[0]} is given twice among the {count} needed")
    return taken


def decoding_dtype(dtype: Any, stored: str, device: jax.Device) -> np.dtype[Any]:
    """The dtype to decode in, by default float32 on CPU and the `stored` one elsewhere.

    Raises:
        ValueError: for one that is not known, or float64 without JAX's 64-bit mode.
    """
    if dtype is None:
        dtype = "float32" if device.platform == "cpu" else stored
    try:
        found = None if isinstance(dtype, str) and dtype not in DTYPES else jax.numpy.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    check_dtype(found)
    return found


def check_dtype(dtype: np.dtype[Any]) -> None:
    """Raise `ValueError` for float64 where JAX's 64-bit mode is off here and now: it would silently be float32."""
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            "dtype float64 needs JAX's 64-bit mode, also while decoding: jax.config.update('jax_enable_x64', True) "
            "(jax.enable_x64(True) is for its block and thread alone)"
        )
