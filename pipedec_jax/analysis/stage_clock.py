"""Seconds of a tick's own work by the rows that each stage has, measured on an engine's devices, all at once.

Where ranks share cores, what a tick takes does not follow from its widest batch: products of several rows are spread
over all cores, those of one row are not, and in a pipe one stage often has several rows beside another that has one or
none. So the work is measured in the very state that a tick finds: stage k with so many rows, all stages together. From
that, and from how often a method's ticks have which rows (`Simulator.rows`), follows its time but for what a tick adds.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pipedec_jax import tree
from pipedec_jax.cache import Rows
from pipedec_jax.exchange import AXIS, vary
from pipedec_jax.pipeline.engine import Engine, make_request
from pipedec_jax.pipeline.placement import OWN, SAME
from pipedec_jax.pipeline.prefill import begin
from pipedec_jax.pipeline.stage import run_head, run_stage
from pipedec_jax.pipeline.tick import Local, Shared, System, Weights, draft
from pipedec_jax.sampling import GREEDY
from pipedec_jax.tick_costs import over_live_rows

StageRows = tuple[int, ...]
"""Rows at each of the N stages."""


def work_loop(
    system: System, weights: Weights, shared: Shared, local: Local, count_N: jax.Array, passes: jax.Array
) -> Local:
    """So many times the work of a tick on this rank, without exchange and tree. Runs under `shard_map`.

    The rows are those of a text of half the cache, in the slots behind it; `count_N` of them live at each stage.
    """
    rank = lax.axis_index(AXIS)
    W, S = system.schedule.width, shared.committed.shape[0]
    length, place_W = S // 2, jnp.arange(W, dtype=jnp.int32)
    rows = Rows(
        position=jnp.full(W, length, jnp.int32),
        slot=length + place_W,
        mask=jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32) < length, (W, S)),
    )
    # The root stands for every living row.
    pipe = jnp.where(place_W[None, :] < count_N[:, None], shared.tree.root, shared.tree.capacity)
    shared = shared.replace(pipe=pipe, committed=jnp.arange(S, dtype=jnp.int32) < length)
    live = (place_W < count_N[jnp.minimum(rank, system.stages - 1)]) & (rank < system.stages)

    def stage(cache: Any, both: tuple[Rows, jax.Array]) -> tuple[Any, jax.Array]:
        return run_stage(system.target, weights.target, cache, *both)

    def step(_: jax.Array, local: Local) -> Local:
        sizes = system.costs.stage.sizes(W)
        cache, x = over_live_rows(sizes, live, stage, local.cache, (rows, local.x))
        state, drafts = draft(system, weights.drafter, local.drafter, shared, x)
        part = run_head(
            system.target,
            weights.target,
            system.sampling,
            shared.sampling,
            x,
            tree.at(shared.tree.position, pipe[-1], 0) + 1,
            pipe[-1] < shared.tree.capacity,
            system.costs.head.sizes(W),
        )
        # What was found is fed back, so that nothing is dropped, and activations do not grow.
        leaves = jax.tree.leaves((x, part, [proposals.log_prob for proposals in drafts]))
        used = jnp.zeros((), jnp.float32)
        for leaf in leaves:
            used += jnp.sum(jnp.nan_to_num(leaf.astype(jnp.float32), posinf=0.0, neginf=0.0))
        return vary(Local(x=local.x + (0 * used).astype(local.x.dtype), cache=cache, drafter=state))

    return lax.fori_loop(0, passes, step, vary(local))


class StageClock:
    """Measures the work of an engine's ticks, on its devices and with its weights.

    Args:
        engine: whose stages, drafter and sizes they are.
        length: of the text that caches are made for; half of their slots are read.
    """

    def __init__(self, engine: Engine, length: int) -> None:
        self._system = system = engine.system()
        capacity = engine.capacity_for(length)
        self._shared = begin(system, make_request([0], 1, capacity, GREEDY), jnp.zeros((), jnp.int32))
        local = engine.new_local(capacity)
        self._local, self._weights = local.replace(x=jnp.ones_like(local.x)), engine.weights
        own = jax.tree.map(lambda leaf: leaf.sharding.spec, engine.weights)
        self._program = jax.jit(
            jax.shard_map(
                lambda *arguments: work_loop(system, *arguments),
                mesh=engine.mesh,
                in_specs=(own, SAME, OWN, SAME, SAME),
                out_specs=OWN,
                check_vma=False,
            ),
            donate_argnums=(2,),
        )

    def size_of(self, rows: StageRows) -> StageRows:
        """The rows that are computed for so many living ones."""
        sizes = (0, *self._system.costs.stage.sizes(self._system.schedule.width))
        return tuple(min(size for size in sizes if size >= count) for count in rows)

    def run(self, rows: StageRows, passes: int) -> float:
        """The seconds of so many ticks' work with these rows at the stages."""
        begun = time.perf_counter()
        count = np.asarray(rows, np.int32)
        found = self._program(self._weights, self._shared, self._local, count, np.int32(passes))
        self._local = jax.block_until_ready(found)
        return time.perf_counter() - begun


def measure_work(
    clocks: Mapping[str, StageClock], wanted: Mapping[str, Sequence[StageRows]], passes: int = 40, repeats: int = 7
) -> dict[str, dict[StageRows, float]]:
    """Median seconds of a tick's work, of each engine with each of the rows, measured in turn.

    A call with as many passes less is taken off, and with it what a call costs.

    Args:
        clocks: by name.
        wanted: rows to measure for each, as `StageClock.size_of` gives them.
        passes: of the longer call, even.
        repeats: in turn, after one that warms up.
    """
    found: dict[tuple[str, StageRows], list[float]] = {}
    for repeat in range(repeats + 1):
        for name, clock in clocks.items():
            for rows in wanted[name]:
                seconds = clock.run(rows, passes) - clock.run(rows, passes // 2)
                if repeat:
                    found.setdefault((name, rows), []).append(seconds / (passes - passes // 2))
    return {name: {rows: statistics.median(found[name, rows]) for rows in wanted[name]} for name in clocks}


def rows_by_ticks(clock: StageClock, ticks: Sequence[np.ndarray]) -> Counter[StageRows]:
    """How many ticks of some answers have which rows computed at the stages; from `Simulator.rows` of each."""
    return Counter(clock.size_of(tuple(map(int, rows))) for answer in ticks for rows in answer)


def predicted_seconds(counts: Mapping[StageRows, int], work: Mapping[StageRows, float]) -> float:
    """Seconds of all these ticks' work."""
    return sum(count * work[rows] for rows, count in counts.items())
