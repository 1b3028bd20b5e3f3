"""Seconds of a model's parts by the rows of a batch, measured on this machine's devices with random weights.

Time does not depend on the weights' values, so any geometry can be measured without its checkpoint. All ranks run the
same at once, as the stages of a pipe do; where they share cores or memory, they slow each other down as they will then.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from pipedec_jax.analysis.links import Link
from pipedec_jax.analysis.tick_cost import measure_tick_cost
from pipedec_jax.cache import LayerCache, Rows, at_least, over_layers
from pipedec_jax.config import LlamaConfig
from pipedec_jax.exchange import AXIS, vary
from pipedec_jax.hosts.processes import usable_cores
from pipedec_jax.model import llama
from pipedec_jax.model.exit_head import ExitHeadConfig, before_vocabulary, initialize_head, vocabulary_part
from pipedec_jax.model.held import hold
from pipedec_jax.model.int8 import Int8Source
from pipedec_jax.model.parameters import Parameters, ParameterSource, initialize, read_tree
from pipedec_jax.model.random_source import RandomSource
from pipedec_jax.pipeline import placement
from pipedec_jax.pipeline.placement import OWN, SAME
from pipedec_jax.pipeline.settings import EngineSettings

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Rows of the batches that are measured."""
SHORTEST = 0.05
"""Seconds that a timed call takes at least."""


@dataclasses.dataclass(frozen=True)
class PartSeconds:
    """Median seconds of one pass, by rows."""

    layer: dict[int, float]
    """One decoder layer."""
    head: dict[int, float]
    """Final norm and the whole LM head."""
    exit_head: dict[int, float]
    """An exit head, without its product with the vocabulary; empty where there is none."""
    exit_vocabulary: dict[int, float]
    """That product; empty where there is no exit head."""


def measure_parts(
    config: LlamaConfig,
    *,
    exit_head: ExitHeadConfig | None = None,
    rows: Sequence[int] = ROWS,
    layers: int = 2,
    slots: int = 1024,
    dtype: Any = jnp.float32,
    ranks: int = 1,
    repeats: int = 5,
    name: str = "parts",
) -> PartSeconds:
    """Measure a layer and the heads of a geometry.

    Args:
        config: the geometry.
        exit_head: of an early exit, to be measured as well.
        rows: of the batches.
        layers: that are run one after the other and divided by (as a stage holds several).
        slots: of the cache that attention reads.
        dtype: of weights, activations and caches.
        ranks: devices that run at once.
        repeats: of every measurement, in turn, after one that warms up.
        name: of what is measured, for the progress bar (on a terminal).

    Raises:
        ValueError: when there are fewer devices.
    """
    mesh = placement.make_mesh(ranks)
    few = dataclasses.replace(config, layers=layers)
    params = _random_params(few, dtype, NamedSharding(mesh, SAME))
    cache = placement.cache_maker(mesh, config, layers, slots, dtype)()
    parts: dict[str, tuple[Part, Parameters]] = {"layer": (_layers, params), "head": (_head, params)}
    if exit_head is not None:
        own = initialize_head(exit_head, few, jax.tree.map(np.asarray, params), seed=0)
        own = own if "layers" not in own else _held(exit_head.model(config), own)
        own = jax.device_put(jax.tree.map(lambda x: x.astype(dtype), own), NamedSharding(mesh, SAME))
        both = {"target": params, "exit": own}
        parts["exit_head"] = _exit(exit_head), both
        if not exit_head.shares_vocabulary:
            parts["exit_vocabulary"] = _exit_vocabulary(exit_head), both
    wanted = {
        (part, size): functools.partial(_program, mesh, few, run, weights, cache, size)
        for size in rows
        for part, (run, weights) in parts.items()
    }
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in wanted}
    with tqdm(total=len(wanted) * (1 + repeats), desc=f"measuring {name}", disable=None) as bar:
        bar.set_postfix_str("compiling")
        programs: dict[tuple[str, int], Callable[[int], float]] = {}
        with ThreadPoolExecutor(usable_cores()) as threads:
            for key, run in zip(wanted, threads.map(lambda make: make(), wanted.values()), strict=True):
                programs[key] = run
                bar.update()
        bar.set_postfix_str("timing")
        counts = {key: _count(run) for key, run in programs.items()}
        for _ in range(repeats):
            for key, run in programs.items():
                seconds[key].append(run(counts[key]) / counts[key])
                bar.update()

    def median(part: str) -> dict[int, float]:
        return {size: statistics.median(seconds[part, size]) for size in rows if (part, size) in seconds}

    return PartSeconds(
        layer={size: value / layers for size, value in median("layer").items()},
        head=median("head"),
        exit_head=median("exit_head"),
        exit_vocabulary=median("exit_vocabulary"),
    )


