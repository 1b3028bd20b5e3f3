"""What a tick costs beyond its stages' own compute, measured with all ranks busy.

Two programs run on the same mesh, in turn: whole ticks of the engine (with the replay drafter always right, so that
every stage has a live batch in every tick), and the same stages and head slices alone: no exchange, no tree, no
sampling. Both loop on the device; the difference per tick is the fixed cost.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from pipedec_jax import vocabulary
from pipedec_jax.cache import Rows
from pipedec_jax.clock import run_timed
from pipedec_jax.drafters.replay import Replay, ReplayDrafter
from pipedec_jax.exchange import AXIS, vary
from pipedec_jax.model.parameters import ParameterSource
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.placement import OWN
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.pipeline.stage import StageCache, Target, TargetParams, run_stage_where


@dataclasses.dataclass(frozen=True)
class TickCost:
    """Measured milliseconds per tick; medians over repeats, with the spread of each."""

    stages: int
    width: int
    tick_ms: float
    compute_ms: float
    tick_spread_ms: float
    """Largest minus smallest of the repeats."""
    compute_spread_ms: float

    @property
    def fixed_ms(self) -> float:
        """A tick minus its stages' own compute."""
        return self.tick_ms - self.compute_ms

    @property
    def share(self) -> float:
        """The stages' own compute as a share of the tick."""
        return self.compute_ms / self.tick_ms


def replay_engine(
    target: ParameterSource,
    settings: EngineSettings,
    prompt: Sequence[int],
    answer: Sequence[int],
    rate: float,
    *,
    vocab_size: int,
    seed: int = 0,
    devices: Sequence[jax.Device] | None = None,
    target_params: TargetParams | None = None,
) -> Engine:
    """An engine whose drafter replays `answer` (a known continuation of `prompt`), each position right with `rate`."""
    drafter = ReplayDrafter(children=settings.children, vocab_size=vocab_size)
    return Engine(
        target,
        None,
        settings,
        vocab_size=vocab_size,
        devices=devices,
        target_params=target_params,
        drafter=drafter,
        drafter_params=replay(prompt, answer, rate, settings.children, seed),
    )


def replay(prompt: Sequence[int], answer: Sequence[int], rate: float, children: int, seed: int = 0) -> Replay:
    """What replays `answer` after `prompt`: each position's first guess right with `rate`, or none of its guesses."""
    known = np.asarray([*prompt, *answer], np.int32)
    right = np.random.default_rng(seed).random(len(known)) < rate
    return Replay(token=jnp.asarray(known), place=jnp.where(right, 0, children))


def stage_loop(
    target: Target, params: TargetParams, cache: StageCache, x: jax.Array, rows: Rows, count: jax.Array
) -> tuple[StageCache, jax.Array]:
    """`count` times this rank's layers and head slice over fixed rows. Runs under `shard_map`, without a collective."""
    busy = jnp.all(vary(rows.slot >= 0)) & (lax.axis_index(AXIS) < target.split.stages)

    def step(_: jax.Array, carry: tuple[StageCache, jax.Array]) -> tuple[StageCache, jax.Array]:
        cache, x = carry
        cache, y = run_stage_where(busy, target, params, cache, rows, x)
        logit = vocabulary.head_part(target.config, params.final_norm, params.output, y, target.vocab_size)
        # Feed the logits back so that the head is not dropped, without letting activations grow.
        return cache, x + 0 * jnp.max(jnp.nan_to_num(logit, neginf=0.0)).astype(x.dtype)

    return lax.fori_loop(0, count, step, (cache, x))


def measure_tick_cost(
    target: ParameterSource,
    settings: EngineSettings,
    prompt: Sequence[int],
    *,
    vocab_size: int,
    ticks: int = 200,
    repeats: int = 5,
) -> TickCost:
    """Measure whole ticks and their stages' compute in turn (A B A B), on this machine's devices."""
    plain = Engine(target, None, dataclasses.replace(settings, method="pp", stages=1), vocab_size=vocab_size)
    plain.start(prompt, max_new_tokens=ticks + settings.stages)
    answer = plain.run(ticks + settings.stages).tokens
    engine = replay_engine(target, settings, prompt, answer, 1.0, vocab_size=vocab_size)
    compute = compute_program(engine, len(prompt) + len(answer))
    tick_ms, compute_ms = [], []
    for repeat in tqdm(range(repeats + 1), desc="measuring ticks", disable=None):
        engine.start(prompt, max_new_tokens=len(answer))
        before, after, seconds = run_timed(engine, len(answer))
        tick = seconds / (after.ticks[-1] - before.ticks[-1])
        begun = time.perf_counter()
        compute(ticks)
        alone = (time.perf_counter() - begun) / ticks
        if repeat:  # the first round warms up
            tick_ms.append(1e3 * tick)
            compute_ms.append(1e3 * alone)
    return TickCost(
        stages=settings.stages,
        width=settings.width,
        tick_ms=statistics.median(tick_ms),
        compute_ms=statistics.median(compute_ms),
        tick_spread_ms=max(tick_ms) - min(tick_ms),
        compute_spread_ms=max(compute_ms) - min(compute_ms),
    )


def compute_program(engine: Engine, length: int) -> Any:
    """A function that runs the stages alone for a number of ticks, and waits for them."""
    capacity = engine.capacity_for(length)
    local = engine.new_local(capacity)
    target, weights = engine.target, engine.weights.target
    width = engine.settings.width
    rows = Rows(
        position=jnp.full(width, length // 2, jnp.int32),
        slot=jnp.arange(length, length + width, dtype=jnp.int32),
        mask=jnp.broadcast_to(jnp.arange(capacity) < length // 2, (width, capacity)),
    )
    own = jax.tree.map(lambda leaf: leaf.sharding.spec, weights)
    same = jax.sharding.PartitionSpec()
    program = jax.jit(
        jax.shard_map(
            lambda params, cache, x, rows, count: stage_loop(target, params, cache, x, rows, count),
            mesh=engine.mesh,
            in_specs=(own, OWN, OWN, same, same),
            out_specs=(OWN, OWN),
        ),
        donate_argnums=(1, 2),
    )
    state = [local.cache, local.x]

    def run(ticks: int) -> None:
        state[:] = jax.block_until_ready(program(weights, state[0], state[1], rows, np.int32(ticks)))

    return run
