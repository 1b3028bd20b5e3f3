"""Which devices decode: accelerators where there are enough, else as many virtual CPU devices as are needed."""

from __future__ import annotations

import os
import re
import warnings

import jax

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


def pick_devices(count: int) -> list[jax.Device]:
    """The first `count` devices to decode on: JAX's default ones if they suffice, else virtual CPU devices.

    Raises:
        ValueError: when there are fewer of either.
    """
    # With several processes the devices are the cluster's, and not this process's to choose. Before JAX has started
    # nobody knows whether there is an accelerator; asking for CPU devices takes nothing away from it.
    started = None
    if not jax.distributed.is_initialized():
        try:
            use_cpu_devices(count)
        except RuntimeError as error:
            started = error
    devices = jax.devices()
    if len(devices) >= count:
        return devices[:count]
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