def _random_source(config: LlamaConfig) -> ParameterSource:
    plain = RandomSource(dataclasses.replace(config, int8=False))
    return Int8Source(plain) if config.int8 else plain


def _random_params(config: LlamaConfig, dtype: Any, where: NamedSharding) -> Parameters:
    """Random weights on the devices, layers as these hold them: in `dtype`, or rounded where the layers are int8."""
    if not config.int8:
        return jax.jit(lambda: _held(config, initialize(config, jax.random.key(0), dtype)), out_shardings=where)()
    return jax.device_put(_held(config, read_tree(_random_source(config), dtype)), where)


def _held(config: LlamaConfig, params: Parameters) -> Parameters:
    """A parameter tree with its layers as devices hold them."""
    return params | {"layers": {index: hold(config, layer) for index, layer in params["layers"].items()}}


def _count(run: Callable[[int], float]) -> int:
    """Passes that take long enough to be timed."""
    run(1)
    count = 4
    while run(count) < SHORTEST:
        count *= 2
    return count


Part = Callable[[LlamaConfig, Parameters, tuple[LayerCache, ...], Rows, jax.Array], tuple[Any, jax.Array]]


def _layers(
    config: LlamaConfig, params: Parameters, cache: tuple[LayerCache, ...], rows: Rows, x: jax.Array
) -> tuple[tuple[LayerCache, ...], jax.Array]:
    rope = llama.rope_tables(config, rows.position, x.dtype)

    def step(index: int, cache: LayerCache, rows: Rows, x: jax.Array) -> tuple[LayerCache, jax.Array]:
        x, cache = llama.forward_layer(config, params["layers"][str(index)], x, rope, cache.attend(rows))
        return cache, x

    return over_layers(cache, rows, step, x)


def _head(
    config: LlamaConfig, params: Parameters, cache: tuple[LayerCache, ...], _: Rows, x: jax.Array
) -> tuple[tuple[LayerCache, ...], jax.Array]:
    found = llama.logits(config, params["final_norm"], llama.head_matrix(params), x)
    return cache, x * jnp.max(found).astype(x.dtype)


def _exit(head: ExitHeadConfig) -> Part:
    def part(
        config: LlamaConfig, params: Parameters, cache: tuple[LayerCache, ...], rows: Rows, x: jax.Array
    ) -> tuple[tuple[LayerCache, ...], jax.Array]:
        rope = llama.rope_tables(config, rows.position, x.dtype)
        found, new = before_vocabulary(head, config, params["exit"], x, rope, cache[0].attend(rows))
        kept = cache if new is None else (new, *cache[1:])
        return kept, x * jnp.max(found)

    return part


def _exit_vocabulary(head: ExitHeadConfig) -> Part:
    def part(
        config: LlamaConfig, params: Parameters, cache: tuple[LayerCache, ...], _: Rows, x: jax.Array
    ) -> tuple[tuple[LayerCache, ...], jax.Array]:
        own, model = params["target"], head.model(config)
        norm, matrix = vocabulary_part(head, params["exit"], own["final_norm"], llama.head_matrix(own))
        y = jnp.broadcast_to(x[:, :1], (x.shape[0], model.width))
        return cache, x * jnp.max(llama.logits(model, norm, matrix, y)).astype(x.dtype)

    return part


