"""Model families that compute what LLaMA does, and what their `config.json` leaves unsaid."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
    """A `model_type` of transformers whose model is LLaMA's but for what this says."""

    architecture: str
    """The class whose weights are converted."""
    spellings: tuple[str, ...] = ()
    """Other names of it."""
    defaults: tuple[tuple[str, Any], ...] = ()
    """What absent keys of `config.json` stand for where LLaMA has other defaults."""
    biased: tuple[str, ...] | None = None
    """The arrays of a layer to which every model of the family adds a bias; None where `attention_bias` and `mlp_bias`
    say it, as LLaMA's do."""


FAMILIES = {
    "llama": Family("LlamaForCausalLM", spellings=("LLaMAForCausalLM",)),  # so in the first conversions
    "mistral": Family(
        "MistralForCausalLM",
        defaults=(("num_key_value_heads", 8), ("max_position_embeddings", 131072), ("sliding_window", 4096)),
        biased=(),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        defaults=(
            ("num_key_value_heads", 32),
            ("max_position_embeddings", 32768),
            ("sliding_window", 4096),
            ("use_sliding_window", False),
            ("max_window_layers", 28),
        ),
        biased=("query", "key", "value"),
    ),
}
