"""The engine's own cost at depth, *emulated*: small stages that each wait as long as a large one would compute.

Waits of several ranks run side by side on a machine of few cores, where computing would take turns. All else is the
engine's own: exchange, tree, schedule, drafter, and the target's choices, which are compared with plain decoding's.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from pipedec_jax.analysis.tick_cost import replay
from pipedec_jax.clock import run_timed
from pipedec_jax.config import LlamaConfig
from pipedec_jax.drafters.replay import ReplayDrafter
from pipedec_jax.exchange import AXIS, gather_over_devices, pass_on, sum_over_devices
from pipedec_jax.model.parameters import MemorySource, initialize
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.placement import OWN, SAME
from pipedec_jax.pipeline.settings import EngineSettings

PROMPT = [1, 2, 3]


def wait(milliseconds: float) -> Callable[[jax.Array], jax.Array]:
    """A stage's wait: gives back its rows once so much time has passed.

    `jax.pure_callback` would do, but moves its arguments to a device and back: 27 us a call instead of 3, 100 where 16
    ranks want the interpreter at once, which is this emulation's cost and not the engine's. So the callback is bound
    to a primitive of its own.
    """

    def sleep(x: np.ndarray) -> tuple[np.ndarray]:
        time.sleep(1e-3 * milliseconds)
        return (np.zeros((), x.dtype),)

    def lower(context: Any, x: Any) -> Any:
        found, _, _ = mlir.emit_python_callback(
            context, sleep, None, [x], context.avals_in, context.avals_out, has_side_effect=False
        )
        return found

    def same(x: Any) -> Any:
        return x

    primitive = Primitive("wait")
    primitive.def_abstract_eval(same)
    mlir.register_lowering(primitive, lower)

    def run(x: jax.Array) -> jax.Array:
        # One number goes to the host and a zero comes back, upon which the rows then depend.
        return x + primitive.bind(x[0, 0])

    return run


@dataclasses.dataclass(frozen=True)
class Emulated:
    """Emulated milliseconds a tick with every rank busy: the median over repeats, and the least and the most."""

    stages: int
    width: int
    wait_ms: float
    slept_ms: float
    """What such a wait really takes on this machine, alone and without a pipe (the median)."""
    exchange_ms: float
    """Waits and the collectives of a tick alone, of arrays as large (the median): what this engine cannot do without
    on this machine."""
    tick_ms: float
    least_ms: float
    most_ms: float

    @property
    def share(self) -> float:
        """The wait, as it is asked for, as a share of the tick: 1 where the engine costs nothing."""
        return self.wait_ms / self.tick_ms


def emulate(stages: int, width: int, milliseconds: float, ticks: int = 60, repeats: int = 5) -> Emulated:
    """Measure ticks of a filled pipe, one small layer and a wait on every rank, guesses replayed and all right.

    Raises:
        RuntimeError: when the tokens are not plain decoding's, or a tick did not commit one (a bug).
    """
    config = LlamaConfig(
        vocab_size=64,
        width=32,
        feed_forward=48,
        layers=stages,
        heads=4,
        kv_heads=2,
        head_size=8,
        context=len(PROMPT) + ticks + stages + 1,
    )
    target = MemorySource(config, initialize(config, jax.random.key(0)))
    settings = EngineSettings(stages=stages, width=width, children=min(width, 4), prefill_width=8)
    plain = Engine(target, None, EngineSettings(method="pp", stages=1, prefill_width=8), vocab_size=64)
    plain.start(PROMPT, max_new_tokens=ticks + 1)
    answer = plain.run(ticks + 1).tokens
    engine = Engine(
        target,
        None,
        settings,
        vocab_size=64,
        drafter=ReplayDrafter(children=settings.children, vocab_size=64),
        drafter_params=replay(PROMPT, answer, 1.0, settings.children),
        wait=wait(milliseconds),
    )
    exchange = exchange_alone(engine, milliseconds)
    found, alone = [], []
    for repeat in range(repeats + 1):
        engine.start(PROMPT, max_new_tokens=len(answer))
        before, progress, seconds = run_timed(engine, len(answer))
        made = progress.ticks[-1] - before.ticks[-1]
        if progress.tokens != answer or made != len(answer) - 1:
            raise RuntimeError("tokens or ticks are not those of a filled pipe; please report this")
        begun = time.perf_counter()
        exchange(ticks)
        bare = time.perf_counter() - begun
        if repeat:  # the first round warms up
            found.append(1e3 * seconds / made)
            alone.append(1e3 * bare / ticks)
    return Emulated(
        stages=stages,
        width=width,
        wait_ms=milliseconds,
        slept_ms=statistics.median(slept(milliseconds) for _ in range(20)),
        exchange_ms=statistics.median(alone),
        tick_ms=statistics.median(found),
        least_ms=min(found),
        most_ms=max(found),
    )


def slept(milliseconds: float) -> float:
    """How long a wait of so many milliseconds takes."""
    begun = time.perf_counter()
    time.sleep(1e-3 * milliseconds)
    return 1e3 * (time.perf_counter() - begun)


def exchange_alone(engine: Engine, milliseconds: float) -> Callable[[int], None]:
    """A function that makes so many ticks of nothing but waits and exchange, on the engine's devices."""
    stages, pause = engine.settings.stages, wait(milliseconds)
    shape = engine.settings.width, engine.target.config.width

    def step(_: jax.Array, x: jax.Array) -> jax.Array:
        rank = lax.axis_index(AXIS)
        x = pause(jnp.where(rank == 0, sum_over_devices(0.5 * x), x))
        received, last = pass_on(x, stages, ())[:2]
        return received + jnp.max(gather_over_devices(jnp.max(last, axis=-1)))

    def loop(x: jax.Array, ticks: jax.Array) -> jax.Array:
        return lax.fori_loop(0, ticks, step, x[0])[None]

    spread = jax.shard_map(loop, mesh=engine.mesh, in_specs=(OWN, SAME), out_specs=OWN, check_vma=False)
    program = jax.jit(spread)
    rows = jnp.zeros((engine.mesh.size, *shape), jnp.float32)

    def run(ticks: int) -> None:
        jax.block_until_ready(program(rows, np.int32(ticks)))

    return run
