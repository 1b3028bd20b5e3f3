"""All methods on several processes against one process: the cases, and what became of each."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from pipedec_jax.hosts.launch import finish, launch
from pipedec_jax.loading import demo_directory

SHAPES = ((2, 1), (2, 2), (4, 1), (3, 1))
"""Processes, and devices of each."""
METHODS = (
    *("pp", "stpp", "pipedec", "best-first", "ppsd", "eesd", "speculative", "pipespec", "pipespec of three"),
    *("pp, tensor 2", "best-first, tensor 2"),
)
"""As `--method` has them; of three models, and with each stage split over two devices."""
PROMPTS = (
    {"prompt": "def quicksort(items):\n"},
    {"prompt": "class Stack:\n    def __init__(self):\n"},
    {"prompt": "for index, value in enumerate(", "temperature": 0.8, "seed": 7},
)
"""Two greedy answers and one that is drawn."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A method on some processes."""

    method: str
    processes: int
    devices: int

    @property
    def name(self) -> str:
        """As it stands in tables."""
        return f"{self.method} {self.processes}x{self.devices}"

    @property
    def total(self) -> int:
        """Devices of all processes."""
        return self.processes * self.devices

    @property
    def arguments(self) -> list[str] | None:
        """Of `generate.py`, so that all devices are used; `None` where there are too few of them."""
        draft, target = (str(demo_directory(name)) for name in ("draft", "middle"))
        method, _, split = self.method.partition(", ")
        if split:
            parts = int(split.removeprefix("tensor "))
            whole = Case(method, 1, self.total // parts).arguments
            return None if self.total % parts or whole is None else [*whole, "--tensor-parallel", str(parts)]
        if self.method.startswith("pipespec") or self.method == "speculative":
            models = [draft, draft, target] if self.method.endswith("three") else [draft, target]
            stages, passes = self.total - len(models) + 1, ["3", "1"][: len(models) - 1]
            if stages < 1:
                return None
            method = self.method.split()[0]
            return ["--method", method, "--models", *models, "--passes", *passes, "--stages", str(stages)]
        chosen = ["--method", self.method, "--target", target]
        if self.method == "pp":
            return [*chosen, "--stages", str(self.total)]
        if self.method in ("ppsd", "eesd"):
            return [*chosen, "--exit-layer", "1", "--exit-head", "target", "--stages", str(self.total)]
        if self.total < 2:
            return None
        sizes = ["--width", "4", "--children", "4", *(["--depth", "3"] if self.method == "stpp" else [])]
        return [*chosen, "--draft", draft, "--stages", str(self.total - 1), *sizes]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    tokens: int
    """Of all answers."""
    differing: int
    """Of them, that are not one process's."""
    seconds: float
    """Start, compiling and decoding."""


def cases(shapes: Sequence[tuple[int, int]] = SHAPES, methods: Sequence[str] = METHODS) -> list[Case]:
    """Those that have a sense."""
    found = [Case(method, *shape) for shape in shapes for method in methods]
    return [case for case in found if case.arguments is not None]


def decode(
    case: Case, processes: int, directory: Path, script: Path, new_tokens: int, timeout: float
) -> list[list[int]]:
    """The answers' tokens with so many processes on as many devices.

    Raises:
        RuntimeError: when a process fails.
    """
    directory.mkdir(parents=True, exist_ok=True)
    prompts, out = directory / "prompts.jsonl", directory / "answers.jsonl"
    out.unlink(missing_ok=True)
    prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS), encoding="utf-8")
    arguments = [*(case.arguments or ()), "--max-new-tokens", str(new_tokens)]
    # A loaded machine is slow, not at fault.
    arguments += ["--patience", str(timeout), "--start-patience", str(timeout)]
    arguments += ["--prompts", str(prompts), "--out", str(out)]
    for status, _, errors in finish(
        launch(processes, case.total // processes, arguments, script=script), timeout=timeout
    ):
        if status:
            raise RuntimeError(f"{case.name} with {processes} processes ended with {status}: {errors[-2000:]}")
    answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()[1:]]
    if [answer["line"] for answer in answers] != [1, 2, 3]:
        raise RuntimeError(f"{case.name}: lines {[answer['line'] for answer in answers]}")
    return [answer["token_ids"] for answer in answers]


def check(case: Case, expected: Sequence[Sequence[int]], directory: Path, script: Path, timeout: float) -> Outcome:
    """Compare a case with the answers of one process."""
    begun = time.perf_counter()
    longest = max(len(answer) for answer in expected)
    found = decode(case, case.processes, directory, script, longest, timeout)
    differing = 0
    for mine, theirs in zip(found, expected, strict=True):
        differing += sum(a != b for a, b in zip(mine, theirs, strict=False)) + abs(len(mine) - len(theirs))
    return Outcome(sum(map(len, found)), differing, time.perf_counter() - begun)
