"""Bytes of weights and caches on each device, before anything is loaded.

For this engine's methods they are what `Engine.bytes_per_device` reports: one program runs on every rank, so every
rank has arrays of the same shapes, as long as the longest stage, the draft's weights and cache among them. What
programs need for a while (activations, prefill's chunk) is not in it, nor what JAX and the driver keep for themselves.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.exit_head import ExitHeadConfig, head_shapes
from pipedec_jax.model.tensor_parallel import part_config
from pipedec_jax.modeled.cost import head_bytes, layer_bytes
from pipedec_jax.pipeline.fit import cache_slots
from pipedec_jax.pipeline.methods import make_split
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.pipeline.split import split_layers
from pipedec_jax.vocabulary import shard_size


def cache_bytes(config: LlamaConfig, slots: int, item_bytes: int) -> int:
    """Bytes of one layer's keys and values."""
    return 2 * slots * config.kv_heads * config.head_size * item_bytes


def draft_bytes(draft: LlamaConfig, slots: int, item_bytes: int) -> dict[str, int]:
    """Bytes of a whole draft model on a device, by part; its embedding once where it is its head as well."""
    matrices = 1 if draft.tied_embeddings else 2
    return {
        "draft layers": draft.layers * layer_bytes(draft, item_bytes),
        "draft embedding and head": matrices * head_bytes(draft, item_bytes),
        "draft cache": draft.layers * cache_bytes(draft, slots, item_bytes),
    }


def engine_bytes(
    settings: EngineSettings,
    target: LlamaConfig,
    draft: LlamaConfig | None,
    context: int,
    head: ExitHeadConfig | None = None,
) -> dict[str, int]:
    """Bytes on every device of a method of this engine, by part, as `Engine.bytes_per_device` names them.

    Args:
        settings: of the engine; their dtype is that of weights and caches.
        target: its geometry.
        draft: of the draft model on a rank of its own; `None` for PP and for an exit.
        context: tokens of prompt and answer together. The cache has place for the tree as well, and is rounded up.
        head: the exit head.

    Raises:
        ValueError: when the layers cannot be split so, or a capacity that was given does not suffice.
    """
    item = jnp.dtype(settings.dtype).itemsize
    longest = make_split(settings, target, head).longest
    slots = cache_slots(settings, context)
    part = part_config(target, settings.tensor_parallel)
    devices = (settings.stages + (draft is not None)) * settings.tensor_parallel
    if draft is not None:
        drafter = draft_bytes(draft, slots, item)
    elif head is not None:
        drafter = _exit_bytes(head, target, slots, devices, item)
    else:
        drafter = {"draft layers": 0, "draft embedding and head": 0, "draft cache": 0}
    return {
        "target layers": longest * layer_bytes(part, item),
        "embedding and head": _vocabulary_bytes(target, devices, item),
        "target cache": longest * cache_bytes(part, slots, item),
        **drafter,
    }


def _exit_bytes(head: ExitHeadConfig, target: LlamaConfig, slots: int, ranks: int, item_bytes: int) -> dict[str, int]:
    """An exit head as every device holds it: its vocabulary's matrix in slices, if it has one of its own."""
    shapes = head_shapes(head, target)
    own = sum(math.prod(shape) for name, shape in shapes.items() if name not in ("final_norm", "head"))
    matrix = shapes["head"][0] * shard_size(target.vocab_size, ranks) if "head" in shapes else 0
    return {
        "draft layers": item_bytes * own,
        "draft embedding and head": item_bytes * matrix,
        "draft cache": cache_bytes(target, slots, item_bytes) if head.variant == "block" else 0,
    }


def _vocabulary_bytes(config: LlamaConfig, ranks: int, item_bytes: int) -> int:
    """Embedding and head, sliced over the ranks."""
    part = dataclasses.replace(config, vocab_size=shard_size(config.vocab_size, ranks))
    return (1 if config.tied_embeddings else 2) * head_bytes(part, item_bytes)


def tensor_bytes(
    target: LlamaConfig, stages: int, tensor: int, slots: int, item_bytes: int, draft: LlamaConfig | None = None
) -> dict[str, int]:
    """Bytes on the fullest device where each of `stages` stages is split over `tensor` devices, by part.

    A draft model, where there is one, is whole on every device.
    """
    longest, part = split_layers(target.layers, stages).longest, part_config(target, tensor)
    found = {
        "target layers": longest * layer_bytes(part, item_bytes),
        "embedding and head": _vocabulary_bytes(target, stages * tensor, item_bytes),
        "target cache": longest * cache_bytes(part, slots, item_bytes),
    }
    return found | (draft_bytes(draft, slots, item_bytes) if draft else {})
