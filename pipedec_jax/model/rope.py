"""How far a position turns each pair of a head's dimensions: rotary frequencies, plain and scaled for long contexts.

As Hugging Face's `modeling_rope_utils` computes them (there in float32).
"""

from __future__ import annotations

import math

from pipedec_jax.config import LinearScaling, Llama3Scaling, LlamaConfig, YarnScaling


def rope_frequencies(config: LlamaConfig) -> list[float]:
    """Rotation per position of each half-head dimension (A / 2 numbers, radians)."""
    frequencies = plain_frequencies(config)
    match config.rope_scaling:
        case None:
            return frequencies
        case LinearScaling() as scaling:
            kept = [0.0] * len(frequencies)
        case Llama3Scaling() as scaling:
            kept = [_llama3_kept(scaling, frequency) for frequency in frequencies]
        case YarnScaling() as scaling:
            kept = _yarn_kept(scaling, config)
    # What is not kept is slowed by the factor.
    return [f * (keep + (1 - keep) / scaling.factor) for f, keep in zip(frequencies, kept, strict=True)]


def plain_frequencies(config: LlamaConfig) -> list[float]:
    """Those of `rope_theta` alone."""
    A = config.head_size
    return [config.rope_theta ** (-2 * i / A) for i in range(A // 2)]


def attention_factor(config: LlamaConfig) -> float:
    """By which cosine and sine are multiplied."""
    return config.rope_scaling.attention_factor if isinstance(config.rope_scaling, YarnScaling) else 1.0


def _llama3_kept(scaling: Llama3Scaling, frequency: float) -> float:
    """The part of a frequency that stays: by how often it turns within the original context."""
    turns = scaling.original_context * frequency / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    return _clip((turns - scaling.low_freq_factor) / span)


def _yarn_kept(scaling: YarnScaling, config: LlamaConfig) -> list[float]:
    """The part of each frequency that stays: a ramp over the dimensions between two numbers of turns."""
    A = config.head_size

    def dimension(turns: float) -> float:
        """Which dimension turns so often within the original context."""
        return A * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, A - 1)
    span = last - first if last != first else 0.001
    return [1 - _clip((i - first) / span) for i in range(A // 2)]


def _clip(part: float) -> float:
    return min(1.0, max(0.0, part))
