"""Early exits of the demo target on held-out source: acceptance, ticks and modeled time, as a Markdown table.

Every exit with every head, as the paper's chain and as trees, beside EESD with its best draft length and PP. A tick is
charged the longest stage, the exit head with its vocabulary included; EESD for what does not overlap.

Ticks are simulated: the exit path and its head run, the rest of the target does not, its tokens are known from plain
decoding. They equal the engine's (tests/pipeline/test_exits.py); `--engine` runs that instead and checks every token.

python scripts/compare_exits.py
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Iterator
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


def settings(trees: list[int], lengths: list[int]) -> Iterator[dict[str, Any]]:
    """PPSD as a chain, as levels and best first, and EESD."""
    yield {"method": "ppsd", "width": 1, "children": 1}
    for width in trees:
        tree = {"width": width, "children": min(width, 8), "drafter": "model"}
        yield {"method": "ppsd"} | tree
        yield {"method": "best-first"} | tree
    for length in lengths:
        yield {"method": "eesd", "draft_length": length}


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--stages", type=from_1, nargs="+", default=[4, 8, 16])
    parser.add_argument("--exits", type=from_1, nargs="+", default=[2, 4, 8])
    parser.add_argument("--heads", nargs="+", help="heads by name, such as target for the untrained ones (the best)")
    parser.add_argument("--trees", type=from_1, nargs="*", default=[4, 16], help="widths of trees (4 16)")
    parser.add_argument("--draft-lengths", type=from_1, nargs="*", default=[1, 2, 4, 8], help="of EESD: the best")
    add_held_out_options(parser, prompts=4)
    parser.add_argument("--temperature", type=amount, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--engine", action="store_true", help="run the engine; checks every token")
    parser.add_argument("--out", type=Path, help="also write all rows as JSON to this file")
    return parser.parse_args()


def show(decoder: pipedec_jax.Decoder, row: MethodRow) -> None:
    """Print a line of the table."""
    assert decoder.cycle is not None
    assert decoder.exit_head is not None
    count, path = decoder.split.count, decoder.split.exit
    layers = f"{'+'.join(map(str, count[:path]))} then {'+'.join(map(str, count[path:]))}"
    name = row.method if row.method != "eesd" else f"eesd, {decoder.settings.draft_length} drafts"
    print(
        f"| {row.stages} | {decoder.settings.exit_layer} | {layers} | "
        f"{decoder.exit_head.config.name.split('-', 1)[1]} | {decoder.cycle.layers:.2f} | {name} | {row.width} | "
        f"{row.hit_rate:.3f} | {row.ticks_per_token:.2f} | {row.ticks_speedup_vs_pp:.2f} | "
        f"{row.modeled_speedup_vs_pp:.2f} |",
        flush=True,
    )


def main() -> None:
    """Run the grid and print the table."""
    args = parse()
    if args.out:
        check_place("--out", args.out)
    pipedec_jax.use_cpu_devices(max(args.stages))
    from pipedec_jax.analysis.method_table import plain_answers, run, simulate
    from pipedec_jax.exit_store import find_exit_head

    target = pipedec_jax.load_demo("target")
    check_stages(args.stages, target.config)
    for exit_layer in args.exits:
        for head in args.heads or [None]:
            find_exit_head(target, exit_layer, head)
    prompts = [prompt.text for prompt in held_out_prompts(args.prompts, args.seed)]
    make = functools.partial(pipedec_jax.Decoder, target)
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    answers = plain_answers(make, prompts, **options)
    print(f"{args.prompts} held-out prompts (seed {args.seed}), {args.max_new_tokens} tokens each, ", end="")
    print(f"temperature {args.temperature}; ticks {'of the engine' if args.engine else 'simulated'}")
    print(
        "| stages | exit | layers by stage | head | longest stage | method | width | hit rate | ticks per token |",
        end="",
    )
    print(" ticks: PP / this | modeled time: PP / this |")
    print("|" + " --- |" * 11)
    found = []

    for stages, exit_layer, head in itertools.product(args.stages, args.exits, args.heads or [None]):
        rows = []
        for setting in settings(args.trees, args.draft_lengths):
            decoder = make(stages=stages, exit_layer=exit_layer, exit_head=head, **setting)
            row = (run if args.engine else simulate)(decoder, prompts, answers, **options)
            rows.append((decoder, row))
            if row.method != "eesd":
                show(decoder, row)
        eesd = [pair for pair in rows if pair[1].method == "eesd"]
        if eesd:
            show(*max(eesd, key=lambda pair: pair[1].modeled_speedup_vs_pp))
        for decoder, row in rows:
            extra = {"exit_layer": exit_layer, "layers_by_stage": decoder.split.count}
            extra |= {"exit_stages": decoder.split.exit, "draft_length": decoder.settings.draft_length}
            found.append(row.to_dict() | extra)
    if args.out is not None:
        write_whole(args.out, json.dumps({"argv": sys.argv[1:], "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
