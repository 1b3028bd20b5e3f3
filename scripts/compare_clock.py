"""Wall clock of methods on two busy ranks of this machine, beside plain decoding, in one run, as ratios.

All ranks share this machine's cores. All decode the same held-out prompts in turn (A B C A B C); one-device plain
decoding has both cores for itself. Then the work of each method's ticks is measured alone, all ranks at once: each
stage with as many rows as it had (exit head, look-up and the slices of the target's head among them), without exchange
and tree. Two ratios over PP follow from it ("predicted"): were a tick its stages' work and nothing else, and with what
a tick of PP takes beyond its work added to every tick.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import pipedec_jax
from pipedec_jax.analysis.held_out import held_out_prompts
from pipedec_jax.command_line.held_out_options import add_held_out_options
from pipedec_jax.command_line.numbers import from_1
from pipedec_jax.command_line.output import Parser, check_place, run_command
from pipedec_jax.whole_files import write_whole

PLAIN, PP = "plain, one device", "pp, two ranks"


def methods(layer: int, width: int) -> dict[str, dict[str, Any]]:
    """What runs on two ranks beside PP: the target drafts for itself, or looks guesses up."""
    out: dict[str, dict[str, Any]] = {"ppsd, chain": {"method": "ppsd", "exit_layer": layer}}
    tree = {"width": width, "children": width}
    out[f"ppsd, tree of {width}"] = {"method": "ppsd", "exit_layer": layer, **tree}
    both = {"method": "best-first", "exit_layer": layer, "drafter": "both"}
    out[f"best-first, exit and look-up, {width}"] = both | tree | {"adaptive": False}
    out["best-first, exit and look-up, at most 16, adaptive"] = both | {"width": 16, "children": 8}
    for most in (width, 16):
        ngram = {"method": "best-first", "drafter": "ngram", "width": most, "children": 8, "draft_steps": 1}
        out[f"best-first, look-up alone, {most}"] = ngram | {"adaptive": False}
    out["best-first, look-up alone, at most 16, adaptive"] = ngram
    return out


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--exit-layer", type=from_1, default=8, help="of the demo target's 16 (default 8)")
    parser.add_argument("--width", type=from_1, default=2, help="of the trees (default 2)")
    add_held_out_options(parser, prompts=6)
    parser.add_argument("--out", type=Path, help="also write the rows as JSON to this file")
    return parser.parse_args()


def measure(args: argparse.Namespace, times: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of figures for every method."""
    from pipedec_jax.analysis.simulator import Simulator
    from pipedec_jax.analysis.stage_clock import StageClock, measure_work
    from pipedec_jax.clock import decode, race

    target = pipedec_jax.load_demo("target")
    make = functools.partial(pipedec_jax.Decoder, target, calibration=times)
    decoders = {PLAIN: make(method="pp", stages=1), PP: make(method="pp", stages=2)}
    decoders |= {name: make(stages=2, **settings) for name, settings in methods(args.exit_layer, args.width).items()}
    engines = {name: decoder.engine for name, decoder in decoders.items()}
    prompts = [target.tokenizer.encode(prompt.text) for prompt in held_out_prompts(args.prompts, args.seed)]
    answers = [decode(engines[PLAIN], prompt, None, args.max_new_tokens)[0].tokens for prompt in prompts]
    found = race(engines, prompts, answers, args.max_new_tokens)

    pairs = list(zip(prompts, answers, strict=True))
    runs = {name: [decode(engine, *pair, args.max_new_tokens)[0] for pair in pairs] for name, engine in engines.items()}
    clocks = {
        name: StageClock(engine, max(map(len, prompts)) + args.max_new_tokens) for name, engine in engines.items()
    }
    ticks = {}
    for name, decoder in decoders.items():
        simulator = Simulator.of(decoder)
        ticks[name] = np.concatenate([simulator.rows(*pair) for pair in pairs])
        assert sum(progress.ticks[-1] for progress in runs[name]) == len(ticks[name])
    work = measure_work(clocks, ticks)

    tokens = sum(len(answer) for answer in answers)
    per_token = {name: len(ticks[name]) / tokens for name in decoders}
    alone = {name: 1e3 * work[name] / tokens for name in decoders}
    beyond = {name: (found[name] - alone[name]) / per_token[name] for name in decoders}
    whole = {name: alone[name] + beyond[PP] * per_token[name] for name in decoders}
    return [
        {
            "method": name,
            "ticks_per_token": per_token[name],
            "ms_per_token": found[name],
            "work_ms_per_token": alone[name],
            "beyond_work_ms_per_tick": beyond[name],
            "measured_speedup_vs_pp": found[PP] / found[name],
            "predicted_speedup_vs_pp_by_work": alone[PP] / alone[name],
            "predicted_speedup_vs_pp": whole[PP] / whole[name],
            "measured_speedup_vs_plain": found[PLAIN] / found[name],
        }
        for name in decoders
    ]


def main() -> None:
    """Measure and print a Markdown table."""
    args = parse()
    if args.out:
        check_place("--out", args.out)
    pipedec_jax.use_cpu_devices(2)
    from pipedec_jax.analysis.calibration import calibrate
    from pipedec_jax.exit_store import find_exit_head

    target = pipedec_jax.load_demo("target")
    head = find_exit_head(target, args.exit_layer, None)
    times = calibrate(target.config, None, exit_head=head, rows=(1, 2, 4, 8, 16), ranks=2, exchange=0.0)
    rows = measure(args, times)
    print(f"{args.prompts} held-out prompts (seed {args.seed}), at most {args.max_new_tokens} tokens, greedy, float32")
    print(
        "| method | ticks per token | ms per token, measured | its ticks' work, measured | PP / this, measured |",
        end="",
    )
    print(" predicted, work alone | predicted | plain / this, measured | ms a tick beyond its work |")
    print("|" + " --- |" * 9)
    for row in rows:
        print(
            f"| {row['method']} | {row['ticks_per_token']:.2f} | {row['ms_per_token']:.2f} | "
            f"{row['work_ms_per_token']:.2f} | {row['measured_speedup_vs_pp']:.2f} | "
            f"{row['predicted_speedup_vs_pp_by_work']:.2f} | {row['predicted_speedup_vs_pp']:.2f} | "
            f"{row['measured_speedup_vs_plain']:.2f} | {row['beyond_work_ms_per_tick']:.2f} |",
        )
    if args.out is not None:
        write_whole(args.out, json.dumps({"argv": sys.argv[1:], "seconds": times, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
