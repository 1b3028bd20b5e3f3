"""Options of the scripts that compare methods on held-out prompts."""

from __future__ import annotations

import argparse


def add_held_out_options(parser: argparse.ArgumentParser, prompts: int) -> None:
    """Add how many prompts there are, by default this many, what draws them, and how long answers are."""
    parser.add_argument("--prompts", type=int, default=prompts, help=f"held-out prompts (default {prompts})")
    parser.add_argument("--seed", type=int, default=0, help="seed that draws them (default 0)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens per prompt (default 128)")
