"""One-device plain decoding against Hugging Face's torch model: the same weights, prompts and cores, in one run."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import pipedec_jax
from pipedec_jax.analysis.held_out import held_out_prompts
from pipedec_jax.command_line.held_out_options import add_held_out_options
from pipedec_jax.command_line.output import Parser, run_command
from pipedec_jax.loading import demo_directory


def main() -> None:
    """Parse arguments, run both in turn (A B A B) and print a table."""
    parser = Parser(description=__doc__)
    add_held_out_options(parser, prompts=6)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    figures = compare(args)
    if args.json:
        print(json.dumps(figures))
        return
    print(f"prompts (held-out, {args.max_new_tokens} tokens each): {figures['prompts']}, ", end="")
    print(f"same tokens in {figures['same_tokens']}")
    print(f"measured, ms per token, prefill included, median: ours {figures['ours_ms_per_token']:.2f}, ", end="")
    print(f"Hugging Face torch ({figures['torch_threads']} threads) {figures['torch_ms_per_token']:.2f}")
    low, high = figures["speedup_spread"]
    print(
        f"measured, speedup over Hugging Face torch: {figures['speedup_vs_torch']:.2f} (from {low:.2f} to {high:.2f})"
    )


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Measured figures of both."""
    import torch  # a peer to compare with, never part of the runtime

    from pipedec_jax.peers.hugging_face import load_torch

    prompts = [prompt.text for prompt in held_out_prompts(args.prompts, args.seed)]
    target = pipedec_jax.load_demo("target")
    decoder = pipedec_jax.Decoder(target, method="pp", stages=1, dtype="float32")
    peer = load_torch(demo_directory("target"))

    def ours(ids: list[int]) -> list[int]:
        return decoder.generate(ids, max_new_tokens=args.max_new_tokens).token_ids

    @torch.inference_mode()
    def theirs(ids: list[int]) -> list[int]:
        ends = list(target.end_tokens)
        answer = peer.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
        return answer[0, len(ids) :].tolist()

    times: list[list[float]] = []
    same = 0
    for index, prompt in enumerate([prompts[0], *prompts]):  # the first round compiles and warms up
        ids = target.tokenizer.encode(prompt)
        pair, answers = [], []
        for run in (ours, theirs):
            begun = time.perf_counter()
            answers.append(run(ids))
            pair.append(1e3 * (time.perf_counter() - begun) / len(answers[-1]))
        if index:
            times.append(pair)
            same += answers[0] == answers[1]
    ratios = [their / our for our, their in times]
    return {
        "prompts": len(prompts),
        "same_tokens": same,
        "ours_ms_per_token": statistics.median(our for our, _ in times),
        "torch_ms_per_token": statistics.median(their for _, their in times),
        "speedup_vs_torch": statistics.median(ratios),
        "speedup_spread": [min(ratios), max(ratios)],
        "torch_threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
