"""Options of the scripts that compare methods on held-out prompts."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from pipedec_jax.command_line.numbers import from_0, from_1
from pipedec_jax.config import LlamaConfig


def add_held_out_options(parser: argparse.ArgumentParser, prompts: int) -> None:
    """Add how many prompts there are, by default this many, what draws them, and how long answers are."""
    parser.add_argument("--prompts", type=from_1, default=prompts, help=f"held-out prompts (default {prompts})")
    parser.add_argument("--seed", type=from_0, default=0, help="seed that draws them (default 0)")
    parser.add_argument("--max-new-tokens", type=from_1, default=128, help="tokens per prompt (default 128)")


def check_stages(stages: Iterable[int], target: LlamaConfig) -> None:
    """Look, before long work for fewer of them, whether the target has a layer for each stage.

    Raises:
        ValueError: when it has not.
    """
    if max(stages) > target.layers:
        raise ValueError(f"--stages must be at most {target.layers}, the target's layers, not {max(stages)}")
