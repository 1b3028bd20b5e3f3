"""Modeled time: what a tick costs beside what plain pipeline parallelism (PP) pays for a token.

Ticks are not time. A tick lasts as long as its slowest rank, while PP's token costs the sum of its stages at width 1;
with uneven stages, or a draft heavier than a stage, a ratio of ticks flatters. Decoding is bound by reading weights,
so by default a part costs the bytes of weights it reads, however many rows it serves. Measured seconds, by the number
of rows where they depend on it, may take their place.

Left out on purpose: caches, activations, and the few embedding rows.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from pipedec_jax.config import LlamaConfig, check_keys
from pipedec_jax.model.exit_head import ExitHeadConfig, step_weights
from pipedec_jax.model.parameters import fixed_dtype, layer_shapes
from pipedec_jax.model.tensor_parallel import tensor_share
from pipedec_jax.pipeline.split import split_layers
from pipedec_jax.tick_costs import Curve, TickCosts

ByRows = float | Mapping[int, float]
"""A cost, the same for any number of rows; or costs of up to so many rows each, the largest for more as well."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one pass of each part costs, all in one unit (bytes read, or seconds).

    Raises:
        ValueError: for a cost that is no finite number of at least 0, or a number of rows that is none.
    """

    layer: ByRows
    """One layer of the target."""
    head: ByRows
    """The target's whole LM head, on one device."""
    draft: ByRows = 0.0
    """One step of the draft: all its layers and its LM head."""
    exit_head: ByRows = 0.0
    """One step of the exit head, without its product with the vocabulary."""
    exit_vocabulary: ByRows | None = None
    """That product, with the whole vocabulary on one device; `None` where it is a part of the target's head's."""
    exchange: float = 0.0
    """What a tick adds to its ranks' work: sending activations, and the bookkeeping of the tree."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is None and name == "exit_vocabulary":
                continue
            costs = value if isinstance(value, Mapping) and name != "exchange" else {1: value}
            if not costs:
                raise ValueError(f"cost {name} must not be empty")
            for rows, cost in costs.items():
                if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
                    raise ValueError(f"cost {name} must be given for whole numbers of rows from 1 on, not {rows!r}")
                if isinstance(cost, bool) or not isinstance(cost, numbers.Real) or not 0 <= float(cost) < math.inf:
                    raise ValueError(f"cost {name} must be a finite number >= 0, not {cost!r}")
        if at_rows(self.layer, 1) == 0:
            raise ValueError("cost layer must be over 0")


def at_rows(cost: ByRows, rows: int) -> float:
    """What so many rows cost."""
    if not isinstance(cost, Mapping):
        return cost
    return cost[min((size for size in cost if size >= rows), default=max(cost))]


def byte_costs(
    target: LlamaConfig, draft: LlamaConfig | None, item_bytes: int, head: ExitHeadConfig | None = None
) -> Costs:
    """Costs as bytes of weights read, `item_bytes` for each; `head` is the exit head."""
    weights = step_weights(head, target) if head else {"path": 0, "vocabulary": 0}
    return Costs(
        layer=layer_bytes(target, item_bytes),
        head=head_bytes(target, item_bytes),
        draft=draft.layers * layer_bytes(draft, item_bytes) + head_bytes(draft, item_bytes) if draft else 0.0,
        exit_head=float(item_bytes * weights["path"]),
        exit_vocabulary=None if head is None or head.shares_vocabulary else float(item_bytes * weights["vocabulary"]),
    )


def split_over(costs: Costs, target: LlamaConfig, parts: int) -> Costs:
    """Costs where each stage of the target is split over so many devices; their sums over the devices are left out.

    Raises:
        ValueError: when layers cannot be split so.
    """
    if parts == 1:
        return costs

    def times(cost: ByRows, factor: float) -> ByRows:
        if not isinstance(cost, Mapping):
            return factor * cost
        return {rows: factor * value for rows, value in cost.items()}

    return dataclasses.replace(
        costs,
        layer=times(costs.layer, tensor_share(target, parts)),
        head=times(costs.head, 1 / parts),
        exit_vocabulary=None if costs.exit_vocabulary is None else times(costs.exit_vocabulary, 1 / parts),
    )


def calibrated_costs(
    seconds: Mapping[str, Any],
    target: LlamaConfig | None = None,
    draft: LlamaConfig | None = None,
    dtype: Any = None,
    head: ExitHeadConfig | None = None,
) -> Costs:
    """Costs as measured seconds, under the names of `Costs`: a number, or an object of numbers by rows (as in JSON).

    Args:
        seconds: as `analysis.calibration.calibrate` gives them, or written by hand. Under `measured` may stand what
            they were measured of; then it must be these models.
        target: its geometry, if it is known.
        draft: the draft's, if there is one.
        dtype: of the weights.
        head: the exit head, if there is one.

    Raises:
        ValueError: for an unknown or missing name, the draft's included where there is one, a value that is no time, or
            times of other models.
    """
    if not isinstance(seconds, Mapping):
        raise ValueError(f"a calibration is an object of seconds (the JSON of calibrate.py, read), not {seconds!r}")
    seconds = dict(seconds)
    measured = seconds.pop("measured", None)
    check_keys(seconds, Costs, "calibration")
    if draft is not None and "draft" not in seconds:
        raise ValueError(
            "the calibration lacks draft, the seconds of a step of the draft: calibrate with it (calibrate.py --draft)"
        )
    if measured is not None:
        check_measured(measured, target, draft, dtype, head)
    if head is not None and head.shares_vocabulary:
        seconds.pop("exit_vocabulary", None)

    def by_rows(name: str, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        try:
            return {int(rows): cost for rows, cost in value.items()}
        except (TypeError, ValueError):
            raise ValueError(f"cost {name} must be given by whole numbers of rows, not {list(value)}") from None

    return Costs(**{name: by_rows(name, value) for name, value in seconds.items()})


TIMED = ("width", "feed_forward", "heads", "kv_heads", "head_size", "vocab_size", "int8")
"""What a layer's time and the head's depend on, of a model's geometry."""


