"""Decode with every method on several processes of this machine, and compare the tokens with those of one process.

A case that has been checked is found again in WORK_DIR/outcomes.jsonl. Every answer goes through --prompts and --out.

python scripts/check_hosts.py WORK_DIR
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from tqdm import tqdm

from pipedec_jax.command_line.numbers import from_1, over_0, process_shape
from pipedec_jax.command_line.output import Parser, run_command
from pipedec_jax.hosts.grid import METHODS, SHAPES, Case, cases, check, decode

SCRIPT = Path(__file__).parent / "generate.py"


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where to work")
    usual = [f"{processes}x{devices}" for processes, devices in SHAPES]
    parser.add_argument("--shapes", type=process_shape, nargs="+", default=usual, help="processes x devices")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--new-tokens", type=from_1, default=40, help="of an answer, of which each case has three")
    parser.add_argument("--timeout", type=over_0, default=900, help="seconds of a case")
    options = parser.parse_args()
    shapes = [(int(shape.split("x")[0]), int(shape.split("x")[1])) for shape in options.shapes]
    options.directory.mkdir(parents=True, exist_ok=True)
    store, known = options.directory / "outcomes.jsonl", {}
    if store.exists():
        known = dict(map(json.loads, store.read_text(encoding="utf-8").splitlines()))
    references: dict[tuple[str, int], list[list[int]]] = {}
    wanted = cases(shapes, options.methods)
    for case in tqdm(wanted, disable=None):
        if case.name in known:
            continue
        one = (case.method, case.total)
        if one not in references:
            work = options.directory / "one"
            references[one] = decode(case, 1, work, SCRIPT, options.new_tokens, options.timeout)
        outcome = check(case, references[one], options.directory / "several", SCRIPT, options.timeout)
        known[case.name] = dataclasses.asdict(outcome)
        with store.open("a", encoding="utf-8") as file:
            file.write(json.dumps([case.name, known[case.name]]) + "\n")
    print_table(wanted, known)
    if any(known[case.name]["differing"] for case in wanted):
        sys.exit("some tokens differ")


def print_table(wanted: list[Case], known: dict[str, dict[str, float]]) -> None:
    print("| processes x devices | method | tokens | differing | seconds, start and compiling included |")
    print("| --- | --- | --- | --- | --- |")
    for case in wanted:
        found = known[case.name]
        shape = f"{case.processes}x{case.devices}"
        print(f"| {shape} | {case.method} | {found['tokens']} | {found['differing']} | {found['seconds']:.0f} |")
    total = sum(int(known[case.name]["tokens"]) for case in wanted)
    differing = sum(int(known[case.name]["differing"]) for case in wanted)
    print(f"\n{len(wanted)} cases, {total} tokens, {differing} of them differ from one process's.")


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
