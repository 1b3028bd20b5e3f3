"""What one device does with a model's whole pipe: time and bytes of a tick beside the device's own copy bandwidth.

The model runs as one stage, so that a tick is a pass over all weights. Weights are random and the drafter replays a
known text, so that any geometry and any width can be timed without a checkpoint. Everything here is measured.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pipedec_jax.analysis.tick_cost import compute_program, replay, replay_engine
from pipedec_jax.clock import run_timed
from pipedec_jax.hosts.processes import usable_cores
from pipedec_jax.model.parameters import ParameterSource
from pipedec_jax.pipeline import placement
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.settings import EngineSettings

COPY_BYTES = 2**31
"""Of the array whose copying gives the bandwidth: many times any cache."""


@dataclasses.dataclass(frozen=True)
class Bandwidth:
    """Measured bytes per second of one device's memory."""

    copy: float
    """Of a copy, bytes read and written."""
    read: float
    """Of a sum over an array, bytes read."""


@dataclasses.dataclass(frozen=True)
class DecodeTime:
    """Measured on one device; medians over repeats."""

    method: str
    width: int
    """Rows of a tick's batch (W)."""
    tick_s: float
    """Seconds of a tick, in a loop of ticks on the device."""
    compute_s: float
    """Seconds of its layers and head alone, over as many rows."""
    tokens_per_tick: float
    weight_bytes: int
    """Of layers and head: what a tick reads at least."""
    compile_s: float
    tick_spread_s: float
    """Largest minus smallest of the repeats."""

    @property
    def tokens_per_s(self) -> float:
        """Of the answer."""
        return self.tokens_per_tick / self.tick_s

    @property
    def bytes_per_s(self) -> float:
        """Weights read per second of ticks."""
        return self.weight_bytes / self.tick_s

    @property
    def compute_bytes_per_s(self) -> float:
        """Weights read per second of the layers and the head alone."""
        return self.weight_bytes / self.compute_s

    @property
    def fixed_s(self) -> float:
        """A tick minus its own compute."""
        return self.tick_s - self.compute_s


def timed(run: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of some runs, after one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begun)
    return seconds[1:]


def measure_bandwidth(*, array_bytes: int = COPY_BYTES, passes: int = 10, repeats: int = 5) -> Bandwidth:
    """Copy bandwidth of the default device, and how fast it reads.

    A pass copies an array while counting it up, so that no compiler can leave it out; passes run in one program.
    """
    x = jnp.zeros(array_bytes // 4, jnp.float32)

    @jax.jit
    def copy(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, passes, lambda _, x: x + 1, x)

    @jax.jit
    def read(x: jax.Array) -> jax.Array:
        # Each pass needs the one before, or they would be done at once.
        return lax.fori_loop(0, passes, lambda _, total: jnp.sum(x + total), jnp.float32(0))

    copied, summed = (statistics.median(timed(lambda run=run: run(x), repeats)) / passes for run in (copy, read))
    return Bandwidth(copy=2 * x.nbytes / copied, read=x.nbytes / summed)


PROMPT_TOKENS = 16
"""Random ones, before the text that is decoded."""


def weight_bytes(engine: Engine) -> int:
    """Bytes of the layers, the last norm and the head that a tick of one stage reads."""
    params = engine.weights.target
    (held,) = placement.bytes_per_device((params.layers, params.final_norm, params.output)).values()
    return held


def _compiled(
    source: ParameterSource, settings: Sequence[EngineSettings], prompt: Sequence[int], tokens: int
) -> tuple[list[Engine], list[Callable[[int], None]]]:
    """An engine of each settings, all with the same weights, and what runs its layers and head alone; compiled."""
    engines: list[Engine] = []
    for one in settings:
        placed = engines[0].weights.target if engines else None
        unknown = [0] * tokens  # until it has been decoded
        engines.append(
            replay_engine(source, one, prompt, unknown, 0.0, vocab_size=source.config.vocab_size, target_params=placed)
        )

    def compile_all(engine: Engine) -> Callable[[int], None]:
        engine.programs(len(prompt) + tokens)
        compute = compute_program(engine, len(prompt) + tokens)
        compute(1)
        return compute

    computes = [compile_all(engines[0])]  # alone, so that what the compiler times is not disturbed
    with ThreadPoolExecutor(usable_cores()) as threads:
        computes.extend(threads.map(compile_all, engines[1:]))
    return engines, computes


def measure_decoding(
    source: ParameterSource,
    settings: Sequence[EngineSettings],
    *,
    tokens: int = 128,
    rate: float = 1.0,
    repeats: int = 5,
    around: Callable[[EngineSettings, Callable[[], Any]], None] | None = None,
) -> Iterator[DecodeTime]:
    """Decode a text of this geometry with each of some settings of one stage, on the default device.

    The replayed text is what the first settings decode; where other sums let a near tie fall otherwise, guesses miss
    from there on, and batches are computed as wide as ever.

    Args:
        source: the model.
        settings: of one stage each, of the same dtype.
        tokens: of the answer.
        rate: share of positions whose guess is right.
        repeats: of every measurement, in turn.
        around: called with the settings and a function that decodes once, compiled and warm: to profile it.
    """
    prompt = np.random.default_rng(0).integers(source.config.vocab_size, size=PROMPT_TOKENS).tolist()
    engines, computes = _compiled(source, settings, prompt, tokens)
    engines[0].start(prompt, max_new_tokens=tokens)
    answer = engines[0].run(tokens).tokens

    def start(engine: Engine) -> None:
        known = replay(prompt, answer, rate, engine.settings.children)
        engine.start(prompt, max_new_tokens=tokens, drafter_params=known)

    ticks: list[list[float]] = [[] for _ in engines]
    alone: list[list[float]] = [[] for _ in engines]
    made = [0.0 for _ in engines]
    for repeat in range(repeats + 1):
        for index, (engine, compute) in enumerate(zip(engines, computes, strict=True)):
            start(engine)
            before, after, spent = run_timed(engine, tokens)
            count = after.ticks[-1] - before.ticks[-1]
            made[index] = (len(after.tokens) - len(before.tokens)) / count
            begun = time.perf_counter()
            compute(count)
            if repeat:  # the first round warms up
                ticks[index].append(spent / count)
                alone[index].append((time.perf_counter() - begun) / count)
    for index, (one, engine) in enumerate(zip(settings, engines, strict=True)):
        if around is not None:
            start(engine)
            around(one, lambda engine=engine: engine.run(tokens))
        yield DecodeTime(
            method=one.method,
            width=one.width,
            tick_s=statistics.median(ticks[index]),
            compute_s=statistics.median(alone[index]),
            tokens_per_tick=made[index],
            weight_bytes=weight_bytes(engine),
            compile_s=engine.compile_seconds,
            tick_spread_s=max(ticks[index]) - min(ticks[index]),
        )