def check_measured(
    measured: Any,
    target: LlamaConfig | None,
    draft: LlamaConfig | None,
    dtype: Any,
    head: ExitHeadConfig | None = None,
) -> None:
    """Raise `ValueError` where a calibration says that it was measured of other models, or in another dtype."""
    if not isinstance(measured, Mapping):
        raise ValueError(f"the calibration's 'measured' must be an object, not {measured!r}")
    if dtype is not None and measured.get("dtype", str(jnp.dtype(dtype))) != str(jnp.dtype(dtype)):
        raise ValueError(
            f"the calibration was measured in {measured['dtype']}, not in {jnp.dtype(dtype)}: choose that dtype, or "
            f"calibrate again (calibrate.py --dtype {jnp.dtype(dtype)})"
        )
    for name, config, keys in (("target", target, TIMED), ("draft", draft, ("layers", *TIMED))):
        found = measured.get(name)
        if config is None or found is None:
            continue
        for key in keys:
            is_, was = getattr(config, key), found.get(key, False)
            if is_ != was:
                raise ValueError(
                    f"the calibration is of another {name}: {key} was {was}, this one's is {is_}; calibrate with this "
                    f"model (calibrate.py --{name})"
                )
    found = measured.get("exit_head")
    if head is not None and found is not None:
        # After how many layers it stands makes no difference to its time.
        here = ExitHeadConfig.from_dict({**found, "exit_layer": head.exit_layer})
        if here != head:
            raise ValueError(
                f"the calibration is of exit head {here.name.split('-', 1)[1]}, not of {head.name}: calibrate with "
                f"this one (calibrate.py --exit-layer {head.exit_layer} --exit-head {head.name}), or choose another "
                "(--exit-layer, --exit-head)"
            )


def roofline_seconds(weight_bytes: float, item_bytes: int, width: int, bandwidth: float, operations: float) -> float:
    """Seconds of a pass over weights at a batch's width: reading them, or multiplying, whichever takes longer.

    Args:
        weight_bytes: of the weights.
        item_bytes: of one weight.
        width: rows of the batch.
        bandwidth: bytes that the device reads in a second.
        operations: additions and multiplications that it makes in a second.
    """
    return max(weight_bytes / bandwidth, 2 * width * weight_bytes / item_bytes / operations)


