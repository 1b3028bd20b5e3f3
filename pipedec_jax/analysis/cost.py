"""Modeled time: what a tick costs beside what plain pipeline parallelism (PP) pays for a token.

Ticks are not time. A tick lasts as long as its slowest rank, while PP's token costs the sum of its stages at width 1;
with uneven stages, or a draft heavier than a stage, a ratio of ticks flatters. Decoding is bound by reading weights,
so by default a part costs the bytes of weights it reads. Measured seconds may take their place.

Left out on purpose: caches, activations, the few embedding rows, and that ticks without a row to finish skip the head
(which makes a real tick a little cheaper than here).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from pipedec_jax.config import LlamaConfig, check_keys
from pipedec_jax.model.parameters import layer_shapes
from pipedec_jax.pipeline.split import split_layers


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one pass of each part costs, all in one unit (bytes read, or seconds)."""

    layer: float
    """One layer of the target, at the width of a tick's batch."""
    head: float
    """The target's whole LM head, at that width, on one device."""
    pp_layer: float
    """One layer of the target at width 1."""
    pp_head: float
    """The target's whole LM head at width 1, on one device."""
    draft: float = 0.0
    """One step of the draft: all its layers and its LM head."""
    exchange: float = 0.0
    """What a tick adds to its ranks' work: sending activations, and the bookkeeping of the tree."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"cost {name} must be a finite number >= 0, not {value!r}")
        if self.pp_layer == 0:
            raise ValueError("cost pp_layer must be over 0")


def byte_costs(target: LlamaConfig, draft: LlamaConfig | None, item_bytes: int) -> Costs:
    """Costs as bytes of weights read, `item_bytes` for each. The same at any width."""
    return Costs(
        layer=layer_bytes(target, item_bytes),
        head=head_bytes(target, item_bytes),
        pp_layer=layer_bytes(target, item_bytes),
        pp_head=head_bytes(target, item_bytes),
        draft=draft.layers * layer_bytes(draft, item_bytes) + head_bytes(draft, item_bytes) if draft else 0.0,
    )


def calibrated_costs(seconds: Mapping[str, float]) -> Costs:
    """Costs as measured seconds, under the names of `Costs`.

    Raises:
        ValueError: for an unknown or missing name, or a value that is no time.
    """
    check_keys(dict(seconds), Costs, "calibration")
    return Costs(**seconds)


def costs_at_width(measured: Mapping[int, Costs], width: float) -> Costs:
    """Costs at a batch's width, from costs measured at several: linear between them, the nearest one's beyond.

    Verifying more tokens is not free where decoding is no longer bound by reading weights.

    Raises:
        ValueError: when nothing was measured.
    """
    if not measured:
        raise ValueError("costs of at least one width are needed")
    widths = sorted(measured)
    names = [field.name for field in dataclasses.fields(Costs)]
    return Costs(
        **{
            name: float(np.interp(width, widths, [getattr(measured[known], name) for known in widths]))
            for name in names
        }
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
    """Bytes of the weights of one decoder layer."""
    return item_bytes * sum(math.prod(shape) for shape in layer_shapes(config).values())


def head_bytes(config: LlamaConfig, item_bytes: int) -> int:
    """Bytes of the LM head (of the embedding, where it is tied)."""
    return item_bytes * config.vocab_size * config.width


def tick_cost(costs: Costs, layers: int, stages: int, draft_ranks: int = 0, draft_steps: int = 1) -> float:
    """Cost of a tick: its slowest rank, the head's slice and the exchange.

    Layers are split as evenly as possible, so the slowest stage is the longest. The target's head is sharded by
    vocabulary over all ranks, after the layers, so each rank adds an equal part of it. The draft, with a rank of its
    own, runs beside the stages, head included; without one it costs nothing here.

    Args:
        costs: of each part.
        layers: of the target (L).
        stages: of the target (N).
        draft_ranks: ranks behind the target's stages.
        draft_steps: steps of the draft in a tick.
    """
    longest = split_layers(layers, stages).longest * costs.layer
    drafting = draft_steps * costs.draft if draft_ranks else 0.0
    return max(longest, drafting) + costs.head / (stages + draft_ranks) + costs.exchange


def static_tick_cost(costs: Costs, layers: int, stages: int, draft_ranks: int = 0, draft_steps: int = 1) -> float:
    """Mean cost of a tick where a static tree is drafted first, and then goes through the stages alone (STPP).

    Of N + 1 ticks one drafts while the stages idle and N pass the tree on, the last of which needs the head. Beside the
    first stage the draft takes in what it has not yet of the tree, for which it needs at most as many steps again.
    """
    longest = split_layers(layers, stages).longest * costs.layer
    drafting = draft_steps * costs.draft if draft_ranks else 0.0
    passing = max(longest, drafting) + (stages - 1) * longest + costs.head / (stages + draft_ranks)
    return (drafting + passing) / (stages + 1) + costs.exchange


MOST_DRAFT_STEPS = 4
"""Bound where a draft step costs next to nothing: each also updates the tree on every rank, which is not charged."""


def draft_steps_beside_a_stage(costs: Costs, layers: int, stages: int) -> int:
    """Steps of the draft that fit beside the longest stage, so that a tick does not get longer; at least 1."""
    if not costs.draft:
        return MOST_DRAFT_STEPS
    return max(1, min(MOST_DRAFT_STEPS, int(split_layers(layers, stages).longest * costs.layer / costs.draft)))


def pp_token_cost(costs: Costs, layers: int, stages: int) -> float:
    """Cost of a token under PP: all stages one after another at width 1, then the head, sharded over the stages."""
    return layers * costs.pp_layer + costs.pp_head / stages + stages * costs.exchange


def modeled_speedup_vs_pp(
    costs: Costs,
    layers: int,
    stages: int,
    ticks_per_token: float,
    draft_ranks: int = 1,
    draft_steps: int = 1,
    static: bool = False,
) -> float:
    """How many times faster than PP on as many target stages: PP's token over (tick times ticks per token).

    `static` is for trees that are drafted while the stages wait (`static_tick_cost`).
    """
    if not ticks_per_token > 0:
        raise ValueError(f"ticks_per_token must be over 0, not {ticks_per_token!r}")
    tick = (static_tick_cost if static else tick_cost)(costs, layers, stages, draft_ranks, draft_steps)
    return pp_token_cost(costs, layers, stages) / (tick * ticks_per_token)


def ticks_filled_pipe(stages: int, hits: int, misses: int) -> int:
    """Ticks of an answer when every hit is on time: the fill, one per hit, a refill per miss.

    Hits and misses are counted after every token but the last, so the answer has `hits + misses + 1` tokens.
    """
    return stages + hits + stages * misses


def speedup_filled_pipe(hit_rate: float, stages: int) -> float:
    """Limit of PP's ticks over a filled pipe's for long answers: `1 / (h / n + 1 - h)`.

    Raises:
        ValueError: when the hit rate is not from 0 to 1, or there is no stage.
    """
    if not 0 <= hit_rate <= 1 or stages < 1:
        raise ValueError(f"need a hit rate from 0 to 1 and at least 1 stage, not {hit_rate!r} and {stages!r}")
    return stages / (hit_rate + (1 - hit_rate) * stages)
