"""Faults of one of two processes, made on purpose, and how long the other one takes to end."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pipedec_jax.hosts.launch import finish, free_port, launch
from pipedec_jax.loading import demo_directory

HANGS = """
import threading
from pipedec_jax.pipeline import engine

run, runs = engine.Engine.run, []

def hang(self, new_tokens):
    runs.append(new_tokens)
    if len(runs) > 6:
        threading.Event().wait()
    return run(self, new_tokens)

engine.Engine.run = hang
"""
"""Makes a process hang in the middle of an answer, in Python."""
OLD = "import pipedec_jax\npipedec_jax.__version__ = '0.0.9'\n"
"""Makes a process say that it is of another version."""
MAIN = "from pipedec_jax.command_line.running import main\nmain()\n"


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to one process while both decode, or before."""

    name: str
    victim: int
    signal: signal.Signals | None = None
    program: str = ""
    """Run in that process before `main`."""
    arguments: tuple[str, ...] = ()
    """Of that process alone."""
    missing: bool = False
    """Whether it is not started at all."""


FAULTS = (
    Fault("killed (SIGKILL)", 1, signal.SIGKILL),
    Fault("stopped (SIGSTOP)", 1, signal.SIGSTOP),
    Fault("hangs in Python", 1, program=HANGS),
    Fault("terminated (SIGTERM)", 1, signal.SIGTERM),
    Fault("coordinator killed (SIGKILL)", 0, signal.SIGKILL),
    Fault("coordinator stopped (SIGSTOP)", 0, signal.SIGSTOP),
    Fault("coordinator hangs in Python", 0, program=HANGS),
    Fault("coordinator interrupted (SIGINT)", 0, signal.SIGINT),
    Fault("missing at start", 1, missing=True),
    Fault("coordinator missing at start", 0, missing=True),
    Fault("another --seed", 1, arguments=("--seed", "5")),
    Fault("another version", 1, program=OLD),
    Fault("no such model there", 1, arguments=("--target", "/nowhere")),
)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What became of the process that nothing was done to."""

    seconds: float
    """From the fault to its end; from the start where the fault was there from the start."""
    status: int
    message: str
    """The first line of its errors that says so, else the last."""
    answers: int
    """Finished before."""


def write_prompts(path: Path, count: int) -> None:
    """Prompts of several lengths."""
    words = ("def", "class", "return", "for", "value", "in", "items:\n", "self.", "print(", ") == 0", "import os\n")
    prompts = (" ".join(words[(n * k) % len(words)] for k in range(1, 3 + n % 9)) for n in range(1, count + 1))
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")


def job(prompts: Path, out: Path, new_tokens: int) -> list[str]:
    """Arguments of a small job over a file of prompts, on two devices."""
    models = ["--target", str(demo_directory("draft")), "--method", "pp", "--stages", "2"]
    return [*models, "--prompts", str(prompts), "--out", str(out), "--max-new-tokens", str(new_tokens)]


def strike(
    fault: Fault, arguments: Sequence[str], out: Path, directory: Path, script: Path, patience: float, limit: float
) -> Seen:
    """Let two processes decode, do to one of them what the fault says, and wait for the other one.

    Args:
        fault: to be made.
        arguments: as `job` gives.
        out: the answers' file; a signal comes after two more answers than it holds.
        directory: where a program may be written.
        script: `generate.py`.
        patience: as `--patience`; half as much again to start.
        limit: seconds after which the other one counts as hung.

    Raises:
        TimeoutError: when it is.
    """
    waits = [*arguments, "--patience", str(patience), "--start-patience", str(1.5 * patience)]
    port, other, found = free_port(), 1 - fault.victim, answers(out)
    program = script
    if fault.program:
        program = directory / "program.py"
        program.write_text(fault.program + MAIN, encoding="utf-8")
    begun = time.monotonic()
    healthy = launch(2, 1, waits, script=script, port=port, only=[other])
    faulty = (
        []
        if fault.missing
        else launch(2, 1, [*waits, *fault.arguments], script=program, port=port, only=[fault.victim])
    )
    try:
        if fault.signal is not None:
            _wait(lambda: answers(out) >= found + 2 or healthy[0].poll() is not None, limit, "no answer came")
            begun = time.monotonic()
            faulty[0].send_signal(fault.signal)
        elif fault.program == HANGS:
            _wait(lambda: answers(out) >= found + 1 or healthy[0].poll() is not None, limit, "no answer came")
            begun = time.monotonic()
        try:
            ((status, _, errors),) = finish(healthy, limit)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{fault.name}: the other process is still there after {limit:g} s") from None
        return Seen(time.monotonic() - begun, status, _message(errors), answers(out))
    finally:
        for process in (*healthy, *faulty):
            process.kill()  # also one that is stopped
            process.communicate()


def answers(out: Path) -> int:
    """Finished ones."""
    return max(0, out.read_bytes().count(b"\n") - 1) if out.exists() else 0


def read_answers(out: Path) -> list[tuple[int, list[int]]]:
    """Number and tokens of each, in order."""
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()[1:]]
    return [(line["line"], line["token_ids"]) for line in lines]


def _message(errors: str) -> str:
    lines = [line for line in errors.splitlines() if line]
    own = [line for line in lines if line.startswith("error: ")]
    jax = [line[line.index("Terminating") :] for line in lines if "Terminating process" in line]
    return (own or jax or lines or [""])[0]


def _wait(until: Callable[[], bool], limit: float, message: str) -> None:
    end = time.monotonic() + limit
    while not until():
        if time.monotonic() > end:
            raise TimeoutError(message)
        time.sleep(0.05)
