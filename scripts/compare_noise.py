"""How often the draft is right about drawn tokens, guessing under the target's noise, other noise, or none.

Temperatures by rows; the demo family on held-out source. Acceptance: how often the draft's first guess, and any of its
first 8, is the token that is drawn. Ticks are simulated, as in compare_schedules.py.
"""

from __future__ import annotations

import functools
from typing import get_args

import pipedec_jax
from pipedec_jax.analysis.held_out import held_out_prompts
from pipedec_jax.command_line.held_out_options import check_stages
from pipedec_jax.command_line.numbers import amount, from_0, from_1
from pipedec_jax.command_line.output import Parser, run_command
from pipedec_jax.drafters.chances import Noise


def main() -> None:
    """Parse arguments, run and print a Markdown table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--temperature", type=amount, nargs="+", default=[0.5, 0.8, 1.0])
    parser.add_argument("--noise", nargs="+", default=get_args(Noise), choices=get_args(Noise))
    parser.add_argument("--stages", type=from_1, default=8, help="of the runs whose ticks are counted (default 8)")
    parser.add_argument("--width", type=from_1, default=32, help="of the same (default 32)")
    parser.add_argument("--prompts", type=from_1, default=8, help="held-out prompts (default 8)")
    parser.add_argument("--seed", type=from_0, default=0, help="seed that draws them, and the tokens (default 0)")
    parser.add_argument("--max-new-tokens", type=from_1, default=128, help="tokens per prompt (default 128)")
    args = parser.parse_args()

    pipedec_jax.use_cpu_devices(args.stages + 1)
    from pipedec_jax.analysis.method_table import guesses, plain_answers, simulate, sweep

    prompts = [prompt.text for prompt in held_out_prompts(args.prompts, args.seed)]
    target, draft = pipedec_jax.load_demo("target"), pipedec_jax.load_demo("draft")
    check_stages([args.stages], target.config)
    make = functools.partial(pipedec_jax.Decoder, target, draft)
    print(f"{args.prompts} held-out prompts (seed {args.seed}), {args.max_new_tokens} tokens each; simulated ticks per")
    print(f"token at {args.stages} stages and width {args.width}")
    print("| temperature | noise of the draft | first guess right | among 8 | ticks, pipedec | ticks, best-first |")
    print("|" + " --- |" * 6)
    for temperature in args.temperature:
        options = {"max_new_tokens": args.max_new_tokens, "temperature": temperature, "seed": args.seed}
        answers = plain_answers(make, prompts, **options)
        for noise in args.noise:
            shares = []
            for children in (1, 8):
                decoder = make(method="pipedec", drafter="model", children=children, stages=2, noise=noise)
                right = guesses(decoder, prompts, answers, **options)
                shares.append(sum(map(sum, right)) / sum(map(len, right)))
            sizes = {"stages": args.stages, "width": args.width, "noise": noise, "drafter": "model"}
            settings = [sizes | {"method": "pipedec", "children": 8}, sizes | {"method": "best-first", "children": 16}]
            rows = sweep(make, prompts, answers, settings, lambda _: None, simulate, **options)
            print(
                f"| {temperature} | {noise} | {shares[0]:.3f} | {shares[1]:.3f} | "
                + " | ".join(f"{row.ticks_per_token:.2f}" for row in rows)
                + " |",
                flush=True,
            )


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
