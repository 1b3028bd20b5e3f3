"""What a tick's exchange costs on the devices of one or several processes: measured alone, and beside a whole tick."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from pipedec_jax.clock import run_timed
from pipedec_jax.decoding.decoder import Decoder
from pipedec_jax.exchange import pass_on, sum_over_devices, to_next_stage, vary
from pipedec_jax.pipeline import placement
from pipedec_jax.pipeline.placement import OWN

SUMS = 2
"""Sums over all devices in a tick beside what passes activations on: the embeddings, the parts of the choices."""
LOOPS = 300
"""Exchanges in one call, so that the host's own time is not in it."""
REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Hops:
    """Measured seconds on some devices."""

    processes: int
    ranks: int
    hop: float
    """A `ppermute` of a batch's activations, from each stage to the next."""
    broadcast: float
    """A sum over all devices of a batch's activations."""
    passing_on: float
    """A hop and a broadcast as a tick has them, which is a broadcast alone of small batches (`exchange.pass_on`)."""
    tick: float
    """A whole tick of the decoder."""

    @property
    def exchange(self) -> float:
        """Of a tick: passing on and its sums, if each costs what it costs alone."""
        return self.passing_on + SUMS * self.broadcast

    @property
    def share(self) -> float:
        """Of the tick that the exchange is."""
        return self.exchange / self.tick


def measure_hops(decoder: Decoder, prompt: str, new_tokens: int = 96) -> Hops:
    """Time the exchange of a decoder's tick on its devices, then its ticks.

    Args:
        decoder: whose mesh and batch are taken.
        prompt: after which the ticks are timed.
        new_tokens: in which they are.
    """
    engine = decoder.engine
    ranks, shape = engine.mesh.size, (decoder.width, decoder.target.config.width)
    stages = decoder.stages

    def both(x: jax.Array) -> jax.Array:
        received, last, _ = pass_on(x, stages, ())
        return 0.5 * (received + last)

    hop = _seconds(engine.mesh, shape, lambda x: to_next_stage(x, stages))
    # Scaled, so that what is summed again and again stays finite.
    broadcast = _seconds(engine.mesh, shape, lambda x: vary(sum_over_devices(x) / ranks))
    passing_on = _seconds(engine.mesh, shape, both)
    engine.start(decoder.target.tokenizer.encode(prompt), max_new_tokens=2 * new_tokens)
    engine.run(new_tokens // 2)
    before, after, seconds = run_timed(engine, new_tokens)
    tick = seconds / (after.ticks[-1] - before.ticks[-1])
    processes = len({device.process_index for device in engine.mesh.devices.flat})
    return Hops(processes, ranks, hop, broadcast, passing_on, tick)


def _seconds(mesh: Mesh, shape: tuple[int, int], exchange: Callable[[jax.Array], jax.Array]) -> float:
    """Least seconds of one exchange over some calls of a loop of them."""

    def loop(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, LOOPS, lambda _, x: exchange(x), x)

    x = placement.per_device(mesh, shape, np.float32, functools.partial(_ones, shape))
    run: Any = jax.jit(jax.shard_map(loop, mesh=mesh, in_specs=(OWN,), out_specs=OWN))
    jax.block_until_ready(run(x))
    found = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        jax.block_until_ready(run(x))
        found.append((time.perf_counter() - begun) / LOOPS)
    return min(found)


def _ones(shape: tuple[int, int], _: int) -> np.ndarray:
    return np.ones(shape, jnp.float32)
