"""Weights and caches onto the mesh: each device gets its stage, its slice of the vocabulary and the draft's layers.

A global array that differs between devices is their local arrays one behind the other along the first axis, so that
under `shard_map` a device sees exactly its own array. Arrays are built shard by shard for the devices this process
can address; nothing here needs to see the others, and the host has no more than one of their arrays at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoints_convert.layout import contiguous
from pipedec_jax.cache import LayerCache, empty_layers, for_platform
from pipedec_jax.config import LlamaConfig
from pipedec_jax.drafters.exit import ExitParams
from pipedec_jax.drafters.model import DraftParams
from pipedec_jax.exchange import AXES, TENSOR
from pipedec_jax.model.exit_head import ExitHead
from pipedec_jax.model.held import held_names, held_shapes
from pipedec_jax.model.parameters import Parameters, ParameterSource, fixed_dtype
from pipedec_jax.model.tensor_parallel import part_config, read_layer_part
from pipedec_jax.pipeline.split import StageSplit
from pipedec_jax.pipeline.stage import TargetParams
from pipedec_jax.vocabulary import shard_size

OWN = P(AXES)
"""Sharding of arrays that every device has its own of."""
SAME = P()
"""Sharding of arrays that are the same on every device."""


BLOCK_BYTES = 2**26
"""What is read of embedding or head at a time: they are the largest arrays, and are put together in their place."""


def make_mesh(ranks: int, devices: Sequence[jax.Device] | None = None, parts: int = 1) -> Mesh:
    """A mesh of `ranks` along the stage axis, each of `parts` devices, which follow each other.

    Raises:
        ValueError: when there are fewer devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = ranks * parts
    if len(devices) < count:
        raise ValueError(
            f"this method needs {count} devices (stages, and a rank for the draft model) but there are {len(devices)}; "
            "use fewer stages, or on CPU set XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{count} before JAX starts"
        )
    return Mesh(np.asarray(devices[:count]).reshape(ranks, parts), AXES, axis_types=(AxisType.Auto,) * 2)


def platform(mesh: Mesh) -> str:
    """What the mesh's devices are: `cpu`, `gpu` or `tpu`."""
    return mesh.devices.flat[0].platform


def least_rows(mesh: Mesh) -> int:
    """Rows of a batch that its devices compute at least; to fewer, dead ones are added.

    For one row XLA writes products with weights as multiplications and sums, except on CPU. They take longer than the
    product of two rows does: on GPUs as measured (scripts/results/accelerator.md), on TPUs by the compiler's estimate
    (scripts/results/compiled.md).
    """
    return 1 if platform(mesh) == "cpu" else 2


def row_sizes(mesh: Mesh, width: int) -> tuple[int, ...]:
    """Numbers of rows worth a program of their own in a batch of up to `width`, rising.

    On CPUs one row is a product with a vector, at about half the time of two rows; elsewhere rows are nearly free.
    """
    return (1, width) if width > 1 and platform(mesh) == "cpu" else (width,)


def only_described(mesh: Mesh) -> bool:
    """Whether the mesh's devices are not there, but described by a topology, to compile for.

    What is placed on such a mesh has shape, dtype and sharding, and no values.
    """
    return getattr(mesh.devices.flat[0].client, "runtime_type", "") == "compile_only_runtime"


def replicate(mesh: Mesh, value: Any) -> jax.Array:
    """One array, the same on every device."""
    value = np.asarray(value)
    if only_described(mesh):
        return _described(mesh, value, SAME)
    return jax.make_array_from_callback(value.shape, NamedSharding(mesh, SAME), lambda index: value[index])


