"""Ticks of PPSD's chain, in whole numbers: those counted beside `n + e hits + n misses`, over rates and trained heads.

n stages, of which the exit path has e. With the replay drafter at the exit any acceptance rate is met; with the demo
target's trained heads it is theirs, over held-out prompts (n for each answer). For equal stages the paper's form in
layers, L / (a E + (1 - a) L), stands beside PP's ticks over those counted. Ends with status 1 where a count differs.

python scripts/count_exits.py                    # simulated; --engine runs the trained heads in the engine
"""

from __future__ import annotations

import functools

import pipedec_jax
from pipedec_jax.analysis.held_out import held_out_prompts
from pipedec_jax.command_line.held_out_options import check_stages
from pipedec_jax.command_line.numbers import from_0, from_1, up_to_1
from pipedec_jax.command_line.output import Parser, run_command


def main() -> None:
    """Parse arguments, count and print a Markdown table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--stages", type=from_1, nargs="+", default=[4, 8, 16])
    parser.add_argument("--exits", type=from_1, nargs="+", default=[2, 4, 8], help="layers of the exit path (2 4 8)")
    parser.add_argument("--rates", type=up_to_1, nargs="*", default=[0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 1])
    parser.add_argument("--tokens", type=from_1, default=500, help="tokens of the replayed text (500)")
    parser.add_argument("--prompts", type=from_0, default=4, help="held-out prompts of trained heads; 0 for none (4)")
    parser.add_argument("--seed", type=from_0, default=0, help="seed that draws them, and the replayed text (0)")
    parser.add_argument("--max-new-tokens", type=from_1, default=128, help="tokens per prompt (default 128)")
    parser.add_argument("--engine", action="store_true", help="run the trained heads in the engine")
    args = parser.parse_args()

    pipedec_jax.use_cpu_devices(max(args.stages))
    from pipedec_jax.analysis.exit_counts import ChainCount, of_row, replayed
    from pipedec_jax.analysis.method_table import plain_answers, run, simulate

    model = pipedec_jax.load_demo("target")
    check_stages(args.stages, model.config)
    make = functools.partial(pipedec_jax.Decoder, model)
    prompts = [prompt.text for prompt in held_out_prompts(args.prompts, args.seed)] if args.prompts else []
    options = {"max_new_tokens": args.max_new_tokens}
    answers = plain_answers(make, prompts, **options) if prompts else []
    found: list[ChainCount] = []

    def report(exit_layer: int, name: str, count: ChainCount) -> None:
        found.append(count)
        form = count.speedup_in_layers
        split = count.split
        print(
            f"| {split.stages} | {exit_layer} | {'+'.join(map(str, split.count))} | {split.exit} | {name} | "
            f"{count.tokens} | {count.hits} | {count.misses} | {count.ticks} | {count.predicted} | "
            f"{'yes' if count.exact else 'NO'} | {count.speedup:.3f} | {'-' if form is None else f'{form:.3f}'} |",
            flush=True,
        )

    print(
        "| stages n | exit E | layers by stage | e | guesses right | tokens | hits | misses | ticks, counted |", end=""
    )
    print(" predicted | equal | PP's ticks / these | L / (a E + (1 - a) L) |")
    print("|" + " --- |" * 13)
    for stages in args.stages:
        for exit_layer in args.exits:
            counts = replayed(model.config, stages, exit_layer, args.rates, args.tokens, args.seed)
            for rate, count in zip(args.rates, counts, strict=True):
                report(exit_layer, f"replay, {rate:g}", count)
            if prompts:
                decoder = make(method="ppsd", stages=stages, exit_layer=exit_layer)
                row = (run if args.engine else simulate)(decoder, prompts, answers, **options)
                report(exit_layer, "trained head", of_row(row, decoder.split))
    print(f"\n{sum(count.exact for count in found)} of {len(found)} counts are those predicted")
    if not all(count.exact for count in found):
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
