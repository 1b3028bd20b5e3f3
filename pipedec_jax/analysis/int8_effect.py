"""What int8 layers change: the logits, the bytes on the device and the speed of plain decoding on one device."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pipedec_jax.clock import decode
from pipedec_jax.decoding.devices import pick_devices
from pipedec_jax.model import llama
from pipedec_jax.model.int8 import Int8Source
from pipedec_jax.model.parameters import MemorySource, ParameterSource, nest, parameter_shapes, read_tree
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.settings import EngineSettings


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
    temporary_bytes: int
    """Bytes that the compiled loop needs beside weights and caches: were int8 matrices turned into floats ahead of it,
    they would be here. The compiler's figure."""
    tokens_per_s: float
    """After the first token; the median over the prompts."""
    spread: tuple[float, float]
    """The lowest and highest over the prompts."""
    read_bytes_per_s: float
    """Bytes of layers and head, which every token takes once, times tokens a second."""
    compile_s: float
    """Seconds that prefill and loop took to compile, not in the speed."""


def int8_source(source: ParameterSource) -> MemorySource:
    """The model with int8 layers, rounded once and kept in memory."""
    rounded = Int8Source(source)
    return MemorySource(rounded.config, nest({path: rounded.read(path) for path in parameter_shapes(rounded.config)}))


def logits(source: ParameterSource, prompts: Sequence[Sequence[int]], dtype: Any, vocab_size: int) -> list[np.ndarray]:
    """Logits `[T, V]` of every prompt, computed in `dtype` on the default device."""
    tree = read_tree(source, dtype)
    forward = jax.jit(functools.partial(llama.forward, source.config))
    return [np.asarray(forward(tree, jnp.asarray([prompt], jnp.int32)))[0, :, :vocab_size] for prompt in prompts]


def compare(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> LogitDifference:
    """How far the logits `[T, V]` of some prompts are from those expected."""
    furthest = highest = squares = spread = same = divergence = 0.0
    positions = values = 0
    for ours, theirs in zip(found, expected, strict=True):
        # Float64, for sums over many; a prompt at a time, for they are large.
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        difference = ours - theirs
        furthest = max(furthest, float(np.abs(difference).max()))
        highest = max(highest, float(np.abs(theirs).max()))
        squares += float(np.sum((difference - difference.mean(axis=-1, keepdims=True)) ** 2))
        spread += float(np.sum((theirs - theirs.mean(axis=-1, keepdims=True)) ** 2))
        same += float(np.sum(ours.argmax(axis=-1) == theirs.argmax(axis=-1)))
        log_ours, log_theirs = _log_softmax(ours), _log_softmax(theirs)
        divergence += float(np.sum(np.exp(log_theirs) * (log_theirs - log_ours)))
        positions += len(theirs)
        values += theirs.size
    return LogitDifference(
        largest=furthest / highest,
        typical=float(np.sqrt(squares / spread)),
        same_choice=same / positions,
        divergence=divergence / positions,
    )


def measure_speed(
    source: ParameterSource, prompts: Sequence[Sequence[int]], dtype: Any, new_tokens: int, vocab_size: int
) -> Speed:
    """Decode every prompt greedily on one device; the first one twice, to compile and warm up.

    Args:
        source: the model.
        prompts: token ids.
        dtype: to decode in.
        new_tokens: of each answer; at least 2.
        vocab_size: ids that are tokens.
    """
    settings = EngineSettings(method="pp", stages=1, width=1, children=1, dtype=jnp.dtype(dtype))
    engine = Engine(source, None, settings, vocab_size=vocab_size, devices=pick_devices(1))
    rates = []
    for prompt in [prompts[0], *prompts]:
        progress, seconds = decode(engine, prompt, None, new_tokens)
        rates.append((len(progress.tokens) - 1) / seconds)
    (held,) = engine.bytes_per_device()
    longest = max(map(len, prompts)) + new_tokens
    analysis = engine.programs(longest).run.memory_analysis()
    assert analysis is not None  # XLA has one on every platform
    tokens_per_s = statistics.median(rates[1:])
    layer_bytes = int(held["target layers"])
    head_bytes = source.config.vocab_size * source.config.width * settings.dtype.itemsize
    return Speed(
        layer_bytes=layer_bytes,
        other_bytes=int(held["embedding and head"]),
        temporary_bytes=int(analysis.temp_size_in_bytes),
        tokens_per_s=tokens_per_s,
        spread=(min(rates[1:]), max(rates[1:])),
        read_bytes_per_s=(layer_bytes + head_bytes) * tokens_per_s,
        compile_s=engine.compile_seconds,
    )


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
