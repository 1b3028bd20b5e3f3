"""A method's programs for devices that are only described: built, compiled and reported, with nothing run.

For TPUs this takes an environment of its own with the `tpu` extra, and no TPU; for GPUs one with `jax[cuda13]`, and no
GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pipedec_jax.analysis.compiled import ShapeSource, report, shape_head
from pipedec_jax.checks import check_count
from pipedec_jax.config import LlamaConfig
from pipedec_jax.decoding.devices import decoding_dtype
from pipedec_jax.hierarchy.engine import HierarchyEngine
from pipedec_jax.hierarchy.settings import HierarchySettings
from pipedec_jax.model.exit_head import ExitHeadConfig
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.settings import EXIT_ONLY, EngineSettings
from pipedec_jax.pipeline.stage import TargetParams

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
}
platform_name: "CUDA"
runtime_version { major: 13 minor: 0 patch: 0 }
dnn_version_info { major: 9 minor: 7 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""An H100's properties, as XLA's compiler takes them (its `GpuTargetConfigProto`)."""
GPUS = {"h100": H100}
"""Of GPUs, by their name in a topology: `h100:8` is eight of them in one host, `h100:2x8` two such hosts."""
MEMORY = {"TPU v5 lite": 16, "TPU v5": 95, "TPU v5p": 95, "TPU v4": 32, "TPU v6 lite": 32, "TPU7x": 192}
MEMORY |= {"NVIDIA H100 80GB HBM3": 79}
"""Gigabytes (2^30 bytes) of memory of a device, by its kind."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What methods are compiled with, each taking what it knows."""

    stages: int
    """Of the target (N)."""
    tensor_parallel: int = 1
    idle_ranks: int = 0
    """Of all methods but hierarchies."""
    width: int = 16
    children: int = 16
    draft_steps: int = 1
    """Of best-first."""
    depth: int = 4
    """Of stpp."""
    drafter: str = "model"
    """Of stpp, pipedec and best-first."""
    exit_layer: int | None = None
    """Of ppsd and eesd; an eighth of the layers by default."""
    exit_head: str = "block"
    passes: int = 4
    """Of each smaller model of a hierarchy in a tick."""
    context: int = 4096
    """Tokens of prompt and answer."""
    dtype: str = "bfloat16"


