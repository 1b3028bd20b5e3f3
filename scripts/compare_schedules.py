"""All schedules with the demo family on held-out source: ticks, hits, late hits and modeled time, as a Markdown table.

The static tree is tried in several depths with `width` nodes a level, and its best (by modeled time) is shown, with its
drafting charged and for nothing: the baseline must be a strong one (find_static_tree.py shows all that were tried).
Below the table: the ticks an oracle schedule with the same drafter would need.

Ticks are simulated: everything but the target runs, and its tokens are known from plain decoding. They equal the
engine's (tests/analysis/test_simulator.py); `--engine` runs that instead, the target spread over virtual devices.

python scripts/compare_schedules.py                # 4, 8 and 16 stages, widths 8 to 64
python scripts/compare_schedules.py --stages 8 16 --width 1 4 8 16 32 --only pipedec    # PipeDec by width
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipedec_jax
from pipedec_jax.analysis.held_out import held_out_prompts
from pipedec_jax.command_line.held_out_options import add_held_out_options, check_stages
from pipedec_jax.command_line.numbers import amount, from_1
from pipedec_jax.command_line.output import Parser, check_place, run_command
from pipedec_jax.whole_files import write_whole

if TYPE_CHECKING:
    from pipedec_jax.analysis.method_table import MethodRow

DRAFTERS = ("model", "both")
"""The draft model alone, and with look-up beside it."""


def others(width: int) -> Iterator[dict[str, Any]]:
    """PipeDec as published, and with look-up beside its draft; best-first with 1, 2 and 4 draft steps a tick."""
    yield {"method": "pipedec", "drafter": "model", "width": width, "children": 8}
    for drafter in DRAFTERS:
        yield {"method": "pipedec", "drafter": drafter, "width": width, "children": 16}
    for drafter in DRAFTERS:
        for steps in (1, 2, 4):
            setting = {"method": "best-first", "drafter": drafter, "width": width, "children": 16}
            yield setting | {"draft_steps": steps}


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--target", help="model directory or hub id (default: the demo target)")
    parser.add_argument("--draft", help="the same for the draft (default: the demo draft)")
    parser.add_argument("--stages", type=from_1, nargs="+", default=[4, 8, 16])
    parser.add_argument("--width", type=from_1, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--static-depths", type=from_1, nargs="+", help="levels of the static trees (2 to 24)")
    parser.add_argument("--trees", type=Path, help="file in which find_static_tree.py kept its trees; others are added")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="settings whose description has all words"
    )
    add_held_out_options(parser, prompts=4)
    parser.add_argument("--temperature", type=amount, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--engine", action="store_true", help="run the engine; checks every token")
    parser.add_argument("--out", type=Path, help="also write all rows as JSON to this file")
    return parser.parse_args()


def show(row: MethodRow, width: int, note: str = "") -> None:
    """Print a line of the table; `width` is the grid's, of which a static tree has its own."""
    print(
        f"| {row.stages} | {width} | {row.method}{note} | {row.drafter} | {row.children} | {row.draft_steps} | "
        f"{row.ticks_per_token:.2f} | {row.hit_rate:.3f} | {row.late_hits / row.tokens:.3f} | "
        f"{row.ticks_late / row.tokens:.2f} | {row.ticks_speedup_vs_pp:.2f} | {row.modeled_speedup_vs_pp:.2f} |",
        flush=True,
    )


def show_oracle(
    make: Callable[..., pipedec_jax.Decoder],
    prompts: Sequence[str],
    answers: Sequence[list[int]],
    stages: Sequence[int],
    **options: Any,
) -> None:
    """Print the ticks that an oracle schedule would need; arguments as for `method_table.guesses`."""
    from pipedec_jax.analysis.bound import oracle_ticks
    from pipedec_jax.analysis.method_table import guesses

    print("\nTicks per token that an oracle schedule would need with the same drafter's 16 guesses after each token")
    print("| stages | drafter | tokens guessed | 1 draft step | 2 draft steps | 4 draft steps |")
    print("|" + " --- |" * 6)
    for drafter in DRAFTERS:
        decoder = make(method="pipedec", stages=2, drafter=drafter, children=16)
        right = guesses(decoder, prompts, answers, **options)
        share = sum(map(sum, right)) / sum(map(len, right))
        tokens = sum(len(answer) + 1 for answer in right)
        for count in stages:
            ticks = [sum(oracle_ticks(count, answer, steps) for answer in right) / tokens for steps in (1, 2, 4)]
            print(f"| {count} | {drafter} | {share:.3f} | " + " | ".join(f"{one:.2f}" for one in ticks) + " |")


