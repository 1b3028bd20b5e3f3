"""PipeDec with the demo family on held-out source: ticks, hit rate and modeled time by stages and width.

Ticks are simulated, as in compare_schedules.py; `--engine` runs the engine instead and checks every token.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from pathlib import Path

import pipedec_jax
from pipedec_jax.analysis.held_out import held_out_prompts


def main() -> None:
    """Parse arguments, run the sweep and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[8, 16], help="target stages (default 8 16)")
    parser.add_argument("--width", type=int, nargs="+", default=[1, 4, 8, 16, 32], help="widths (default 1 4 8 16 32)")
    parser.add_argument("--children", type=int, default=8, help="most children per node (default 8)")
    parser.add_argument("--prompts", type=int, default=8, help="held-out prompts (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="seed that draws them (default 0)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens per prompt (default 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--engine", action="store_true", help="run the engine; checks every token")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON to this file")
    args = parser.parse_args()

    pipedec_jax.use_cpu_devices(max(args.stages) + 1)
    from pipedec_jax.analysis.method_table import MethodRow, run, simulate, sweep

    prompts = [prompt.text for prompt in held_out_prompts(args.prompts, args.seed)]
    make = functools.partial(pipedec_jax.Decoder, pipedec_jax.load_demo("target"), pipedec_jax.load_demo("draft"))

    def report(row: MethodRow) -> None:
        print(
            f"| {row.stages} | {row.width} | {row.ticks_per_token:.2f} | {row.hit_rate:.3f} | "
            f"{row.ticks_speedup_vs_pp:.2f} | {row.modeled_speedup_vs_pp:.2f} |",
            flush=True,
        )

    print(f"{args.prompts} held-out prompts (seed {args.seed}), {args.max_new_tokens} tokens each, ", end="")
    print(f"children {args.children}, temperature {args.temperature}; {'run' if args.engine else 'simulated'}")
    print("| stages | width | ticks per token | hit rate | ticks: PP / PipeDec | modeled: PP / PipeDec |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = sweep(
        make,
        prompts,
        [
            {"method": "pipedec", "drafter": "model", "stages": stages, "width": width, "children": children}
            for stages, width in itertools.product(args.stages, args.width)
            for children in [min(args.children, width)]
        ],
        report,
        run if args.engine else simulate,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
    )
    if args.out is not None:
        args.out.write_text(json.dumps({"argv": sys.argv[1:], "rows": [row.to_dict() for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
