"""A hundred thousand ticks of the demo family in one process: memory over time, and every answer beside plain decoding.

python scripts/run_long.py --ticks 100000
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipedec_jax.command_line.output import Parser, check_place, fail, run_command
from pipedec_jax.whole_files import write_whole

if TYPE_CHECKING:
    from pipedec_jax.analysis.long_run import Answer
    from pipedec_jax.model.parameters import ParameterSource
    from pipedec_jax.pipeline.engine import Engine

MIB = 2**20


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--ticks", type=int, default=100_000, help="in all, at least (100000)")
    parser.add_argument("--target", default="middle", help="model of the demo family that is decoded (middle)")
    parser.add_argument("--draft", default="draft", help="that guesses (draft)")
    parser.add_argument("--method", default="best-first", help="with look-up beside the draft (best-first)")
    parser.add_argument("--stages", type=int, default=2, metavar="N")
    parser.add_argument("--width", type=int, default=2, metavar="W")
    parser.add_argument("--capacity", type=int, default=2048, help="slots of the cache; answers fill it (2048)")
    parser.add_argument("--temperature", type=float, default=0.8, help="of every second answer (0.8)")
    dtypes = ("float64", "float32")
    parser.add_argument("--dtype", default="float64", choices=dtypes, help="float64: no difference is excused")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write every answer's figures as JSON lines")
    return parser.parse_args(arguments)


def open_engines(options: argparse.Namespace) -> tuple[Engine, Engine]:
    """What is tested, and plain decoding.

    Raises:
        ValueError: for settings that cannot be.
    """
    import jax

    import pipedec_jax
    from pipedec_jax.decoding.devices import pick_devices
    from pipedec_jax.pipeline.engine import Engine
    from pipedec_jax.pipeline.settings import EngineSettings

    if options.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    target, draft = pipedec_jax.load_demo(options.target), pipedec_jax.load_demo(options.draft)
    both = {"dtype": jax.numpy.dtype(options.dtype), "capacity": options.capacity}
    own = {"stages": options.stages, "width": options.width, "children": options.width}
    devices = pick_devices(options.stages + 1)

    def engine(settings: EngineSettings, source: ParameterSource | None) -> Engine:
        return Engine(
            target.source, source, settings, vocab_size=target.vocab_size, devices=devices, drafter="both"
        )  # of plain decoding nobody guesses, whatever it says

    tested = EngineSettings(method=options.method, **own, **both)
    return engine(tested, draft.source), engine(EngineSettings(method="pp", stages=1, **both), None)


def row(answers: Sequence[Answer], seconds: float) -> str:
    """A line of the table after these answers."""
    sums = [sum(getattr(one, name) for one in answers) for name in ("tokens", "hits", "differing")]
    sizes = [f"{size / MIB:.1f}" for size in (answers[-1].resident_bytes, answers[-1].array_bytes)]
    cells = [sum(one.ticks for one in answers), len(answers), *sums, *sizes, f"{seconds / 60:.1f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def main(arguments: list[str] | None = None) -> None:
    """Run, print a line for every tenth of it, and end with status 1 where a token differs."""
    options = parse(arguments)
    from pipedec_jax.analysis.long_run import long_run
    from pipedec_jax.checks import check_count

    answers: list[Answer] = []

    def keep() -> None:
        if options.out:
            write_whole(options.out, "".join(json.dumps(asdict(one)) + "\n" for one in answers))

    try:
        check_count("--ticks", options.ticks)
        if options.out:
            check_place("--out", options.out)
        engine, plain = open_engines(options)
        print(
            f"{options.method}, target {options.target}, draft {options.draft} and look-up, {options.stages} stages, "
            f"width {options.width}, {options.dtype}, {options.capacity} slots; beside plain decoding"
        )
        print("| ticks | answers | tokens | hits | tokens that differ | resident, MiB | arrays, MiB | minutes |")
        print("|" + " --- |" * 8, flush=True)
        begun, step, before = time.perf_counter(), max(1, options.ticks // 10), 0
        for answer in long_run(engine, plain, ticks=options.ticks, temperature=options.temperature, seed=options.seed):
            answers.append(answer)
            after = before + answer.ticks
            if len(answers) == 2 or after // step > before // step:
                print(row(answers, time.perf_counter() - begun), flush=True)
                keep()
            before = after
        keep()
    except (ValueError, OSError) as error:
        fail(error)
    if any(one.differing for one in answers):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
