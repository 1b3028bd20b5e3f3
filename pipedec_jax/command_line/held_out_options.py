"""Options of the scripts that compare methods on held-out prompts."""

from __future__ import annotations

import argparse

from pipedec_jax.command_line.numbers import from_0, from_1


def add_held_out_options(parser: argparse.ArgumentParser, prompts: int) -> None:
    """Add how many prompts there are, by default this many, what draws them, and how long answers are."""
    parser.add_argument("--prompts", type=from_1, default=prompts, help=f"held-out prompts (default {prompts})")
    parser.add_argument("--seed", type=from_0, default=0, help="seed that draws them (default 0)")
    parser.add_argument("--max-new-tokens", type=from_1, default=128, help="tokens per prompt (default 128)")
