"""Where a device's time goes: what JAX's profiler recorded on an accelerator, or on CPU, added up."""

from __future__ import annotations

import collections
import dataclasses
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class DeviceProfile:
    """Measured by the profiler on one device, in seconds."""

    span: float
    """From the first kernel's start to the last one's end."""
    busy: float
    """Of it, with at least one kernel or copy running."""
    kernels: int
    """Kernels and copies that ran."""
    by_name: dict[str, tuple[int, float]]
    """How many ran and how long they took together, by name, longest first."""


def profile_device(run: Callable[[], Any]) -> DeviceProfile | None:
    """Profile a run that is compiled and warm; None where the profiler shows no accelerator's kernels."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(run())
        files = sorted(Path(directory).rglob("*.xplane.pb"))
        return read_profile(jax.profiler.ProfileData.from_file(str(files[-1]))) if files else None


def profile_host(run: Callable[[], Any]) -> dict[str, tuple[int, float]]:
    """Operations of a compiled and warm run on CPU: how many ran and their seconds together, by name, longest first.

    Names lose their numbers. Control flow holds what is in it, and operations of several devices overlap, so the times
    add up to more than the run's.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(run())
        (file,) = Path(directory).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    found: dict[str, list[float]] = collections.defaultdict(list)
    for plane in data.planes:
        for line in plane.lines if plane.name.startswith("/host:CPU") else ():
            for event in line.events:
                # Python's own frames begin with a dollar sign.
                if not event.name.startswith("$"):
                    found[re.sub(r"[.\d]+$", "", event.name)].append(event.duration_ns)
    longest = sorted(found.items(), key=lambda item: -sum(item[1]))
    return {name: (len(times), 1e-9 * sum(times)) for name, times in longest}


def read_profile(data: Any) -> DeviceProfile | None:
    """Add up the events of the first device's streams in a `jax.profiler.ProfileData`."""
    planes = [plane for plane in data.planes if plane.name.startswith("/device:") and "CUSTOM" not in plane.name]
    for plane in planes:
        lines = [line for line in plane.lines if line.name.startswith("Stream")]
        events = [(event.name, event.start_ns, event.duration_ns) for line in lines for event in line.events]
        if events:
            return add_up(events)
    return None


def add_up(events: list[tuple[str, float, float]]) -> DeviceProfile:
    """The profile of events given by name, start and duration in nanoseconds; they may overlap."""
    by_name: dict[str, list[float]] = collections.defaultdict(list)
    busy, end = 0.0, 0.0
    ordered = sorted(events, key=lambda event: event[1])
    for name, start, duration in ordered:
        by_name[name].append(duration)
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    total = {name: (len(found), 1e-9 * sum(found)) for name, found in by_name.items()}
    return DeviceProfile(
        span=1e-9 * (end - ordered[0][1]),
        busy=1e-9 * busy,
        kernels=len(events),
        by_name=dict(sorted(total.items(), key=lambda item: -item[1][1])),
    )
