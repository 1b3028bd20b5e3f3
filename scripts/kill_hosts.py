"""Kill, stop or otherwise spoil one of two processes that decode together; the other one must end, and say why.

After each fault the same job is started again and goes on: at the end every answer is there once, with the tokens of
one process.

python scripts/kill_hosts.py WORK_DIR
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from pipedec_jax.command_line.numbers import from_1, over_0
from pipedec_jax.command_line.output import Parser, run_command
from pipedec_jax.hosts.faults import FAULTS, Seen, answers, job, read_answers, strike, write_prompts
from pipedec_jax.hosts.group import PATIENCE
from pipedec_jax.hosts.launch import finish, launch

SCRIPT = Path(__file__).parent / "generate.py"


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where to work")
    parser.add_argument("--faults", nargs="+", metavar="NAME", help="those whose name holds one of these (all)")
    parser.add_argument("--patience", type=over_0, default=PATIENCE, help="of the processes, in seconds")
    parser.add_argument("--limit", type=over_0, default=60, help="seconds within which the other process must end")
    parser.add_argument("--prompts", type=from_1, default=40, help="of the job")
    parser.add_argument("--new-tokens", type=from_1, default=48, help="of an answer")
    options = parser.parse_args()
    # What a shell starts in the background ignores SIGINT, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    chosen = [f for f in FAULTS if not options.faults or any(part in f.name for part in options.faults)]
    if not chosen:
        raise ValueError(f"--faults {' '.join(options.faults)}: no fault's name holds any of that")
    directory: Path = options.directory
    directory.mkdir(parents=True, exist_ok=True)
    prompts, out, one = (directory / name for name in ("prompts.jsonl", "answers.jsonl", "one.jsonl"))
    for path in (out, one):
        path.unlink(missing_ok=True)
    write_prompts(prompts, options.prompts)
    run(1, 2, job(prompts, one, options.new_tokens))
    expected, found = read_answers(one), {}
    arguments = job(prompts, out, options.new_tokens)
    for fault in tqdm(chosen, disable=None):
        if answers(out) > options.prompts // 2:  # faults have to come before the job's end
            finish_job(arguments, expected, out)
            out.unlink()
        limit = options.limit + 120  # a machine that has other work takes long to start
        found[fault.name] = strike(fault, arguments, out, directory, SCRIPT, options.patience, limit)
    finish_job(arguments, expected, out)
    print_table(found, options.patience)
    print(f"\nThe restarted jobs: each of {len(expected)} answers once, with the tokens of one process.")
    if any(seen.seconds > options.limit or seen.status == 0 for seen in found.values()):
        sys.exit(f"a process took more than {options.limit:g} s, or ended well")


def finish_job(arguments: list[str], expected: list[tuple[int, list[int]]], out: Path) -> None:
    """Start the job again, and compare."""
    run(2, 1, arguments)
    if read_answers(out) != expected:
        raise AssertionError("answers are lost, doubled or other than one process's")


def run(processes: int, devices: int, arguments: list[str]) -> None:
    for status, _, errors in finish(launch(processes, devices, arguments, script=SCRIPT), 900):
        if status:
            raise subprocess.SubprocessError(errors[-2000:])


def print_table(found: dict[str, Seen], patience: float) -> None:
    print(f"Two processes, --patience {patience:g}.\n")
    print("| fault of one | the other ended after (s) | status | it said |")
    print("| --- | --- | --- | --- |")
    for name, seen in found.items():
        print(f"| {name} | {seen.seconds:.1f} | {seen.status} | {seen.message.removeprefix('error: ')} |")


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
