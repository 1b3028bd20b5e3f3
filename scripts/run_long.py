"""A hundred thousand ticks of the demo family in one process: memory over time, and every answer beside plain decoding.

python scripts/run_long.py --ticks 100000
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from pipedec_jax.command_line.options import Parser, fail
from pipedec_jax.command_line.output import run_command

MIB = 2**20


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--ticks", type=int, default=100_000, help="in all, at least (100000)")
    parser.add_argument("--target", default="middle", help="model of the demo family that is decoded (middle)")
    parser.add_argument("--draft", default="draft", help="that guesses (draft)")
    parser.add_argument("--method", default="best-first", help="with look-up beside the draft (best-first)")
    parser.add_argument("--stages", type=int, default=2, metavar="N")
    parser.add_argument("--width", type=int, default=2, metavar="W")
    parser.add_argument("--capacity", type=int, default=2048, help="slots of the cache; answers fill it (2048)")
    parser.add_argument("--temperature", type=float, default=0.8, help="of every second answer (0.8)")
    parser.add_argument("--dtype", default="float64", help="float64 (no difference is excused) or float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write every answer's figures as JSON lines")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run, print a line for every tenth of it, and end with status 1 where a token differs."""
    options = parse(arguments)
    import jax

    import pipedec_jax
    from pipedec_jax.analysis.long_run import long_run
    from pipedec_jax.decoding.devices import pick_devices
    from pipedec_jax.pipeline.engine import Engine
    from pipedec_jax.pipeline.settings import EngineSettings, check_count

    try:
        check_count("--ticks", options.ticks)
        if options.dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        target, draft = pipedec_jax.load_demo(options.target), pipedec_jax.load_demo(options.draft)
        both = {"dtype": jax.numpy.dtype(options.dtype), "capacity": options.capacity}
        devices = pick_devices(options.stages + 1)
        settings = EngineSettings(
            method=options.method, stages=options.stages, width=options.width, children=options.width, **both
        )
        engine = Engine(
            target.source, draft.source, settings, vocab_size=target.vocab_size, devices=devices, drafter="both"
        )
        plain = Engine(
            target.source,
            None,
            EngineSettings(method="pp", stages=1, **both),
            vocab_size=target.vocab_size,
            devices=devices,
        )
        print(
            f"{options.method}, target {options.target}, draft {options.draft} and look-up, {options.stages} stages, "
            f"width {options.width}, {options.dtype}, {options.capacity} slots; beside plain decoding"
        )
        print("| ticks | answers | tokens | hits | tokens that differ | resident, MiB | arrays, MiB | minutes |")
        print("|" + " --- |" * 8, flush=True)
        begun, answers, step = time.perf_counter(), [], max(1, options.ticks // 10)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(options.out.open("w")) if options.out else None
            for answer in long_run(
                engine, plain, ticks=options.ticks, temperature=options.temperature, seed=options.seed
            ):
                before = sum(one.ticks for one in answers)
                answers.append(answer)
                if file:
                    file.write(json.dumps(asdict(answer)) + "\n")
                if len(answers) == 2 or (before + answer.ticks) // step > before // step:
                    row = [before + answer.ticks, len(answers), sum(one.tokens for one in answers)]
                    row += [sum(one.hits for one in answers), sum(one.differing for one in answers)]
                    row += [f"{answer.resident_bytes / MIB:.1f}", f"{answer.array_bytes / MIB:.1f}"]
                    row.append(f"{(time.perf_counter() - begun) / 60:.1f}")
                    print("| " + " | ".join(map(str, row)) + " |", flush=True)
    except (ValueError, OSError) as error:
        fail(error)
    if any(one.differing for one in answers):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
