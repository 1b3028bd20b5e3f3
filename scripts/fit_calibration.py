"""Fit what drafters claim to how often the target agrees, on held-out text of its own (other seeds than the tables').

The target writes a continuation of each prompt; along it, every guess of the draft model and of look-up is compared
with the token that came. Fitted are: sharpness (the factor on the draft's logits that makes the target's tokens most
likely), the chance of a looked-up guess by how many tokens before it agreed, and how far a guess is to be trusted that
look-up alone makes. Reported: how often guesses of each claimed chance were right, before and after.

python scripts/fit_calibration.py
python scripts/fit_calibration.py --target DIR --draft DIR --prompts FILE
"""

from __future__ import annotations

import argparse

import numpy as np

import pipedec_jax
from pipedec_jax.analysis.held_out import prompts_given
from pipedec_jax.command_line.opening import target_and_draft
from pipedec_jax.command_line.output import Parser, fail, run_command


def main() -> None:
    """Parse and check arguments; a bad one ends with status 2."""
    parser = Parser(description=__doc__)
    parser.add_argument("--target", metavar="DIR", help="model directory or hub id (the demo target)")
    parser.add_argument("--draft", metavar="DIR", help="the same for the draft (the demo draft, for the demo target)")
    parser.add_argument("--prompts", default="24", help="number of held-out prompts, or a file as of benchmark.py (24)")
    parser.add_argument("--seed", type=int, default=1000, help="that draws held-out ones (1000; the tables use 0)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of each continuation (128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--children", type=int, default=16, help="guesses of the draft that look-up adds to (16)")
    args = parser.parse_args()
    pipedec_jax.use_cpu_devices(2)
    try:
        if args.children < 1:
            raise ValueError(f"--children must be at least 1, not {args.children}")
        run(args)
    except (ValueError, OSError) as error:
        fail(error)


def run(args: argparse.Namespace) -> None:
    """Decode, fit and print."""
    from pipedec_jax.analysis.claims import LENGTHS, collect, fit_sharpness, log_softmax, reliability

    texts, words = prompts_given(args.prompts, args.seed)
    pair = target_and_draft(args.target, args.draft)
    found = collect(*pair, texts, max_new_tokens=args.max_new_tokens, temperature=args.temperature)
    print(f"{len(found.token)} tokens after {words}, measured agreement")

    factor, before, after = fit_sharpness(found)
    print(f"\nsharpness {factor:.2f}: mean log-probability of the target's token {before:.4f} -> {after:.4f}")
    edges = [0.0, 0.01, 0.03, 0.1, 0.3, 0.6, 0.9, 0.99, 1.0]
    print("guesses of the draft by claimed chance, count: claimed -> right")
    print("| sharpness | " + " | ".join(f"up to {edge}" for edge in edges[1:]) + " |")
    print("|" + " --- |" * len(edges))
    best = np.argsort(-found.logit, axis=1)[:, : args.children]
    right = best == found.token[:, None]
    for sharpness in (1.0, factor):
        claimed = np.exp(np.take_along_axis(log_softmax(sharpness * found.logit), best, axis=1))
        print(f"| {sharpness:.2f} | " + " | ".join(reliability(claimed.ravel(), right.ravel(), edges)) + " |")

    hit = found.looked_up == found.token[:, None]
    first = found.length[:, 0]
    chances = []
    print("\nthe longest look-up by how many tokens before it agreed")
    print("| tokens | guesses | right |\n| --- | --- | --- |")
    for length in range(1, LENGTHS + 1):
        those = first == length
        chances.append(float(hit[those, 0].mean()) if those.any() else 0.0)
        right = f"{chances[-1]:.3f}" if those.any() else "-"
        print(f"| {length}{' or more' if length == LENGTHS else ''} | {those.sum()} | {right} |")
    alone = (found.length > 1) & ~np.any(found.looked_up[:, :, None] == best[:, None, :], axis=2)
    claimed = np.asarray([0.0, *chances])[found.length]
    if not alone.any():
        print("\nguesses that look-up alone makes: none")
        return
    worth = hit[alone].mean() / claimed[alone].mean()
    print(f"\nguesses that look-up alone makes: {alone.sum()}, right {hit[alone].mean():.3f}, trust {worth:.2f}")


if __name__ == "__main__":
    run_command(main)
