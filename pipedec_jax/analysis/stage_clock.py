"""Seconds of the stages' own work in a method's ticks, measured on an engine's devices, all ranks at once.

Where ranks share cores and caches, what a tick takes does not follow from its widest batch: products of several rows
are spread over all cores, those of one row are not; one stage often has several rows beside another that has one or
none; and weights that a rank has just read come sooner. So the very ticks are run again, each stage with as many rows
as it had (`Simulator.rows`), but without exchange and tree: what remains to be explained is what a tick adds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pipedec_jax import tree
from pipedec_jax.cache import Rows
from pipedec_jax.clock import medians_in_turn
from pipedec_jax.exchange import AXIS, sum_over_devices, vary
from pipedec_jax.pipeline.drafting import draft, head_rows, share_at_exit
from pipedec_jax.pipeline.engine import Engine, make_request
from pipedec_jax.pipeline.placement import OWN, SAME
from pipedec_jax.pipeline.prefill import begin
from pipedec_jax.pipeline.stage import run_head, run_stage
from pipedec_jax.pipeline.state import Local, Shared, System, Weights
from pipedec_jax.sampling import GREEDY
from pipedec_jax.tick_costs import over_live_rows


def work_loop(system: System, weights: Weights, shared: Shared, local: Local, count_TN: jax.Array) -> Local:
    """The work of T ticks on this rank, without exchange and tree. Runs under `shard_map`.

    Rows are those of a text of half the cache, in the slots behind it; `count_TN` of them live at each stage. The ranks
    wait for each other after each tick, as they do in a pipe.
    """
    rank = lax.axis_index(AXIS)
    W, S = system.schedule.width, shared.committed.shape[0]
    length, place_W = S // 2, jnp.arange(W, dtype=jnp.int32)
    rows = Rows(
        position=jnp.full(W, length, jnp.int32),
        slot=length + place_W,
        mask=jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32) < length, (W, S)),
    )
    shared = shared.replace(committed=jnp.arange(S, dtype=jnp.int32) < length)

    def stage(cache: Any, both: tuple[Rows, jax.Array]) -> tuple[Any, jax.Array]:
        return run_stage(system.target, weights.target, cache, *both)

    def step(index: jax.Array, local: Local) -> Local:
        count_N = count_TN[index]
        # The root stands for every living row.
        pipe = jnp.where(place_W[None, :] < count_N[:, None], shared.tree.root, shared.tree.capacity)
        now = shared.replace(pipe=pipe)
        live = (place_W < count_N[jnp.minimum(rank, system.stages - 1)]) & (rank < system.stages)
        cache, x = over_live_rows(system.costs.stage.sizes(W), live, stage, local.cache, (rows, local.x))
        state, drafted = draft(system, weights.drafter, local.drafter, now, x)
        beside = head_rows(system, weights.drafter, now, drafted)
        part, logit = run_head(
            system.target,
            weights.target,
            system.sampling,
            shared.sampling,
            x,
            tree.at(shared.tree.position, pipe[-1], 0) + 1,
            pipe[-1] < shared.tree.capacity,
            system.costs.head.sizes(W if beside is None else 2 * W),
            beside,
        )
        drafted = share_at_exit(system, weights.drafter, now, drafted, logit) if system.exit else drafted
        # What was found is fed back, so that nothing is dropped, and activations do not grow.
        used = jnp.zeros((), jnp.float32)
        for leaf in jax.tree.leaves((x, part, drafted)):
            used += jnp.sum(jnp.nan_to_num(leaf.astype(jnp.float32), posinf=0.0, neginf=0.0))
        used = sum_over_devices(used)
        return vary(Local(x=local.x + (0 * used).astype(local.x.dtype), cache=cache, drafter=state))

    return lax.fori_loop(0, count_TN.shape[0], step, vary(local))


class StageClock:
    """Measures the work of an engine's ticks, on its devices and with its weights.

    Args:
        engine: whose stages, drafter and sizes they are.
        length: of the text that caches are made for; half of their slots are read.
    """

    def __init__(self, engine: Engine, length: int) -> None:
        system = engine.system()
        capacity = engine.capacity_for(length)
        self._shared = begin(system, make_request([0], 1, capacity, GREEDY), jnp.zeros((), jnp.int32))
        local = engine.new_local(capacity)
        self._local, self._weights = local.replace(x=jnp.ones_like(local.x)), engine.weights
        own = jax.tree.map(lambda leaf: leaf.sharding.spec, engine.weights)
        self._program = jax.jit(
            jax.shard_map(
                lambda *arguments: work_loop(system, *arguments),
                mesh=engine.mesh,
                in_specs=(own, SAME, OWN, SAME),
                out_specs=OWN,
                check_vma=False,
            ),
            donate_argnums=(2,),
        )

    def run(self, rows_TN: np.ndarray) -> float:
        """The seconds of ticks with these rows at the stages, one after the other, waiting for each other included."""
        begun = time.perf_counter()
        found = self._program(self._weights, self._shared, self._local, rows_TN.astype(np.int32))
        self._local = jax.block_until_ready(found)
        return time.perf_counter() - begun


def measure_work(
    clocks: Mapping[str, StageClock], rows: Mapping[str, np.ndarray], repeats: int = 7
) -> dict[str, float]:
    """Median seconds of each engine's work in its ticks, measured in turn.

    What as many ticks take that have no rows anywhere is taken off, and with it the ranks' waiting for each other and
    what a call costs.

    Args:
        clocks: by name.
        rows: of each, `[ticks, N]`, of all answers (`Simulator.rows`).
        repeats: in turn, after one that warms up.
    """

    def work(name: str) -> float:
        return clocks[name].run(rows[name]) - clocks[name].run(np.zeros_like(rows[name]))

    for name in clocks:
        work(name)
    return medians_in_turn(work, clocks, repeats)
