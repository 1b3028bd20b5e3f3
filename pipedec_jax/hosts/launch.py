"""Several processes of `scripts/generate.py` on this machine, over the loopback address: to check what clusters do."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def slurm_variables(processes: int, index: int, port: int) -> dict[str, str]:
    """As SLURM's `srun` sets them for one of several processes on this machine; JAX takes the port from the job's id.

    Raises:
        ValueError: when JAX has no job's id for that port.
    """
    first = 2**16 - 2**12
    if not first <= port < 2**16:
        raise ValueError(f"a SLURM job's port is {first} to {2**16 - 1}, not {port}")
    values = {"JOB_ID": port - first, "NTASKS": processes, "PROCID": index, "LOCALID": index, "STEP_NUM_NODES": 1}
    return {f"SLURM_{name}": str(value) for name, value in values.items()} | {"SLURM_STEP_NODELIST": "127.0.0.1"}


def free_slurm_port() -> int:
    """A port that nobody listens at now, of those that SLURM jobs have."""
    for port in range(2**16 - 1, 2**16 - 2**12, -1):
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


def environment(devices: int) -> dict[str, str]:
    """For a process that shows so many CPU devices."""
    flags = " ".join(flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag)
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join((root, *filter(None, [os.environ.get("PYTHONPATH")])))
    return {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": paths,
    }


def launch(
    processes: int,
    devices: int,
    arguments: Sequence[str],
    *,
    script: Path,
    port: int | None = None,
    only: Sequence[int] | None = None,
    own: dict[int, Sequence[str]] | None = None,
    slurm: bool = False,
) -> list[subprocess.Popen[str]]:
    """Start the processes; a single one as it would be without others.

    Args:
        processes: how many there are.
        devices: of each.
        arguments: of all.
        script: `generate.py`, or a program that ends in its `main`.
        port: of the coordinator; a free one by default.
        only: numbers of those that are started; all by default.
        own: arguments of some, by their numbers.
        slurm: whether they find each other by SLURM's variables, not by `--coordinator`.
    """
    port = port or (free_slurm_port() if slurm else free_port())
    started = []
    for index in range(processes) if only is None else only:
        group = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(processes), "--process-id", str(index)]
        if slurm:
            group = ["--hosts", "auto"]
        command = [
            sys.executable,
            str(script),
            *(group if processes > 1 else []),
            *arguments,
            *(own or {}).get(index, ()),
        ]
        started.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(devices) | (slurm_variables(processes, index, port) if slurm else {}),
            )
        )
    return started


def finish(started: Sequence[subprocess.Popen[str]], timeout: float) -> list[tuple[int, str, str]]:
    """Status, output and errors of each process; those that do not end in time are killed.

    Raises:
        subprocess.TimeoutExpired: when one does not end.
    """
    found = []
    try:
        for process in started:
            output, errors = process.communicate(timeout=timeout)
            found.append((process.returncode, output, errors))
        return found
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
