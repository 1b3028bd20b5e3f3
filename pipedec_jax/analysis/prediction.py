"""What a plan is made of: models, devices and links, the seconds of the parts, and one predicted way to decode."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from pipedec_jax.analysis.device_memory import cache_bytes
from pipedec_jax.analysis.hit_curve import HitCurve, Setting
from pipedec_jax.analysis.links import Link, exchange_seconds
from pipedec_jax.checks import check_count
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.exit_head import ExitHeadConfig, step_weights
from pipedec_jax.modeled.cost import ByRows, Costs, at_rows, head_bytes, layer_bytes, roofline_seconds
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.pipeline.split import split_layers


@dataclasses.dataclass(frozen=True)
class Device:
    """One device, where no calibration says more.

    Raises:
        ValueError: for a value that is not over 0.
    """

    bandwidth: float
    """Bytes of its memory that it reads in a second; best as measured by a copy."""
    operations: float
    """Additions and multiplications that it makes in a second."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"the device's {name} must be a finite number over 0, not {value!r}")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be planned.

    Raises:
        ValueError: for a number of devices that is none, a context that the target has not, or no memory.
    """

    target: LlamaConfig
    draft: LlamaConfig | None
    """`None` where there is none; then methods with a draft model are left out."""
    costs: Costs
    """Seconds of the parts."""
    curve: HitCurve
    link: Link
    devices: int
    context: int = 4096
    """Tokens of prompt and answer together, for which caches have place."""
    memory: float | None = None
    """Bytes of a device; `None` where nothing is to be checked against it."""
    dtype: Any = jnp.bfloat16
    """Of weights, activations and caches."""
    exit_head: str = "block"
    """Variant of the exit head that PPSD would be given; its sizes are the target's."""
    per_slot: Costs | None = None
    """What every slot of the cache adds to them; `None` where they have it in them, as measured ones do."""

    def __post_init__(self) -> None:
        check_count("devices", self.devices)
        if not 1 <= self.context <= self.target.context:
            raise ValueError(f"context must be 1 to the target's {self.target.context} tokens, not {self.context}")
        if self.draft is not None and self.draft.context < self.context:
            raise ValueError(f"the draft has a context of {self.draft.context} tokens; {self.context} are planned for")
        if self.memory is not None and not 0 < self.memory < math.inf:
            raise ValueError(f"a device's memory must be a finite number of bytes over 0, not {self.memory!r}")
        if self.draft is not None and not at_rows(self.costs.draft, 1):
            raise ValueError("the costs have no draft step: calibrate with the draft, or leave the draft out")

    @property
    def item_bytes(self) -> int:
        """Bytes of a number."""
        return jnp.dtype(self.dtype).itemsize

    def fits(self, held: Mapping[str, int]) -> bool | None:
        """Whether a device has place for this; `None` where its memory is not known."""
        return None if self.memory is None else sum(held.values()) <= self.memory


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One way to decode on these devices, as predicted."""

    method: str
    """A method of this engine, or of what else there is."""
    ours: bool
    """Whether this software can run it."""
    devices: int
    """Devices in use, the draft's rank among them."""
    stages: int
    tensor: int
    """Devices over which each stage is split."""
    seconds: float
    """Time of a token after the first (TPOT)."""
    memory: dict[str, int]
    """Bytes of the fullest device, by part."""
    fits: bool | None
    """Whether that is no more than a device has; `None` where it is not known."""
    ticks: float | None = None
    """Ticks per token, from the hit curve."""
    tick_seconds: float | None = None
    """Mean time of a tick."""
    drafter: str = "none"
    width: int = 1
    children: int | None = None
    draft_steps: int | None = None
    """Draft steps in a tick; of a static tree, its levels."""
    exit_layer: int | None = None
    beyond: bool = False
    """Whether the hit curve had to be continued over its last point."""

    @property
    def bytes(self) -> int:
        """Bytes of the fullest device."""
        return sum(self.memory.values())

    def to_dict(self) -> dict[str, Any]:
        """Fields, and the sum of the bytes, JSON-ready."""
        return dataclasses.asdict(self) | {"bytes": self.bytes}


def roofline_costs(
    target: LlamaConfig, draft: LlamaConfig | None, device: Device, *, item_bytes: int, rows: Iterable[int]
) -> Costs:
    """Seconds of the parts from a device's bandwidth and operations: reading weights or multiplying, without caches.

    An exit head is left out: see `exit_head_cost`.

    Args:
        target: its geometry.
        draft: the draft's, or `None`.
        device: what it can do.
        item_bytes: of a weight that is not int8.
        rows: of the batches for which costs are wanted.
    """

    def seconds(size: float, weight: int, count: int) -> float:
        return roofline_seconds(size, weight, count, device.bandwidth, device.operations)

    def layer(config: LlamaConfig, count: int) -> float:
        return seconds(layer_bytes(config, item_bytes), 1 if config.int8 else item_bytes, count)

    def head(config: LlamaConfig, count: int) -> float:
        return seconds(head_bytes(config, item_bytes), item_bytes, count)

    sizes = sorted({1, *rows})
    return Costs(
        layer={count: layer(target, count) for count in sizes},
        head={count: head(target, count) for count in sizes},
        draft={count: draft.layers * layer(draft, count) + head(draft, count) if draft else 0.0 for count in sizes},
    )


