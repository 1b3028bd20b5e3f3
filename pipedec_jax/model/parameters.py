"""The Flax parameter tree of a LLaMA model: names, shapes, initialisation and where arrays are read from.

The tree is a nested dictionary. `layers` holds one entry per decoder layer under its number as a string, so that
a stored checkpoint knows nothing of stages:

    embedding [V, D]   final_norm [D]   head [D, V] (absent when the embedding is tied)
    layers/I/attention_norm [D]   layers/I/query [D, H, A]   layers/I/key [D, G, A]   layers/I/value [D, G, A]
    layers/I/output [H, A, D]     layers/I/feed_forward_norm [D]
    layers/I/gate [D, F]          layers/I/up [D, F]          layers/I/down [F, D]

Matrices are stored input dimension first, as Flax does (PyTorch stores them the other way round). In a model of int8
layers (`LlamaConfig.int8`) each matrix of a layer is int8 and followed by its scales, one per output channel, float32:

    query_scale [H, A]   key_scale, value_scale [G, A]   output_scale, down_scale [D]   gate_scale, up_scale [F]

Where matrices add a bias (`LlamaConfig.attention_bias`, `feed_forward_bias`), `query_bias` and so on follow them, of
their scales' shapes and the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pipedec_jax.config import LlamaConfig

Parameters = dict[str, Any]
"""A nested dictionary of arrays, as described at the top of this module."""

Part = tuple[slice, ...]
"""A part of an array: a slice of step 1 for every axis."""


SCALE = "_scale"
"""Ends the names of an int8 matrix's scales."""
BIAS = "_bias"
"""Ends the names of a matrix's biases."""
ATTENTION = ("query", "key", "value", "output")
FEED_FORWARD = ("gate", "up", "down")
MATRICES = ATTENTION + FEED_FORWARD
"""Names of a layer's matrices."""


def layer_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of one decoder layer, in the order they are used."""
    D, F = config.width, config.feed_forward
    H, G, A = config.heads, config.kv_heads, config.head_size
    shapes = {
        "attention_norm": (D,),
        "query": (D, H, A),
        "key": (D, G, A),
        "value": (D, G, A),
        "output": (H, A, D),
        "feed_forward_norm": (D,),
        "gate": (D, F),
        "up": (D, F),
        "down": (F, D),
    }
    biased = ATTENTION * config.attention_bias + FEED_FORWARD * config.feed_forward_bias
    every = {}
    for name, shape in shapes.items():
        every[name] = shape
        ends = [SCALE] * (config.int8 and name in MATRICES) + [BIAS] * (name in biased)
        every |= {name + end: shape[input_axes(name) :] for end in ends}
    return every


def matrix_and_end(name: str) -> tuple[str, str]:
    """The matrix that scales or biases belong to, and which they are: `SCALE`, `BIAS`; any other array and ''."""
    end = next((end for end in (SCALE, BIAS) if name.endswith(end)), "")
    return name.removesuffix(end), end


def input_axes(path: str) -> int:
    """Leading axes of a matrix that are summed over: `output [H, A, D]` has two, the others one."""
    return 2 if path.rsplit("/", 1)[-1] == "output" else 1


def fixed_dtype(config: LlamaConfig, path: str) -> np.dtype[Any] | None:
    """The dtype that an array has whatever the model's is: int8, float32 for scales; None for all others."""
    if not config.int8:
        return None
    name = path.rsplit("/", 1)[-1]
    if name in MATRICES:
        return np.dtype(np.int8)
    return np.dtype(np.float32) if name.endswith(SCALE) else None


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all arrays under their path, such as `layers/3/query`, in model order."""
    V, D = config.vocab_size, config.width
    shapes: dict[str, tuple[int, ...]] = {"embedding": (V, D)}
    for layer in range(config.layers):
        for name, shape in layer_shapes(config).items():
            shapes[f"layers/{layer}/{name}"] = shape
    shapes["final_norm"] = (D,)
    if not config.tied_embeddings:
        shapes["head"] = (D, V)
    return shapes


def device_axis(path: str) -> int:
    """The axis along which an array is split over devices: vocabulary, heads or feed-forward width; norms have one."""
    if path == "head" or path.endswith(("/query", "/key", "/value", "/gate", "/up")):
        return 1
    return 0


def parameter_count(config: LlamaConfig) -> int:
    """Number of stored parameters (a tied head counts once; scales are none)."""
    return sum(math.prod(shape) for path, shape in parameter_shapes(config).items() if not path.endswith(SCALE))


def nest(flat: dict[str, Any]) -> Parameters:
    """Turn `{"layers/0/query": x}` into `{"layers": {"0": {"query": x}}}`."""
    tree: Parameters = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(path, array)` of a parameter tree; the inverse of `nest`."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def initialize(config: LlamaConfig, key: jax.Array, dtype: Any = jnp.float32, only: str | None = None) -> Parameters:
    """Random weights: normal with standard deviation 0.02, output projections scaled down by depth, norms 1, biases 0.

    Args:
        config: geometry of the model.
        key: of the noise.
        dtype: of the arrays.
        only: what of the tree's top level is wanted, such as `layers`; by default all.

    Raises:
        ValueError: for a model of int8 layers, which are made from plain ones (`pipedec_jax.model.int8`).
    """
    if config.int8:
        raise ValueError("a model of int8 layers is made from plain weights: initialize it without int8")
    flat: dict[str, jax.Array] = {}
    for index, (path, shape) in enumerate(parameter_shapes(config).items()):
        if only is not None and path.split("/")[0] != only:
            continue
        if path.endswith(BIAS) or len(shape) == 1:
            flat[path] = jnp.full(shape, 0 if path.endswith(BIAS) else 1, dtype)
            continue
        scale = 0.02
        if path.endswith(("output", "down")):
            scale /= (2 * config.layers) ** 0.5
        noise = jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)
        flat[path] = (scale * noise).astype(dtype)
    return nest(flat)


class ParameterSource(Protocol):
    """Where a model's arrays come from, read one at a time: a converted checkpoint, or a tree in memory."""

    @property
    def config(self) -> LlamaConfig:
        """Geometry of the model."""
        ...

    def read(self, path: str, part: Part | None = None) -> np.ndarray:
        """The stored array under `path` (see `parameter_shapes`), or a part of it alone, in its stored dtype."""
        ...


