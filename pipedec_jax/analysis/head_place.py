"""Where the LM head stands: whole on the last stage, or its vocabulary over all stages. Modeled, and measured."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pipedec_jax import vocabulary
from pipedec_jax.cache import Rows
from pipedec_jax.clock import medians_in_turn
from pipedec_jax.exchange import AXIS, broadcast, gather_over_devices, leads, to_next_stage, vary
from pipedec_jax.model import llama
from pipedec_jax.model.parameters import ParameterSource
from pipedec_jax.modeled.cost import Costs, at_rows, stage_cost
from pipedec_jax.pipeline import placement
from pipedec_jax.pipeline.placement import OWN
from pipedec_jax.pipeline.split import split_layers
from pipedec_jax.pipeline.stage import StageCache, Target, TargetParams, run_stage_where
from pipedec_jax.sampling import GREEDY

Place = Literal["last", "sharded"]


@dataclasses.dataclass(frozen=True)
class ModeledTicks:
    """What a tick costs with every stage busy, in the unit of the costs; the links are left out."""

    last: float
    """The head on the last stage, layers split evenly."""
    balanced: float
    """The head on the last stage, which has as many fewer layers as make the tick shortest."""
    sharded: float
    """The vocabulary over all stages."""


def modeled_ticks(costs: Costs, layers: int, stages: int, rows: int = 1) -> ModeledTicks:
    """Ticks of the three ways to place the head of a model of so many layers on at least two stages."""
    layer, head = at_rows(costs.layer, rows), at_rows(costs.head, rows)
    even = split_layers(layers, stages)

    def with_head(last: int) -> float:
        return max(split_layers(layers - last, stages - 1).longest * layer, last * layer + head)

    return ModeledTicks(
        last=max(even.longest * layer, even.count[-1] * layer + head),
        balanced=min(with_head(last) for last in range(1, layers - stages + 2)),
        sharded=stage_cost(costs, layers, stages, rows) + head / stages,
    )


def head_loop(
    target: Target,
    place: Place,
    params: TargetParams,
    whole: jax.Array,
    cache: StageCache,
    rows: Rows,
    x: jax.Array,
    count: jax.Array,
) -> tuple[StageCache, jax.Array, jax.Array]:
    """`count` ticks of layers, head and exchange alone, over fixed rows; under `shard_map`.

    Args:
        target: static description.
        place: of the head.
        params: the rank's weights.
        whole: `[V, D]`, the head as the last stage would have it.
        cache: the rank's.
        rows: that every stage computes.
        x: `[W, D]`, what each stage begins with.
        count: ticks.

    Returns:
        Cache and activations, and the choices `[W]` of the last tick.
    """
    stages, mode = target.split.stages, GREEDY.mode
    rank = lax.axis_index(AXIS)
    last = rank == stages - 1
    busy = jnp.all(vary(rows.slot >= 0))

    def whole_head(y: jax.Array) -> jax.Array:
        return jnp.argmax(llama.logits(target.config, params.final_norm, whole, y), axis=-1).astype(jnp.int32)

    def step(_: jax.Array, carry: tuple[StageCache, jax.Array, jax.Array]) -> tuple[StageCache, jax.Array, jax.Array]:
        cache, x, _ = carry
        cache, y = run_stage_where(busy, target, params, cache, rows, x)
        if place == "last":
            mine = lax.cond(last, lambda y: vary(whole_head(y)), lambda y: vary(jnp.zeros(y.shape[0], jnp.int32)), y)
            (choice,) = broadcast([(mine, leads() & last)])
        else:
            (hidden,) = broadcast([(y, leads() & last)])
            logit = vocabulary.head_part(target.config, params.final_norm, params.output, hidden, target.vocab_size)
            every = jnp.ones(logit.shape[0], bool)
            part = vocabulary.choice_part(mode, GREEDY.arrays(), logit, jnp.zeros_like(logit), target.vocab_size, every)
            choice, _ = vocabulary.choose(gather_over_devices(part))
        moved = to_next_stage(y, stages)
        # Every tick needs the one before, and activations do not grow.
        return cache, x + 0 * (moved + choice[:, None].astype(x.dtype)), choice

    return lax.fori_loop(0, count, step, (cache, x, jnp.zeros(x.shape[0], jnp.int32)))


def measure_places(
    source: ParameterSource, stages: int, width: int, *, slots: int = 512, ticks: int = 100, repeats: int = 5
) -> dict[Place, float]:
    """Seconds of a tick with the head in each place, float32, all stages busy: medians, in turn (A B A B).

    Raises:
        ValueError: when there are fewer devices than stages, or the two places choose other tokens.
    """
    mesh: Mesh = placement.make_mesh(stages)
    config, dtype = source.config, np.dtype(np.float32)
    split = split_layers(config.layers, stages)
    target = Target(config, split, config.vocab_size)
    params = placement.place_target(mesh, source, split, dtype)
    matrix = source.read("embedding") if config.tied_embeddings else source.read("head").T
    whole = placement.replicate(mesh, matrix.astype(dtype))
    rows = Rows(
        position=jnp.full(width, slots // 2, jnp.int32),
        slot=jnp.arange(slots // 2, slots // 2 + width, dtype=jnp.int32),
        mask=jnp.broadcast_to(jnp.arange(slots) < slots // 2 + width, (width, slots)),
    )
    x = np.random.default_rng(0).normal(size=(width, config.width)).astype(dtype)
    own, same = jax.tree.map(lambda leaf: leaf.sharding.spec, params), P()
    programs: dict[Place, Any] = {}
    places: tuple[Place, ...] = ("last", "sharded")
    for place in places:
        spread = jax.shard_map(
            functools.partial(head_loop, target, place),
            mesh=mesh,
            in_specs=(own, same, OWN, same, OWN, same),
            out_specs=(OWN, OWN, same),
            check_vma=False,
        )
        programs[place] = jax.jit(spread)

    def run(place: Place) -> tuple[float, Any]:
        cache = placement.cache_maker(mesh, config, split.longest, slots, dtype)()
        start = placement.per_device(mesh, x.shape, dtype, lambda _: x)
        jax.block_until_ready((cache, start))
        begun = time.perf_counter()
        found = jax.block_until_ready(programs[place](params, whole, cache, rows, start, np.int32(ticks)))
        return (time.perf_counter() - begun) / ticks, found[2]

    chosen = {place: np.asarray(run(place)[1]) for place in programs}  # compiles and warms up
    if not np.array_equal(chosen["last"], chosen["sharded"]):
        raise ValueError(f"the two places of the head choose other tokens: {chosen}")
    return medians_in_turn(lambda place: run(place)[0], programs, repeats)