def lockstep_tick_cost(passes: Sequence[tuple[float, int]], exchange: float = 0.0) -> float:
    """Cost of a tick of several models in lockstep (PipeSpec): the slowest one's passes, and the exchange.

    Args:
        passes: of each model, what a pass costs and how many it makes. A target of several stages passes one on.
        exchange: of the buffers.
    """
    return max(cost * count for cost, count in passes) + exchange


def layer_bytes(config: LlamaConfig, item_bytes: int) -> int:
    """Bytes of the weights of one decoder layer; `item_bytes` for each that is not int8 or a scale."""
    total = 0
    for name, shape in layer_shapes(config).items():
        fixed = fixed_dtype(config, name)
        total += math.prod(shape) * (fixed.itemsize if fixed else item_bytes)
    return total


def head_bytes(config: LlamaConfig, item_bytes: int) -> int:
    """Bytes of the LM head (of the embedding, where it is tied)."""
    return item_bytes * config.vocab_size * config.width


def stage_cost(costs: Costs, layers: int, stages: int, rows: int = 1) -> float:
    """Cost of the longest stage's layers. They are split as evenly as possible."""
    return split_layers(layers, stages).longest * at_rows(costs.layer, rows)


def tick_costs(costs: Costs, layers: int, stages: int, draft_ranks: int = 0, width: int = 1) -> TickCosts:
    """What a tick costs by the rows in it, up to `width`.

    A tick lasts as long as its slowest rank: the longest stage, or the draft's steps, on a rank of their own (without
    one they cost nothing here). The target's head is sharded by vocabulary over all ranks, after the layers, so each
    rank adds an equal part of it, in ticks in which a batch leaves.

    Args:
        costs: of each part.
        layers: of the target (L).
        stages: of the target (N).
        draft_ranks: ranks behind the target's stages.
        width: most rows of a batch.
    """
    rows = range(1, width + 1)
    ranks = stages + draft_ranks
    return TickCosts(
        stage=Curve((0.0, *(stage_cost(costs, layers, stages, count) for count in rows))),
        draft=Curve((0.0, *(at_rows(costs.draft, count) if draft_ranks else 0.0 for count in rows))),
        head=Curve((0.0, *(at_rows(costs.head, count) / ranks for count in rows))),
        exchange=costs.exchange,
    )


MOST_DRAFT_STEPS = 4
"""Bound where a draft step costs next to nothing: each also updates the tree on every rank, which is not charged."""


def draft_steps_beside_a_stage(costs: Costs, layers: int, stages: int, width: int = 1) -> int:
    """Steps of the draft that fit beside the longest stage, so that a tick does not get longer; at least 1."""
    step = at_rows(costs.draft, width)
    if not step:
        return MOST_DRAFT_STEPS
    return max(1, min(MOST_DRAFT_STEPS, int(stage_cost(costs, layers, stages, width) / step)))


def pass_cost(costs: Costs, layers: int, stages: int) -> float:
    """Cost of a tick of one model's pipe, without a draft, in which a batch of one row leaves."""
    return stage_cost(costs, layers, stages) + at_rows(costs.head, 1) / stages + costs.exchange


def pp_token_cost(costs: Costs, layers: int, stages: int) -> float:
    """Cost of a token under PP: all stages one after another at width 1, then the head, sharded over the stages."""
    return layers * at_rows(costs.layer, 1) + at_rows(costs.head, 1) / stages + stages * costs.exchange


def speedup_filled_pipe(hit_rate: float, stages: int) -> float:
    """Limit of PP's ticks over a filled pipe's for long answers: `1 / (h / n + 1 - h)`.

    Raises:
        ValueError: when the hit rate is not from 0 to 1, or there is no stage.
    """
    if not 0 <= hit_rate <= 1 or stages < 1:
        raise ValueError(f"need a hit rate from 0 to 1 and at least 1 stage, not {hit_rate!r} and {stages!r}")
    return stages / (hit_rate + (1 - hit_rate) * stages)