def read_tree(source: ParameterSource, dtype: Any = None) -> Parameters:
    """A source's whole parameter tree as JAX's arrays: as stored, or in `dtype`, where int8 and its scales stay."""
    config = source.config
    kinds = {path: dtype and (fixed_dtype(config, path) or dtype) for path in parameter_shapes(config)}
    return nest({path: jnp.asarray(source.read(path), kind) for path, kind in kinds.items()})


class CheckedSource:
    """A source of a user's own, each array of which is looked at: one of another shape is named.

    Args:
        source: what it reads from; it may give JAX's arrays.

    Raises:
        ValueError: when it has no `config`.
    """

    def __init__(self, source: ParameterSource) -> None:
        config = getattr(source, "config", None)
        if not isinstance(config, LlamaConfig):
            raise ValueError(f"{type(source).__name__}.config must be a LlamaConfig, not {config!r}")
        self.config = config
        self._source = source
        self._shapes = parameter_shapes(config)

    def read(self, path: str, part: Part | None = None) -> np.ndarray:
        """The array under `path`, or a part of it, as NumPy.

        Raises:
            ValueError: when it has not the shape that was asked for.
        """
        shape = self._shapes[path]
        if part is not None:
            shape = tuple(len(range(size)[axis]) for size, axis in zip(shape, part, strict=True))
        array = np.asarray(self._source.read(path, part))
        if array.shape != shape:
            name, found = type(self._source).__name__, list(array.shape)
            asked = f"{path!r}" if part is None else f"{path!r}, part={part}"
            raise ValueError(f"{name}.read({asked}) must give an array of shape {list(shape)}, not {found}")
        return array


class MemorySource:
    """A `ParameterSource` over a parameter tree that is already in memory (tests, random weights, notebooks)."""

    def __init__(self, config: LlamaConfig, tree: Parameters) -> None:
        self.config = config
        self._arrays = dict(flatten(tree))
        for path, shape in parameter_shapes(config).items():
            if path not in self._arrays:
                hint = ": give what is under 'params'" if set(tree) == {"params"} else ""
                raise ValueError(f"the parameter tree lacks {path!r}{hint}")
            if not hasattr(self._arrays[path], "shape"):
                raise ValueError(f"{path!r} must be an array, not a {type(self._arrays[path]).__name__}")
            if tuple(self._arrays[path].shape) != shape:
                found = tuple(self._arrays[path].shape)
                raise ValueError(f"{path!r} has shape {found}, the config asks for {shape}")
        unknown = sorted(set(self._arrays) - set(parameter_shapes(config)))
        if unknown:
            raise ValueError(f"the parameter tree has unknown arrays {unknown}")

    def read(self, path: str, part: Part | None = None) -> np.ndarray:
        """The array under `path`, or a part of it, as NumPy."""
        array = np.asarray(self._arrays[path])
        return array if part is None else array[part]
