"""Start-up of the demo to its first token, cold (no compiled program kept) and warm, by steps. Measured.

python scripts/measure_startup.py
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from pipedec_jax.analysis.startup import STEPS, measure_startup
from pipedec_jax.command_line.numbers import from_0
from pipedec_jax.command_line.output import Parser, run_command


def main(arguments: list[str] | None = None) -> None:
    """Start processes, print a table of medians."""
    parser = Parser(description=__doc__)
    parser.add_argument("--cold", type=from_0, default=1, help="processes without kept programs (1)")
    parser.add_argument("--warm", type=from_0, default=5, help="processes with them (5)")
    options = parser.parse_args(arguments)
    runs: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as place:
        for number in range(max(1, options.cold)):
            runs["cold"].append(measure_startup(Path(place) / str(number)))
        for _ in range(options.warm):
            runs["warm"].append(measure_startup(Path(place) / "0"))
    print("measured, seconds from the start of the process, medians; lowest and highest sum")
    print("| start | " + " | ".join(STEPS) + " | all | lowest | highest |\n|" + " --- |" * (len(STEPS) + 4))
    for name, found in runs.items():
        if not found:
            continue
        sums = [sum(run.values()) for run in found]
        cells = [statistics.median(run[step] for run in found) for step in STEPS]
        cells += [statistics.median(sums), min(sums), max(sums)]
        print(f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")


if __name__ == "__main__":
    run_command(main)
