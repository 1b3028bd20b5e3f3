"""What int8 layers change: the logits, the bytes on the device and the speed of plain decoding on one device."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pipedec_jax.decoding.decoder import Decoder
from pipedec_jax.loading import Model
from pipedec_jax.model import llama
from pipedec_jax.model.parameters import fixed_dtype, nest, parameter_shapes


@dataclasses.dataclass(frozen=True)
class LogitDifference:
    """How far logits `[..., V]` are from others of the same tokens."""

    largest: float
    """max|difference| / max|logit|."""
    typical: float
    """Root mean square of the difference / the logits' standard deviation, each position's mean taken off both."""
    same_choice: float
    """Share of positions where the highest logit is the same token's."""
    divergence: float
    """Mean Kullback-Leibler divergence from the other's distribution, in nats."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """Plain decoding on one device; measured."""

    layer_bytes: int
    """Bytes of the layers' weights on the device."""
    other_bytes: int
    """Bytes of embedding and head."""
    tokens_per_s: float
    """After the first token; the median over the prompts."""
    spread: tuple[float, float]
    """The lowest and highest over the prompts."""


def logits(model: Model, prompt: Sequence[int], dtype: Any) -> np.ndarray:
    """Logits `[T, V]` of a prompt, computed in `dtype`."""
    source = model.source
    tree = nest(
        {
            path: jnp.asarray(source.read(path), fixed_dtype(source.config, path) or dtype)
            for path in parameter_shapes(source.config)
        }
    )
    token_BT = jnp.asarray([prompt], jnp.int32)
    found = jax.jit(lambda tree, token_BT: llama.forward(source.config, tree, token_BT))(tree, token_BT)
    return np.asarray(found, np.float64)[0, :, : model.vocab_size]


def compare(found: np.ndarray, expected: np.ndarray) -> LogitDifference:
    """How far `found` is from `expected`."""
    difference = found - expected
    centred = difference - difference.mean(axis=-1, keepdims=True)
    spread = expected - expected.mean(axis=-1, keepdims=True)
    ours, theirs = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (found, expected))
    return LogitDifference(
        largest=float(np.abs(difference).max() / np.abs(expected).max()),
        typical=float(np.sqrt(np.mean(centred**2)) / np.sqrt(np.mean(spread**2))),
        same_choice=float(np.mean(found.argmax(axis=-1) == expected.argmax(axis=-1))),
        divergence=float(np.mean(np.sum(np.exp(theirs) * (theirs - ours), axis=-1))),
    )


def measure_speed(model: Model, prompts: Sequence[Sequence[int]], dtype: str, new_tokens: int) -> Speed:
    """Decode every prompt greedily on one device; the first one twice, to compile and warm up."""
    decoder = Decoder(model, method="pp", stages=1, dtype=dtype)
    rates = []
    for prompt in [prompts[0], *prompts]:
        result = decoder.generate(prompt, max_new_tokens=new_tokens)
        if result.tpot_s:
            rates.append(1 / result.tpot_s)
    (held,) = decoder.bytes_per_device()
    return Speed(
        layer_bytes=int(held["target layers"]),
        other_bytes=int(held["embedding and head"]),
        tokens_per_s=statistics.median(rates[1:]),
        spread=(min(rates[1:]), max(rates[1:])),
    )