def per_device(mesh: Mesh, shape: tuple[int, ...], dtype: Any, make: Callable[[int], np.ndarray]) -> jax.Array:
    """An array that each device has its own of: `make(index)` gives the local array of that `shape`."""
    whole = (shape[0] * mesh.size, *shape[1:])
    if only_described(mesh):
        return _described(mesh, jax.ShapeDtypeStruct(whole, dtype), OWN)

    def shard(index: Any) -> np.ndarray:
        return contiguous(make((index[0].start or 0) // shape[0])).astype(dtype, copy=False)

    return jax.make_array_from_callback(whole, NamedSharding(mesh, OWN), shard)


def zeros(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros that each device has its own of."""
    return per_device(mesh, shape, dtype, lambda _: np.zeros(shape, dtype))


def place_target(mesh: Mesh, source: ParameterSource, split: StageSplit, dtype: Any) -> TargetParams:
    """Read the target's weights, each device's part alone, and put them on the mesh in `dtype`; int8 stays."""
    parts = mesh.shape[TENSOR]
    config = part_config(source.config, parts)

    def put(index: int, stored: Sequence[str], shape: tuple[int, ...], dtype: Any) -> jax.Array:
        def make(device: int) -> np.ndarray:
            rank, part = divmod(device, parts)
            if rank < split.stages and index < split.count[rank]:
                layer = split.first[rank] + index
                arrays = [read_layer_part(source, layer, name, parts, part) for name in stored]
                return _side_by_side(arrays, shape, dtype)
            return np.zeros(shape, dtype)

        return per_device(mesh, shape, dtype, make)

    layers = tuple(_held_layer(config, dtype, functools.partial(put, index)) for index in range(split.longest))
    embedding, head = place_vocabulary(mesh, source, dtype)
    final_norm = replicate(mesh, source.read("final_norm").astype(dtype))
    return TargetParams(layers=layers, final_norm=final_norm, embedding=embedding, head=head)


def place_draft(mesh: Mesh, source: ParameterSource, dtype: Any) -> DraftParams:
    """Read the draft's weights and put them on every rank in `dtype`; int8 stays."""
    config = source.config
    layers = tuple(
        _replicated_layer(mesh, config, dtype, lambda name, layer=layer: source.read(f"layers/{layer}/{name}"))
        for layer in range(config.layers)
    )
    embedding = replicate(mesh, source.read("embedding").astype(dtype))
    head = None if config.tied_embeddings else replicate(mesh, source.read("head").T.astype(dtype))
    final_norm = replicate(mesh, source.read("final_norm").astype(dtype))
    return DraftParams(layers=layers, final_norm=final_norm, embedding=embedding, head=head)


def place_exit_head(
    mesh: Mesh, head: ExitHead, source: ParameterSource, dtype: Any, target: TargetParams | None = None
) -> ExitParams:
    """Put an exit head on the mesh in `dtype`: its vocabulary's matrix in slices, the rest on every rank.

    What it has not of its own is the target's: of `target`, where that is on the mesh, else read from `source`.
    """
    final_norm = source.read("final_norm") if head.config.variant == "target" else head.params["final_norm"]
    if "head" in head.params:
        matrix_RV, width = head.params["head"], head.config.model(source.config).width
        matrix = place_rows(mesh, source.config.vocab_size, width, dtype, lambda rows: matrix_RV[:, rows].T)
    elif target is not None:
        matrix = target.output
    else:
        embedding, own = place_vocabulary(mesh, source, dtype)
        matrix = embedding if own is None else own
    before: Parameters = {
        name: replicate(mesh, np.asarray(value).astype(dtype))
        for name, value in head.params.items()
        if name not in ("layers", "final_norm", "head")
    }
    if "layers" in head.params:
        block = head.params["layers"]["0"]
        layer = _replicated_layer(mesh, head.config.model(source.config), dtype, lambda name: np.asarray(block[name]))
        before["layers"] = {"0": layer}
    return ExitParams(layers=before, final_norm=replicate(mesh, np.asarray(final_norm).astype(dtype)), head=matrix)


def _replicated_layer(
    mesh: Mesh, config: LlamaConfig, dtype: Any, read: Callable[[str], np.ndarray]
) -> dict[str, jax.Array]:
    """A whole layer on every device: `read` gives the stored arrays by name."""

    def put(stored: Sequence[str], shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return replicate(mesh, _side_by_side([read(name) for name in stored], shape, dtype))

    return _held_layer(config, dtype, put)


def _held_layer(
    config: LlamaConfig, dtype: Any, put: Callable[[Sequence[str], tuple[int, ...], Any], jax.Array]
) -> dict[str, jax.Array]:
    """A layer as devices hold it, each array made by `put` of the stored ones' names, its shape and its dtype."""
    shapes = held_shapes(config)
    return {
        name: put(stored, shapes[name], fixed_dtype(config, stored[0]) or dtype)
        for name, stored in held_names(config).items()
    }


def place_vocabulary(mesh: Mesh, source: ParameterSource, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """Embedding and head `[Vr, D]` per device; no head when they are tied."""
    every, sizes = slice(None), (source.config.vocab_size, source.config.width)
    embedding = place_rows(mesh, *sizes, dtype, lambda rows: source.read("embedding", (rows, every)))
    if source.config.tied_embeddings:
        return embedding, None
    return embedding, place_rows(mesh, *sizes, dtype, lambda rows: source.read("head", (every, rows)).T)


def place_rows(mesh: Mesh, vocab_size: int, width: int, dtype: Any, read: Callable[[slice], np.ndarray]) -> jax.Array:
    """A matrix over the vocabulary, each device's slice of its rows: `[Vr, width]`, zeros past its end."""
    rows = shard_size(vocab_size, mesh.size)
    block = max(1, BLOCK_BYTES // (width * np.dtype(dtype).itemsize))

    def make(device: int) -> np.ndarray:
        part = _aligned((rows, width), np.dtype(dtype))
        first, end = (min(device * rows + offset, vocab_size) for offset in (0, rows))
        for start in range(first, end, block):
            stop = min(start + block, end)
            part[start - first : stop - first] = contiguous(read(slice(start, stop))).astype(dtype, copy=False)
        part[end - first :] = 0
        return part

    return per_device(mesh, (rows, width), dtype, make)


def _side_by_side(arrays: Sequence[np.ndarray], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Stored arrays in `dtype` as the one of this shape that devices hold."""
    if len(arrays) == 1:
        return contiguous(arrays[0].reshape(shape)).astype(dtype, copy=False)
    joined, start = _aligned(shape, np.dtype(dtype)), 0
    for array in arrays:
        flat = array.reshape(*shape[:-1], -1)
        joined[..., start : start + flat.shape[-1]] = contiguous(flat)
        start += flat.shape[-1]
    return joined


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An uninitialised array that a CPU device can take over as its own: those that start elsewhere are copied."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def cache_maker(
    mesh: Mesh, config: LlamaConfig, layers: int, capacity: int, dtype: Any
) -> Callable[[], tuple[LayerCache, ...]]:
    """A function that makes empty caches for `layers` layers of every rank, on the devices."""
    part = part_config(config, mesh.shape[TENSOR])
    shapes = jax.eval_shape(lambda: for_platform(empty_layers(part, layers, capacity, dtype), platform(mesh)))

    def make() -> tuple[LayerCache, ...]:
        return jax.tree.map(lambda one: jnp.zeros((one.shape[0] * mesh.size, *one.shape[1:]), one.dtype), shapes)

    return maker(mesh, make)


def maker(mesh: Mesh, make: Callable[[], Any]) -> Callable[[], Any]:
    """A traceable function, compiled once, that makes a pytree of arrays that every device has its own of."""
    if only_described(mesh):
        described = jax.tree.map(lambda leaf: _described(mesh, leaf, OWN), jax.eval_shape(make))
        return lambda: described
    return jax.jit(make, out_shardings=NamedSharding(mesh, OWN))


def _described(mesh: Mesh, like: Any, spec: P) -> Any:
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=NamedSharding(mesh, spec))


def bytes_per_device(tree: Any) -> dict[jax.Device, int]:
    """Bytes that the arrays of a pytree hold on each device this process can address; shared arrays count once."""
    total: dict[jax.Device, int] = {}
    seen: set[int] = set()
    for leaf in jax.tree.leaves(tree):
        if id(leaf) in seen:
            continue
        seen.add(id(leaf))
        for shard in leaf.addressable_shards:
            total[shard.device] = total.get(shard.device, 0) + shard.data.nbytes
    return total
