"""Wall clock of methods on two busy ranks of this machine, beside plain decoding, in one run, as ratios.

All ranks share this machine's cores. All decode the same held-out prompts in turn (A B C A B C); one-device plain
decoding has both cores for itself. Then the stages alone are measured, both ranks at once, with as many rows at each as
the method's ticks have (its exit head, or look-up, and the slices of the target's head among them): from these times
and how often a tick has which rows follows the ratio that a method should have over PP ("predicted"), were a tick its
stages' work alone. What a tick takes beyond that is shown too.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import pipedec_jax
from pipedec_jax.analysis.held_out import held_out_prompts

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


def main() -> None:
    """Parse arguments, measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exit-layer", type=int, default=8, help="of the demo target's 16 (default 8)")
    parser.add_argument("--width", type=int, default=2, help="of the trees (default 2)")
    parser.add_argument("--prompts", type=int, default=6, help="held-out prompts (default 6)")
    parser.add_argument("--seed", type=int, default=0, help="seed that draws them (default 0)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens per prompt (default 128)")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON to this file")
    args = parser.parse_args()

    pipedec_jax.use_cpu_devices(2)
    from pipedec_jax.analysis.calibration import calibrate
    from pipedec_jax.analysis.clock import decode, race
    from pipedec_jax.analysis.simulator import Simulator
    from pipedec_jax.analysis.stage_clock import StageClock, measure_work, predicted_seconds, rows_by_ticks
    from pipedec_jax.exit_store import find_exit_head

    target = pipedec_jax.load_demo("target")
    head = find_exit_head(target, args.exit_layer, None)
    times = calibrate(target.config, None, exit_head=head, rows=(1, 2, 4, 8, 16), ranks=2, exchange=0.0)
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
    counts = {}
    for name, decoder in decoders.items():
        simulator = Simulator.of(decoder)
        counts[name] = rows_by_ticks(clocks[name], [simulator.rows(*pair) for pair in pairs])
    work = measure_work(clocks, {name: sorted(count) for name, count in counts.items()})

    print("milliseconds of a tick's own work by rows at the stages, measured, both ranks at once; in brackets ticks")
    for name, count in counts.items():
        cells = [f"{'+'.join(map(str, rows))}: {1e3 * work[name][rows]:.2f} ({count[rows]})" for rows in sorted(count)]
        print(f"  {name}: " + ", ".join(cells))
    print(f"{args.prompts} held-out prompts (seed {args.seed}), at most {args.max_new_tokens} tokens, greedy, float32")
    print("| method | ticks per token | ms per token, measured | PP / this, measured | PP / this, predicted |", end="")
    print(" plain / this, measured | ms a tick beyond its work |")
    print("|" + " --- |" * 7)
    rows = []
    tokens = sum(len(answer) for answer in answers)
    seconds = {name: predicted_seconds(counts[name], work[name]) / tokens for name in decoders}
    for name in decoders:
        ticks = sum(progress.ticks[-1] for progress in runs[name]) / tokens
        row = {
            "method": name,
            "ticks_per_token": ticks,
            "ms_per_token": found[name],
            "predicted_ms_per_token": 1e3 * seconds[name],
            "measured_speedup_vs_pp": found[PP] / found[name],
            "predicted_speedup_vs_pp": seconds[PP] / seconds[name],
            "measured_speedup_vs_plain": found[PLAIN] / found[name],
            "work": {"+".join(map(str, key)): value for key, value in work[name].items()},
        }
        rows.append(row)
        print(
            f"| {name} | {ticks:.2f} | {found[name]:.2f} | {row['measured_speedup_vs_pp']:.2f} | "
            f"{row['predicted_speedup_vs_pp']:.2f} | {row['measured_speedup_vs_plain']:.2f} | "
            f"{(found[name] - 1e3 * seconds[name]) / ticks:.2f} |",
            flush=True,
        )
    if args.out is not None:
        args.out.write_text(json.dumps({"argv": sys.argv[1:], "seconds": times, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