def main() -> None:
    """Run the grid and print the tables."""
    args = parse()
    if args.out:
        check_place("--out", args.out)
    if args.trees and not args.trees.is_file():
        raise ValueError(f"--trees {args.trees}: there is no such file; find_static_tree.py --out FILE makes one")

    pipedec_jax.use_cpu_devices(max(args.stages) + 1)  # the decoders that are simulated ask for them as well
    from pipedec_jax.analysis import static_trees
    from pipedec_jax.analysis.method_table import plain_answers, run, simulate, sweep

    prompts = [prompt.text for prompt in held_out_prompts(args.prompts, args.seed)]
    target = pipedec_jax.load(args.target) if args.target else pipedec_jax.load_demo("target")
    draft = pipedec_jax.load(args.draft) if args.draft else pipedec_jax.load_demo("draft")
    check_stages(args.stages, target.config)
    make = functools.partial(pipedec_jax.Decoder, target, draft)

    def chosen(settings: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        return [setting for setting in settings if all(word in str(list(setting.values())) for word in args.only)]

    trees_of_drafters = [{"method": "stpp", "drafter": drafter} for drafter in DRAFTERS]
    if not any(chosen([*trees_of_drafters, *others(width)]) for width in args.width):
        raise ValueError(f"--only {' '.join(args.only)}: no setting's description has all of that")
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    about = static_trees.about(args.target, args.draft, args.prompts, args.seed, **options)
    kept = static_trees.TreeFile(args.trees, about)

    print(f"{args.prompts} held-out prompts (seed {args.seed}), {args.max_new_tokens} tokens each, ", end="")
    print(f"temperature {args.temperature}; {'run' if args.engine else 'simulated'}. Draft steps of stpp: its depth;")
    print("free: its drafting is not charged")
    print("| stages | width | method | drafter | children | draft steps | ticks per token | hit rate |", end="")
    print(" late hits per token | ticks lost to them | ticks: PP / this | modeled time: PP / this |")
    print("|" + " --- |" * 12)
    rows = []
    answers = plain_answers(make, prompts, **options)
    how = run if args.engine else simulate
    free = static_trees.with_free_drafting(make)

    def tree(drafter: str, width: int, depth: int) -> MethodRow:
        (shape,) = static_trees.shapes([width], [depth], [drafter])
        return kept.find(shape) or kept.add(static_trees.with_one_stage(make, prompts, answers, shape, **options))

    def best_tree(trees: list[MethodRow], stages: int, make: Callable[..., pipedec_jax.Decoder]) -> MethodRow:
        row = static_trees.strongest(trees, make, stages)
        if not args.engine:
            return row
        return run(make(method="stpp", stages=stages, **static_trees.shape_of(row)), prompts, answers, **options)

    for stages in args.stages:
        for width in args.width:
            for static in chosen(trees_of_drafters):
                depths = args.static_depths or static_trees.DEPTHS
                trees = [tree(static["drafter"], width, depth) for depth in depths]
                for note, maker in (("", make), (", free", free)):
                    rows.append(best_tree(trees, stages, maker))
                    show(rows[-1], width, note)
            settings = [setting | {"stages": stages} for setting in chosen(others(width))]
            rows += sweep(make, prompts, answers, settings, functools.partial(show, width=width), how, **options)
    show_oracle(make, prompts, answers, args.stages, **options)
    if args.out is not None:
        values = {"argv": sys.argv[1:], "rows": [row.to_dict() for row in rows]}
        write_whole(args.out, json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
