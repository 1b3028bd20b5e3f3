"""The papers' comparisons with their model pairs, for who has the weights and the devices.

--demo runs the demo family on fewer devices in their place, --random narrow models of random weights on as many devices
as the papers have, both virtual where there are none.

Each table is one run of benchmark.py, which checks that all methods give the same tokens, and goes on after a kill.
--list says which table needs which models and how many devices. What the papers report is printed beside: it was
measured on other hardware and data.

python scripts/reproduce.py --demo --prompts prompts.txt --out reproduced
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from pipedec_jax.analysis.papers import TABLES
from pipedec_jax.analysis.questions import read_questions, spread_over
from pipedec_jax.command_line.output import Parser, fail, run_command

DIRECTORIES = ("draft", "middle", "target", "exit-target")
SIGNALLED = 128
"""Added to a signal's number in the status of a command that it has ended, as shells do."""


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    names = [table.name for table in TABLES]
    parser.add_argument("--tables", nargs="+", choices=names, default=names, help="which (default: all)")
    parser.add_argument("--list", action="store_true", help="say what each table needs, and end")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--demo", action="store_true", help="the demo family on fewer virtual devices")
    instead.add_argument("--random", action="store_true", help="narrow random models, written into --out")
    for name in DIRECTORIES:
        parser.add_argument(f"--{name}", metavar="DIR", help="converted or Hugging Face directory")
    parser.add_argument(
        "--exit-layer", metavar="E", type=int, help="of ppsd (of its heads' the nearest to a quarter of all)"
    )
    parser.add_argument("--prompts", metavar="FILE", type=Path, help="as for benchmark.py")
    parser.add_argument("--limit", metavar="Q", type=int, default=4, help="questions (default 4)")
    parser.add_argument("--max-new-tokens", metavar="M", type=int, default=128, help="of an answer (default 128)")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("reproduced"), help="default: reproduced")
    options = parser.parse_args()
    if not options.list and options.prompts is None:
        parser.error("give --prompts FILE (questions, problems, or a prompt on each line), or --list")
    given = [f"--{name}" for name in (*DIRECTORIES, "exit-layer") if getattr(options, name.replace("-", "_"))]
    if given and (options.demo or options.random):
        parser.error(f"leave out {', '.join(given)}, or --demo and --random, which bring their own models")
    return options


def main() -> None:
    """Run the tables one after the other; ends with the status of the first that fails."""
    options = parse()
    chosen = [table for table in TABLES if table.name in options.tables]
    if options.list:
        for table in chosen:
            need = ", ".join(f"--{flag} {model}" for flag, model in zip(table.flags, table.models, strict=True))
            print(f"{table.name} ({table.source}): {table.devices} devices; {need}\n  reported: {table.reported}")
        return
    given = {name: value for name in DIRECTORIES if (value := getattr(options, name.replace("-", "_")))}
    size = ["--limit", str(options.limit), "--max-new-tokens", str(options.max_new_tokens)]
    try:
        spread_over(read_questions(options.prompts), options.limit)  # before models are written
        if options.random:
            from pipedec_jax.analysis.random_family import write_random_family

            given = write_random_family(options.out / "random")
        if options.exit_layer is not None:
            given["exit-layer"] = str(options.exit_layer)
        commands = [table.command(options.prompts, options.out, given, options.demo) + size for table in chosen]
    except (ValueError, OSError) as error:
        fail(error)
    benchmark = Path(__file__).with_name("benchmark.py")
    for table, command in zip(chosen, commands, strict=True):
        print(f"## {table.name}: {table.source}\n\npython scripts/benchmark.py {shlex.join(command)}\n", flush=True)
        status = subprocess.run([sys.executable, str(benchmark), *command]).returncode
        if status < 0:
            print(f"error: {table.name} was ended by signal {-status}", file=sys.stderr)
            sys.exit(SIGNALLED - status)
        if status:
            sys.exit(status)  # it has said why
        print(f"\nreported by the paper, not measured here: {table.reported}\n", flush=True)


if __name__ == "__main__":
    run_command(main)
