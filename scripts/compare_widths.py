"""Adaptive width beside fixed ones, where a batch costs the more the more rows it has: ticks and modeled time.

Best-first with the draft model alone, the demo family on held-out source, times as calibrate.py measured them. Adaptive
width sends and drafts what is worth its time, at most the last of `--width`; "all" is that width without it. Ticks are
simulated, as in compare_schedules.py; the baseline of modeled time is PP on as many stages, with the same times.

python scripts/compare_widths.py                   # with the times of a CPU with 2 cores, both of them busy
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pipedec_jax
from pipedec_jax.analysis.held_out import held_out_prompts
from pipedec_jax.command_line.held_out_options import add_held_out_options
from pipedec_jax.command_line.numbers import from_1
from pipedec_jax.command_line.output import Parser, run_command

TIMES = Path(__file__).resolve().parents[1] / "configs" / "demo_times_2_core_cpu.json"


def main() -> None:
    """Parse arguments, simulate and print a table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--calibration", type=Path, default=TIMES, help="seconds of the parts (a CPU's, in configs/)")
    parser.add_argument("--stages", type=from_1, nargs="+", default=[4, 8])
    parser.add_argument("--width", type=from_1, nargs="+", default=[1, 2, 4, 8, 32])
    add_held_out_options(parser, prompts=4)
    args = parser.parse_args()

    pipedec_jax.use_cpu_devices(max(args.stages) + 1)  # the decoders that are simulated ask for them as well
    from pipedec_jax.analysis.method_table import plain_answers, simulate

    given: dict[str, Any] = {"drafter": "model", "calibration": json.loads(args.calibration.read_text())}
    prompts = [prompt.text for prompt in held_out_prompts(args.prompts, args.seed)]
    make = functools.partial(pipedec_jax.Decoder, pipedec_jax.load_demo("target"), pipedec_jax.load_demo("draft"))
    for stages in args.stages:
        make(stages=stages, width=max(args.width), **given)  # says what is wrong, before any work
    answers = plain_answers(make, prompts, max_new_tokens=args.max_new_tokens)

    print(
        f"best-first, {args.prompts} held-out prompts (seed {args.seed}), {args.max_new_tokens} tokens each, simulated;"
    )
    print(f"modeled time by {args.calibration.name}: PP / this")
    print("| stages | width | draft steps | ticks per token | hit rate | modeled time: PP / this |")
    print("|" + " --- |" * 6)
    for stages in args.stages:
        for width in args.width:
            kinds = {"all": False, "adaptive": True} if width == max(args.width) else {"all": False}
            for name, adaptive in kinds.items():
                decoder = make(stages=stages, width=width, adaptive=adaptive, **given)
                row = simulate(decoder, prompts, answers, max_new_tokens=args.max_new_tokens)
                print(
                    f"| {stages} | {name} {width} | {row.draft_steps} | {row.ticks_per_token:.2f} | "
                    f"{row.hit_rate:.3f} | {row.modeled_speedup_vs_pp:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
