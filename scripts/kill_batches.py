"""Kill a job over a file of prompts at random moments, a hundred times, and check that nothing is lost or doubled.

python scripts/kill_batches.py WORK_DIR --kills 100
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipedec_jax.checks import check_count
from pipedec_jax.command_line.output import Parser, fail, run_command
from pipedec_jax.loading import demo_directory

SCRIPT = Path(__file__).parent / "generate.py"
BAD = 7
"""Every so manieth prompt is bad, and must be reported once as well."""


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where to work")
    parser.add_argument("--kills", type=int, default=100, help="at least")
    parser.add_argument("--prompts", type=int, default=40, help="of a job")
    parser.add_argument("--new-tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--first", type=int, default=0, help="seed of the first job")
    options = parser.parse_args()
    try:
        for name in ("kills", "prompts", "new-tokens"):
            check_count(f"--{name}", getattr(options, name.replace("-", "_")))
    except ValueError as error:
        fail(error)

    directory: Path = options.directory / "kill_batches"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    prompts, out = directory / "prompts.jsonl", directory / "answers.jsonl"
    write_prompts(prompts, options.prompts)
    command = [sys.executable, str(SCRIPT), "--prompts", str(prompts), "--out", str(out)]
    # The smallest model of the demo family, on one device, without a draft.
    command += ["--target", str(demo_directory("draft")), "--method", "pp", "--stages", "1"]
    command += ["--max-new-tokens", str(options.new_tokens)]
    try:
        finish(command)  # fills the compilation cache
        out.unlink()
        begun = time.perf_counter()
        finish(command)
        seconds = time.perf_counter() - begun
        expected = read_answers(out, options.prompts)
        out.unlink()
        print(f"{options.prompts} prompts; a job takes {seconds:.1f} s when nobody kills it", flush=True)
        kills = jobs = torn = inside = 0
        begun = time.perf_counter()
        with tqdm(total=options.kills, disable=None) as bar:
            while kills < options.kills:
                rng = random.Random(options.first + jobs)
                for _ in range(rng.randint(1, 4)):
                    killed = kill(command, rng, seconds)
                    kills += killed
                    bar.update(killed)
                    content = out.read_bytes() if out.exists() else b""
                    torn += bool(content) and not content.endswith(b"\n")
                    inside += killed and 1 < content.count(b"\n") <= options.prompts
                finish(command)
                if read_answers(out, options.prompts) != expected:
                    raise AssertionError(f"seed {options.first + jobs}: other answers")
                out.unlink()
                jobs += 1
        print(
            f"{kills} kills in {jobs} jobs, {inside} of them between two answers of a job, {torn} in the middle of a "
            f"line; every job ended with each answer once, the tokens as if nobody had killed it; "
            f"{time.perf_counter() - begun:.0f} s"
        )
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def write_prompts(path: Path, count: int) -> None:
    """Prompts of many lengths, some of them bad."""
    rng = random.Random(0)
    words = ("def", "class", "return", "for", "value", "in", "items:\n", "self.", "print(", ") == 0", "import os\n")
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = " ".join(rng.choices(words, k=rng.randint(1, 60)))
            prompt = {"prompt": text, "id": number} if number % BAD else {"prompt": "", "id": number}
            file.write(json.dumps(prompt) + "\n")


def finish(command: list[str]) -> None:
    """Run a job to its end."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def kill(command: list[str], rng: random.Random, seconds: float) -> bool:
    """Start a job and kill it at a random moment; whether it was still at work."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(rng.uniform(0, seconds))
    except subprocess.TimeoutExpired:
        process.send_signal(rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))
        return process.wait() != 0
    return False


def read_answers(path: Path, prompts: int) -> list[tuple[Any, ...]]:
    """What must be the same in every job: one line for every prompt, in order, with its answer or error."""
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    numbers = [answer["line"] for answer in answers]
    if numbers != list(range(1, prompts + 1)):
        raise AssertionError(f"lines are lost or doubled: {numbers}")
    return [(a["line"], a["id"], a["digest"], a.get("token_ids"), a.get("text"), a.get("error")) for a in answers]


if __name__ == "__main__":
    run_command(main)
