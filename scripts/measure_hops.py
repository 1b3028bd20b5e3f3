"""Time hop and broadcast of a tick, by processes and ranks, and the tick itself, on CPU devices of this machine.

The demo family's middle model on all ranks, with guesses looked up in the text. Each row is a start of its own.

python scripts/measure_hops.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import pipedec_jax
from pipedec_jax.analysis.hops import LOOPS, SUMS, Hops, measure_hops
from pipedec_jax.command_line.numbers import from_1, process_shape
from pipedec_jax.command_line.output import Parser, run_command
from pipedec_jax.disk_cache import use_compilation_cache
from pipedec_jax.hosts.group import join
from pipedec_jax.hosts.launch import finish, launch

SHAPES = ("1x2", "2x1", "1x3", "3x1", "1x4", "2x2", "4x1")
PROMPT = "def quicksort(items):\n"


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--shapes", type=process_shape, nargs="+", default=list(SHAPES), help="processes x devices")
    parser.add_argument("--width", type=from_1, default=16, help="rows of a batch")
    parser.add_argument("--ranks", type=int, help="of one process of a row: used by this script itself")
    parser.add_argument("--coordinator", help="the same")
    parser.add_argument("--num-processes", type=int, help="the same")
    parser.add_argument("--process-id", type=int, help="the same")
    options = parser.parse_args()
    if options.ranks:
        measure(options)
        return
    print_head(options.width)
    for shape in options.shapes:
        processes, devices = map(int, shape.split("x"))
        arguments = ["--ranks", str(processes * devices), "--width", str(options.width)]
        found = finish(launch(processes, devices, arguments, script=Path(__file__)), 600)
        if any(status for status, _, _ in found):
            sys.exit(found[0][2][-2000:])
        print_row(shape, Hops(**json.loads(found[0][1].splitlines()[-1])))


def measure(options: argparse.Namespace) -> None:
    """One process of a row."""
    use_compilation_cache()
    group = join(options.coordinator, options.num_processes, options.process_id)
    target = pipedec_jax.load_demo("middle")
    decoder = pipedec_jax.Decoder(target, drafter="ngram", stages=options.ranks, width=options.width)
    group.prepare(decoder)
    with group.preparing():
        found = measure_hops(decoder, PROMPT)
    if group.leads:
        print(json.dumps(dataclasses.asdict(found)), flush=True)
    group.leave()


def print_head(width: int) -> None:
    print(
        f"Measured: hop and broadcast of {width} rows of 192 floats, least of 5 calls of {LOOPS} each; ticks of "
        f"best-first with look-up, the middle model. The share is that of passing on (hop and broadcast as a tick has "
        f"them) and {SUMS} more broadcasts, alone.\n"
    )
    print(
        "| processes x devices | ranks | hop (us) | broadcast (us) | passing on (us) | tick (us) | share of the tick |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)


def print_row(shape: str, row: Hops) -> None:
    times = " | ".join(f"{seconds * 1e6:.0f}" for seconds in (row.hop, row.broadcast, row.passing_on, row.tick))
    print(f"| {shape} | {row.ranks} | {times} | {row.share:.0%} |", flush=True)


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