def cache_costs(
    target: LlamaConfig, draft: LlamaConfig | None, device: Device, *, item_bytes: int, rows: Iterable[int]
) -> Costs:
    """Seconds that every slot of the cache adds to the parts: reading its keys and values, or attention's products."""

    def slot(config: LlamaConfig, count: int) -> float:
        products = 4 * count * config.heads * config.head_size
        return max(cache_bytes(config, 1, item_bytes) / device.bandwidth, products / device.operations)

    sizes = sorted({1, *rows})
    return Costs(
        layer={count: slot(target, count) for count in sizes},
        head=0.0,
        draft={count: draft.layers * slot(draft, count) if draft else 0.0 for count in sizes},
    )


def costs_with_cache(problem: Problem, slots: int) -> Costs:
    """Seconds of the parts where the cache has so many slots, all of which are read."""
    if problem.per_slot is None:
        return problem.costs

    def add(cost: ByRows, each: ByRows) -> ByRows:
        counts = sorted({rows for part in (cost, each) if isinstance(part, Mapping) for rows in part}) or [1]
        both = {rows: rows_cost(cost, rows) + slots * rows_cost(each, rows) for rows in counts}
        return both if isinstance(cost, Mapping) or isinstance(each, Mapping) else both[1]

    costs, each = problem.costs, problem.per_slot
    return dataclasses.replace(costs, layer=add(costs.layer, each.layer), draft=add(costs.draft, each.draft))


def rows_needed(curve: HitCurve) -> set[int]:
    """Rows of all batches that the curve's settings send or draft."""
    return {1} | {rows for setting in curve.lines for rows in (setting.width, batch_rows(setting))}


def batch_rows(setting: Setting) -> int:
    """Rows of the widest batch in the pipe; a static tree is one batch."""
    return 1 + setting.draft_steps * setting.width if setting.method == "stpp" else setting.width


def engine_settings(setting: Setting, stages: int, dtype: Any, tensor: int = 1) -> EngineSettings:
    """The engine's settings for a line of the curve, with each stage split over `tensor` devices."""
    static = setting.method == "stpp"
    return EngineSettings(
        method=setting.method,
        stages=stages,
        tensor_parallel=tensor,
        width=setting.width,
        children=setting.children,
        draft_steps=1 if static else setting.draft_steps,
        depth=setting.draft_steps if static else 4,
        dtype=dtype,
    )


def rows_cost(cost: ByRows, rows: int) -> float:
    """What so many rows cost; more rows than were measured cost as much more as they are more."""
    if not isinstance(cost, Mapping):
        return cost
    return at_rows(cost, rows) * max(1.0, rows / max(cost))


def with_exit_head(costs: Costs, head: ExitHeadConfig, target: LlamaConfig) -> Costs:
    """Costs with the exit head's; where they are not known, those of as many of the target's layers as it weighs."""
    if at_rows(costs.exit_head, 1):
        return costs
    weights, layer = step_weights(head, target), layer_bytes(dataclasses.replace(target, int8=False), 1)
    return dataclasses.replace(
        costs,
        exit_head=weights["path"] / layer * at_rows(costs.layer, 1),
        exit_vocabulary=None if head.shares_vocabulary else weights["vocabulary"] / layer * at_rows(costs.layer, 1),
    )


def useful_stages(layers: int, most: int) -> list[int]:
    """Numbers of stages up to `most` of which none has fewer stages and a longest stage as short, rising."""
    counts: dict[int, int] = {}
    for stages in range(1, min(layers, most) + 1):
        counts.setdefault(split_layers(layers, stages).longest, stages)
    return sorted(counts.values())


def tick_seconds(
    problem: Problem, setting: Setting, stages: int, ranks: int, stage: float, first_step: float, step: float
) -> float:
    """Mean time of a tick of a method with a draft model.

    A filled pipe's tick is its longest stage or the draft's steps, then the slice of the head and the exchange. A
    static tree takes a tick for drafting, a step after the other from the root on, and one for each of N stages: beside
    these the draft takes in what was sent without being extended (at most as many steps again, spread over the ticks),
    after the last the head is read.

    Args:
        problem: for its costs and links.
        setting: method, width and draft steps.
        stages: of the target (N).
        ranks: devices over which the head is sliced, and which take part in the exchange.
        stage: seconds of the longest stage.
        first_step: of a draft step over one node.
        step: of a draft step over as many as the setting's width.
    """
    costs, rows = problem.costs, batch_rows(setting)
    guesses = setting.draft_steps * setting.width * setting.children
    links = exchange_seconds(problem.link, ranks, rows, problem.target.width, problem.item_bytes, guesses)
    exchange = costs.exchange + links
    head = rows_cost(costs.head, rows) / ranks
    if setting.method == "stpp":
        drafting = first_step + (setting.draft_steps - 1) * step
        passing = stages * max(stage, -(-setting.draft_steps // stages) * step)
        return (drafting + passing + head) / (stages + 1) + exchange
    return max(stage, setting.draft_steps * step) + head + exchange
