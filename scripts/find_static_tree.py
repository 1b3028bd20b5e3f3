"""The best settings of the static tree (`--method stpp`), so that what it is compared with beats a strong one.

Trees of every width, depth and drafter are simulated once over held-out prompts; which tokens a tree accepts does not
depend on the stages, so that one run is priced for any number of them. The first table shows all trees, the second the
best of each width by modeled time: with the draft's steps charged, and for nothing. Killed, the same command goes on.

python scripts/find_static_tree.py --out trees.json
python scripts/find_static_tree.py --target DIR --draft DIR --prompts FILE --stages 4 --width 16 --drafter both
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipedec_jax
from pipedec_jax.analysis.held_out import prompts_given
from pipedec_jax.command_line.opening import target_and_draft
from pipedec_jax.command_line.output import Parser, check_place, fail, run_command

if TYPE_CHECKING:
    from pipedec_jax.pipeline.settings import Method


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--target", help="model directory or hub id (default: the demo target)")
    parser.add_argument("--draft", help="the same for the draft (the demo draft, for the demo target)")
    parser.add_argument("--stages", type=int, nargs="+", default=[4, 8, 16], help="of the target (4 8 16)")
    parser.add_argument("--width", type=int, nargs="+", default=[8, 16, 32, 64], help="most nodes of a level")
    parser.add_argument("--depths", type=int, nargs="+", help="levels of the trees (2 to 24)")
    parser.add_argument("--drafter", nargs="+", default=["model", "both"], choices=("model", "both"))
    parser.add_argument("--prompts", default="4", help="number of held-out prompts, or a file as of benchmark.py (4)")
    parser.add_argument("--seed", type=int, default=0, help="seed that draws held-out prompts (default 0)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens per prompt (default 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--sharpness", type=float, default=1.0, help="factor on the draft's logits (default 1)")
    parser.add_argument("--out", type=Path, help="keep every tree's row in this file (JSON) and go on from there")
    return parser.parse_args()


def main() -> None:
    """Parse and check arguments; a bad one ends with status 2."""
    args = parse()
    pipedec_jax.use_cpu_devices(max(1, *args.stages) + 1)
    try:
        if args.out is not None:
            check_place("--out", args.out)
        run(args)
    except (ValueError, OSError, ImportError) as error:  # the last where pickled files need torch
        fail(error)


def run(args: argparse.Namespace) -> None:
    """Simulate every tree and print both tables."""
    from pipedec_jax.analysis import static_trees
    from pipedec_jax.analysis.method_table import plain_answers

    models = target_and_draft(args.target, args.draft)

    def make(method: Method, **given: Any) -> pipedec_jax.Decoder:
        guessing = {"sharpness": args.sharpness} if method == "stpp" else {}  # not of plain decoding
        return pipedec_jax.Decoder(*models, method=method, **given, **guessing)

    prompts, words = prompts_given(args.prompts, args.seed)
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    number = len(prompts) if args.prompts.isdigit() else words
    about = static_trees.about(args.target, args.draft, number, args.seed, args.sharpness, **options)
    kept = static_trees.TreeFile(args.out, about)
    answers = functools.cache(functools.partial(plain_answers, make, prompts, **options))
    trees = list(static_trees.shapes(args.width, args.depths or static_trees.DEPTHS, args.drafter))
    # What is wrong with any of them shows before the first is simulated.
    decoders = [make(method="stpp", stages=stages, **trees[0]) for stages in args.stages]
    decoders += [make(method="stpp", stages=1, **shape) for shape in trees]
    for prompt in prompts:
        decoders[0].request(prompt, **options)

    print(f"{words}, {args.max_new_tokens} tokens each, ", end="")
    print(f"temperature {args.temperature}; simulated. A tree takes N + 1 ticks on N stages.")
    print("| drafter | width | depth | tokens a tree | ", end="")
    print(" | ".join(f"{stages} stages" for stages in args.stages) + " |")
    print("|" + " --- |" * (4 + len(args.stages)))
    free = static_trees.with_free_drafting(make)
    rows = []
    for shape in trees:
        row = kept.find(shape) or kept.add(static_trees.with_one_stage(make, prompts, answers(), shape, **options))
        rows.append(row)
        cells = []
        for stages in args.stages:
            pair = [static_trees.strongest([row], how, stages).modeled_speedup_vs_pp for how in (make, free)]
            cells.append(f"{pair[0]:.2f}x ({pair[1]:.2f}x)")
        print(f"| {row.drafter} | {row.width} | {row.draft_steps} | {2 * row.tokens / row.ticks:.2f} | ", end="")
        print(" | ".join(cells) + " |", flush=True)
    print("PP's modeled time over the tree's; in brackets with drafting free\n")
    print("| stages | width | drafter | best depth | ticks per token | PP / this | ", end="")
    print("drafting free: best depth | ticks per token | PP / this |")
    print("|" + " --- |" * 9)
    for stages in args.stages:
        for width in args.width:
            for drafter in args.drafter:
                these = [row for row in rows if (row.width, row.drafter) == (width, drafter)]
                best = [static_trees.strongest(these, how, stages) for how in (make, free)]
                cells = [f"{x.draft_steps} | {x.ticks_per_token:.2f} | {x.modeled_speedup_vs_pp:.2f}x" for x in best]
                print(f"| {stages} | {width} | {drafter} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    run_command(main)
