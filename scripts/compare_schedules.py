"""All schedules with the demo family on held-out source: ticks, hits, late hits and modeled time, as a Markdown table.

The static tree is tried in several shapes of at most `width` nodes a level, and its best (by modeled time) is shown,
with its drafting charged and for nothing: the baseline must be a strong one. Below the table: the ticks an oracle
schedule with the same drafter would need.

Ticks are simulated: everything but the target runs, and its tokens are known from plain decoding. They equal the
engine's (tests/analysis/test_simulator.py); `--engine` runs that instead, the target spread over virtual devices.

python scripts/compare_schedules.py                # 4, 8 and 16 stages, widths 8 to 64
python scripts/compare_schedules.py --stages 8 16 --width 1 4 8 16 32 --only pipedec    # PipeDec by width
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pipedec_jax
from pipedec_jax.analysis.held_out import held_out_prompts

STATIC_DEPTHS = (2, 4, 6, 8)
"""Levels of the static trees that are tried."""


def static_shapes(width: int, depths: list[int]) -> Iterator[dict[str, Any]]:
    """Trees of `width` nodes a level, and narrower ones."""
    for depth in depths:
        for level in sorted({max(1, width // 4), width}):
            yield {"method": "stpp", "drafter": "model", "width": level, "children": min(8, level), "depth": depth}


def others(width: int) -> Iterator[dict[str, Any]]:
    """PipeDec as published, and best-first with 1, 2 and 4 draft steps a tick."""
    yield {"method": "pipedec", "drafter": "model", "width": width, "children": 8}
    yield {"method": "pipedec", "drafter": "model", "width": width, "children": 16}
    for drafter in ("model", "both"):
        for steps in (1, 2, 4):
            setting = {"method": "best-first", "drafter": drafter, "width": width, "children": 16}
            yield setting | {"draft_steps": steps}


def byte_costs_with_free_drafting(make: Callable[..., pipedec_jax.Decoder]) -> dict[str, float]:
    """What the default charges, but for the draft, as a calibration."""
    from pipedec_jax.analysis.cost import byte_costs

    decoder = make(method="pp", stages=1)
    return dataclasses.asdict(byte_costs(decoder.target.config, None, decoder.dtype.itemsize))


def main() -> None:
    """Parse arguments, run the grid and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--width", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--static-depths", type=int, nargs="*", default=STATIC_DEPTHS)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="settings whose description has all words"
    )
    parser.add_argument("--prompts", type=int, default=4, help="held-out prompts (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed that draws them (default 0)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens per prompt (default 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--engine", action="store_true", help="run the engine; checks every token")
    parser.add_argument("--out", type=Path, help="also write all rows as JSON to this file")
    args = parser.parse_args()

    pipedec_jax.use_cpu_devices(max(args.stages) + 1)  # the decoders that are simulated ask for them as well
    from pipedec_jax.analysis.bound import oracle_ticks
    from pipedec_jax.analysis.method_table import MethodRow, guesses, plain_answers, run, simulate, sweep

    prompts = [prompt.text for prompt in held_out_prompts(args.prompts, args.seed)]
    make = functools.partial(pipedec_jax.Decoder, pipedec_jax.load_demo("target"), pipedec_jax.load_demo("draft"))

    def chosen(settings: Iterator[dict[str, Any]], stages: int) -> list[dict[str, Any]]:
        kept = [setting for setting in settings if all(word in str(list(setting.values())) for word in args.only)]
        return [setting | {"stages": stages} for setting in kept]

    def report(row: MethodRow, note: str = "") -> None:
        print(
            f"| {row.stages} | {width} | {row.method}{note} | {row.drafter} | {row.children} | {row.draft_steps} | "
            f"{row.ticks_per_token:.2f} | {row.hit_rate:.3f} | {row.late_hits / row.tokens:.3f} | "
            f"{row.ticks_late / row.tokens:.2f} | {row.ticks_speedup_vs_pp:.2f} | {row.modeled_speedup_vs_pp:.2f} |",
            flush=True,
        )

    print(f"{args.prompts} held-out prompts (seed {args.seed}), {args.max_new_tokens} tokens each, ", end="")
    print(f"temperature {args.temperature}; {'run' if args.engine else 'simulated'}. Draft steps of stpp: its depth;")
    print("free: its drafting is not charged")
    print("| stages | width | method | drafter | children | draft steps | ticks per token | hit rate |", end="")
    print(" late hits per token | ticks lost to them | ticks: PP / this | modeled time: PP / this |")
    print("|" + " --- |" * 12)
    rows = []
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    answers = plain_answers(make, prompts, **options)
    how = run if args.engine else simulate
    for stages in args.stages:
        for width in args.width:
            static = chosen(static_shapes(width, args.static_depths), stages)
            if static:
                tried: list[MethodRow] = []
                rows += sweep(make, prompts, answers, static, tried.append, how, **options)
                report(max(tried, key=lambda row: row.modeled_speedup_vs_pp))
                # Free, all shapes have ticks that cost the same: the fewest win.
                fewest = min(range(len(tried)), key=lambda index: tried[index].ticks)
                free = static[fewest] | {"calibration": byte_costs_with_free_drafting(make)}
                rows += sweep(make, prompts, answers, [free], functools.partial(report, note=", free"), how, **options)
            rows += sweep(make, prompts, answers, chosen(others(width), stages), report, how, **options)
    print("\nTicks per token that an oracle schedule would need with the same drafter's 16 guesses after each token")
    print("| stages | drafter | tokens guessed | 1 draft step | 2 draft steps | 4 draft steps |")
    print("|" + " --- |" * 6)
    for drafter in ("model", "both"):
        decoder = make(method="pipedec", stages=2, drafter=drafter, children=16)
        right = guesses(decoder, prompts, answers, **options)
        share = sum(map(sum, right)) / sum(map(len, right))
        tokens = sum(len(answer) + 1 for answer in right)
        for stages in args.stages:
            ticks = [sum(oracle_ticks(stages, answer, steps) for answer in right) / tokens for steps in (1, 2, 4)]
            print(f"| {stages} | {drafter} | {share:.3f} | " + " | ".join(f"{count:.2f}" for count in ticks) + " |")
    if args.out is not None:
        args.out.write_text(json.dumps({"argv": sys.argv[1:], "rows": [row.to_dict() for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
