"""One device's share of the target: its stage's layers over the rows it received, and its slices of the vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from pipedec_jax import vocabulary
from pipedec_jax.cache import LayerCache, Rows, at_least, over_layers
from pipedec_jax.config import LlamaConfig
from pipedec_jax.exchange import AXIS, sum_over_parts, vary
from pipedec_jax.model import llama
from pipedec_jax.model.held import HeldModel
from pipedec_jax.model.tensor_parallel import part_config
from pipedec_jax.pipeline.split import StageSplit
from pipedec_jax.sampling import SamplingArrays, SamplingMode
from pipedec_jax.tick_costs import few_rows, over_live_rows


class TargetParams(HeldModel):
    """The target's weights as one device holds them: its rows of the vocabulary (Vr), and the layers of its stage.

    Of a split stage it has its part of each layer. Layers are padded to the longest stage; they are zeros on padding
    and on the drafter's ranks. The last norm is replicated.
    """


StageCache = tuple[LayerCache, ...]
"""One cache per layer of the stage, padding included."""


@dataclasses.dataclass(frozen=True)
class Target:
    """The target's static description."""

    config: LlamaConfig
    split: StageSplit
    vocab_size: int
    """Ids that are tokens; padding rows of embedding and head beyond it are never chosen."""
    parts: int = 1
    """Devices over which each stage is split (T)."""
    least_rows: int = 1
    """Rows that are computed at least (`placement.least_rows`)."""


def run_stage(
    target: Target, params: TargetParams, cache: StageCache, rows: Rows, x: jax.Array
) -> tuple[StageCache, jax.Array]:
    """This rank's layers over `x [W, D]`, which is the same on all devices of a stage.

    Layers are unrolled, each with a cache of its own: scanned, the whole cache would be copied every tick on CPU.
    A stage shorter than the longest skips its padding.
    """
    count = jnp.asarray(target.split.count, jnp.int32)
    mine = count[jnp.minimum(lax.axis_index(AXIS), target.split.stages - 1)]
    config = part_config(target.config, target.parts)
    W = x.shape[0]
    rows, x = at_least(target.least_rows, rows, x)
    rope = llama.rope_tables(config, rows.position, x.dtype)
    total = {"total": sum_over_parts} if target.parts > 1 else {}

    def step(index: int, cache: LayerCache, rows: Rows, x: jax.Array) -> tuple[LayerCache, jax.Array]:
        def run(cache: LayerCache, x: jax.Array) -> tuple[LayerCache, jax.Array]:
            x, cache = llama.forward_layer(config, params.layers[index], x, rope, cache.attend(rows), **total)
            return cache, x

        if index < target.split.shortest:
            return run(cache, x)
        return lax.cond(index < mine, run, lambda cache, x: (cache, x), cache, x)

    with jax.named_scope("stage"):
        cache, x = over_layers(cache, rows, step, x)
    return cache, x[:W]


class Beside(struct.PyTreeNode):
    """Rows that go through the target's head in one product with those that leave the last stage."""

    x: jax.Array
    """[W, D]"""
    norm: jax.Array
    """[D]: their norm's weights."""
    live: jax.Array
    """[W] bool: which of them count."""


def run_head(
    target: Target,
    params: TargetParams,
    mode: SamplingMode,
    sampling: SamplingArrays,
    hidden_WD: jax.Array,
    position_W: jax.Array,
    live_W: jax.Array,
    sizes: Sequence[int],
    beside: Beside | None = None,
) -> tuple[vocabulary.ChoicePart, jax.Array | None]:
    """This device's part of the target's choices for rows that leave the last stage; skipped when none is alive.

    Args:
        target: static description.
        params: this device's.
        mode: how tokens are drawn, at compile time.
        sampling: the same at run time.
        hidden_WD: of the rows, after the last layer.
        position_W: of the tokens being drawn.
        live_W: which rows count.
        sizes: as for `tick_costs.over_live_rows`, of the rows beside too.
        beside: other rows that need the head in this tick.

    Returns:
        The part, and this device's logits `[W, Vr]` of the rows beside.
    """
    W, norm = hidden_WD.shape[0], params.final_norm
    x, live, own = hidden_WD, live_W, jnp.ones(W, bool)
    if beside is not None:
        x, live = jnp.concatenate((x, beside.x)), jnp.concatenate((live, beside.live))
        own = jnp.concatenate((own, ~own))

    def head(_: None, rows: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        x, own = rows
        weights = norm if beside is None else jnp.where(own[:, None], norm, beside.norm)
        size, least = target.vocab_size, target.least_rows
        return None, vocabulary.head_part(target.config, weights, params.output, x, size, least)

    def draw(_: None, rows: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        return None, vocabulary.noise_part(sampling, *rows, target.vocab_size)

    _, logit = over_live_rows(sizes, live, head, None, (x, own))
    noise = jnp.zeros_like(logit[:W])
    if mode.sampled:
        _, noise = over_live_rows(few_rows(W), live_W, draw, None, (noise, position_W))
    part = vocabulary.choice_part(mode, sampling, logit[:W], noise, target.vocab_size, live_W)
    return part, None if beside is None else logit[W:]


def run_stage_where(
    active: jax.Array, target: Target, params: TargetParams, cache: StageCache, rows: Rows, x: jax.Array
) -> tuple[StageCache, jax.Array]:
    """`run_stage` where `active`; otherwise `x` and the cache pass unchanged."""

    def run(cache: StageCache, x: jax.Array) -> tuple[StageCache, jax.Array]:
        return run_stage(target, params, cache, rows, x)

    return lax.cond(active, run, lambda cache, x: (cache, x), cache, vary(x))