def described_devices(topology: str, platform: str | None = None) -> list[Any]:
    """The devices of a topology: TPUs such as `v5e:4x4`, or GPUs as in `GPUS`.

    Raises:
        ValueError: when it is not known, or its compiler is missing.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server is asked what this machine is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several may compile at once: none uses a device
    from jax.experimental import topologies

    gpu = re.fullmatch(r"(\w+):(?:(\d+)x)?(\d+)", topology)
    options: dict[str, Any] = {"topology_name": topology}
    if gpu and gpu[1] in GPUS:
        platform, options = "cuda", {"topology": f"1x{gpu[2] or 1}x{gpu[3]}", "target_config": GPUS[gpu[1]]}
    try:
        return list(topologies.get_topology_desc(platform=platform or "tpu", **options).devices)
    except Exception as error:  # the compiler's own errors have no common type
        raise ValueError(
            f"topology {topology!r} of {platform or 'tpu'!r} cannot be compiled for: {error}; for TPUs, pip install "
            f"'jax[tpu]' in an environment of its own; for GPUs ({', '.join(GPUS)}, such as h100:8) 'jax[cuda13]'"
        ) from error


def compile_method(
    method: str, sizes: Sizes, target: LlamaConfig, draft: LlamaConfig | None, devices: Sequence[Any]
) -> list[dict[str, Any]]:
    """A method's prefill and ticks.

    Args:
        method: one of `pipeline.settings.METHODS`.
        sizes: what it is compiled with.
        target: its geometry.
        draft: of the draft model, where the method and `sizes.drafter` take one.
        devices: described or real; the first stage's first.

    Returns:
        For each the fields of `compiled.Report`, and `method`, `program`, `both_compiled_s` (seconds that the two took
        together), `both_processor_s` (of processor time) and `floor_bytes` (`weight_floor`).

    Raises:
        ValueError: when sizes, models and devices do not fit together, or the compiler refuses.
    """
    engine = described_engine(method, sizes, target, draft, devices)
    programs, seconds = _timed(lambda: engine.programs(sizes.context))
    local = engine.new_local(engine.capacity_for(sizes.context))
    held = (engine.weights, local.cache, local.drafter)
    named = {"prefill": programs.prefill, "ticks": programs.run}
    return _rows(method, named, held, seconds, weight_floor(engine))


def compile_hierarchy(
    method: str, sizes: Sizes, target: LlamaConfig, smaller: Sequence[LlamaConfig], devices: Sequence[Any]
) -> list[dict[str, Any]]:
    """The same for a hierarchy, each of whose models has programs of its own; a smaller one is on one device.

    A `ticks` row is a pass, of which a model makes several in a tick of the hierarchy.

    Raises:
        ValueError: when sizes, models and devices do not fit together, or the compiler refuses.
    """
    if sizes.tensor_parallel > 1:
        raise ValueError(f"{method} does not split a stage: leave out --tensor-parallel")
    configs = [*smaller, target]
    _check_context(sizes, target)
    settings = HierarchySettings(
        method=method,
        stages=(*[1] * len(smaller), sizes.stages),
        passes=(sizes.passes,) * len(smaller),
        dtype=decoding_dtype(sizes.dtype, sizes.dtype, devices[0]),
    )
    vocabulary = min(config.vocab_size for config in configs)
    engine = HierarchyEngine([ShapeSource(c) for c in configs], settings, vocab_size=vocabulary, devices=devices)
    rows = []
    for index, model in enumerate(engine.models):
        programs, seconds = _timed(functools.partial(engine.programs, sizes.context, index))
        held = (model.weights, model.new_local(engine.capacity_for(sizes.context)).cache)
        name = f"model {index}" if index < len(smaller) else "target"
        floor = _bytes((model.weights.layers, model.weights.output))
        rows += _rows(f"{method}, {name}", {"prefill": programs.prefill, "ticks": programs.step}, held, seconds, floor)
    return rows


def described_engine(
    method: str, sizes: Sizes, target: LlamaConfig, draft: LlamaConfig | None, devices: Sequence[Any]
) -> Engine:
    """The engine of a method whose models have shapes and no weights."""
    exits, chain = method in EXIT_ONLY, method in ("pp", *EXIT_ONLY)
    layer = sizes.exit_layer if exits else None
    if exits and layer is None:
        layer = max(1, target.layers // 8)
    settings = EngineSettings(
        method=method,
        stages=sizes.stages,
        tensor_parallel=sizes.tensor_parallel,
        idle_ranks=sizes.idle_ranks,
        width=1 if chain else sizes.width,
        children=1 if chain else sizes.children,
        draft_steps=sizes.draft_steps if method == "best-first" else 1,
        depth=sizes.depth,
        exit_layer=layer,
        dtype=decoding_dtype(sizes.dtype, sizes.dtype, devices[0]),
    )
    drafter = "model" if chain else sizes.drafter
    models = not chain and drafter != "ngram"
    if models and draft is None:
        raise ValueError(f"{method} with --drafter {drafter} needs --draft CONFIG")
    _check_context(sizes, target)
    return Engine(
        ShapeSource(target),
        ShapeSource(draft) if models and draft else None,
        settings,
        vocab_size=min(config.vocab_size for config in (target, draft) if config is not None),
        devices=devices,
        drafter=drafter,
        exit_head=shape_head(ExitHeadConfig(layer, sizes.exit_head), target) if layer else None,
    )


def weight_floor(engine: Engine) -> int:
    """Bytes of weights that the rank with most to read has to read in a tick, the draft's steps included."""
    target: TargetParams = engine.weights.target
    drafter = engine.weights.drafter
    stage, drafting = _bytes(target.layers), 0
    if engine.target.split.exit:
        return stage + _bytes(drafter.layers) + _bytes((target.output, drafter.head))
    if drafter is not None and engine.settings.steps:
        head = drafter.embedding if drafter.head is None else drafter.head
        drafting = engine.settings.steps * _bytes((drafter.layers, head))
    return max(stage, drafting) + _bytes(target.output)


def _check_context(sizes: Sizes, target: LlamaConfig) -> None:
    check_count("context", sizes.context)
    if sizes.context > target.context:
        raise ValueError(f"context ({sizes.context}) exceeds the target's {target.context} tokens: lower --context")


def _timed(make: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What compiling gives, and its seconds by the clock and of the processor."""
    begun, used = time.perf_counter(), time.process_time()
    try:
        made = make()
    except jax.errors.JaxRuntimeError as error:  # such as where a slice has to be used whole
        raise ValueError(f"the compiler refuses: {error}") from error
    seconds = {"both_compiled_s": time.perf_counter() - begun, "both_processor_s": time.process_time() - used}
    return made, seconds


def _rows(
    method: str, programs: dict[str, Any], held: Any, seconds: dict[str, float], floor: int
) -> list[dict[str, Any]]:
    return [
        dataclasses.asdict(report(program, held)) | {"method": method, "program": name, "floor_bytes": floor} | seconds
        for name, program in programs.items()
    ]


def _bytes(tree: Any) -> int:
    """Of the arrays of a pytree on a device, one that is there twice once."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves)