def _program(
    mesh: Mesh, config: LlamaConfig, part: Part, params: Parameters, cache: tuple[LayerCache, ...], size: int
) -> Callable[[int], float]:
    """A function that runs a part a number of times on the devices, and gives the seconds it took."""
    slots = cache[0].value.sharding.shard_shape(cache[0].value.shape)[-2]
    used = slots // 2
    dtype = cache[0].value.dtype
    # As the engine computes them: on some devices a few dead rows more.
    rows, ones = at_least(
        placement.least_rows(mesh),
        Rows(
            position=jnp.full(size, used, jnp.int32),
            slot=jnp.arange(used, used + size, dtype=jnp.int32),
            mask=jnp.broadcast_to(jnp.arange(slots) < used, (size, slots)),
        ),
        jnp.ones((size, config.width), dtype),
    )

    def loop(params: Parameters, cache: tuple[LayerCache, ...], rows: Rows, count: jax.Array) -> Any:
        begin = vary(ones)

        def step(_: jax.Array, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            cache, x = carry
            cache, y = part(config, params, vary(cache), rows, x)
            return vary(cache), begin + 0 * y  # a pass waits for the one before, and activations do not grow

        return lax.fori_loop(0, count, step, (vary(cache), begin))

    specs = (SAME, OWN, SAME, SAME)
    spread = jax.shard_map(loop, mesh=mesh, in_specs=specs, out_specs=(OWN, OWN))
    compiled = jax.jit(spread).lower(params, cache, rows, jnp.int32(1)).compile()

    def run(count: int) -> float:
        begun = time.perf_counter()
        jax.block_until_ready(compiled(params, cache, rows, jnp.int32(count)))
        return time.perf_counter() - begun

    return run


def calibrate(
    target: LlamaConfig,
    draft: LlamaConfig | None,
    *,
    exit_head: ExitHeadConfig | None = None,
    exchange: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What `modeled.cost.calibrated_costs` takes: seconds of the target's parts, of a draft step, of an exit head.

    Args:
        target: its geometry.
        draft: the draft's; `None` where there is none.
        exit_head: of an early exit.
        exchange: seconds that a tick adds to its ranks' work; measured if not given.
        **options: of `measure_parts`.

    Returns:
        Seconds by part and rows, and under `measured` what they were measured of.
    """
    parts = measure_parts(target, exit_head=exit_head, name="the target's parts", **options)
    times: dict[str, Any] = {"layer": _never_falling(parts.layer), "head": _never_falling(parts.head)}
    if exit_head is not None:
        times["exit_head"] = _never_falling(parts.exit_head)
        if parts.exit_vocabulary:  # A tied one is the target's head.
            times["exit_vocabulary"] = _never_falling(parts.exit_vocabulary)
    if draft is not None:
        small = measure_parts(draft, name="the draft's parts", **options)
        whole = {size: draft.layers * small.layer[size] + small.head[size] for size in small.layer}
        times["draft"] = _never_falling(whole)
    dtype = jnp.dtype(options.get("dtype", jnp.float32))
    ranks, layers = options.get("ranks", 1), options.get("layers", 2)
    if exchange is None:
        exchange = measure_exchange(dataclasses.replace(target, layers=layers * ranks), ranks, dtype)
    measured = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "dtype": str(dtype),
        "ranks": ranks,
        "slots": options.get("slots", 1024),
        "target": target.to_dict(),
        "draft": draft.to_dict() if draft else None,
        "exit_head": dataclasses.asdict(exit_head) if exit_head else None,
    }
    return times | {"exchange": exchange, "measured": measured}


def measure_exchange(config: LlamaConfig, ranks: int, dtype: Any, width: int = 16) -> float:
    """Seconds that a tick of the engine takes beside its layers and head: one stage on each of so many devices.

    Sending, the broadcasts, the tree and its walk, with a drafter that guesses every token.
    """
    settings = EngineSettings(stages=ranks, width=width, children=min(width, 4), dtype=dtype)
    found = measure_tick_cost(_random_source(config), settings, [0, 1], vocab_size=config.vocab_size, ticks=100)
    return max(0.0, 1e-3 * found.fixed_ms)


def measure_link(devices: Sequence[jax.Device], *, array_bytes: int = 2**26, repeats: int = 5) -> Link:
    """How long an array takes to the next device: an int32, and one of so many bytes.

    All devices send at once, each to the next one, as the stages of a pipe do.

    Raises:
        ValueError: for fewer than two devices.
    """
    if len(devices) < 2:
        raise ValueError(f"a link needs two devices, not {len(devices)}")
    mesh = placement.make_mesh(len(devices), devices)
    shift = [(k, k + 1) for k in range(len(devices) - 1)]

    def seconds(size: int) -> float:
        x = placement.zeros(mesh, (size // 4,), jnp.int32)

        def loop(x: jax.Array, count: jax.Array) -> jax.Array:
            return lax.fori_loop(0, count, lambda _, x: x + lax.ppermute(x, AXIS, shift), x)

        spread = jax.jit(jax.shard_map(loop, mesh=mesh, in_specs=(OWN, SAME), out_specs=OWN))

        def run(count: int) -> float:
            begun = time.perf_counter()
            jax.block_until_ready(spread(x, jnp.int32(count)))
            return time.perf_counter() - begun

        count = _count(run)
        return statistics.median(run(count) for _ in range(repeats)) / count

    latency = seconds(4)
    return Link(latency=latency, bandwidth=array_bytes / max(seconds(array_bytes) - latency, 1e-9))


def _never_falling(seconds: dict[int, float]) -> dict[int, float]:
    """More rows cost no less: where fewer were measured to take longer, they can be computed as more."""
    least, result = math.inf, {}
    for rows in sorted(seconds, reverse=True):
        least = min(least, seconds[rows])
        result[rows] = least
    return dict(sorted(result.items()))
