"""What a compiler made of a method's programs: memory, copies of weights and caches, collectives, its own estimate.

Nothing is run: the devices may be described only (`jax.experimental.topologies`). Weights have shapes and no values.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.exit_head import ExitHead, ExitHeadConfig, head_shapes
from pipedec_jax.model.parameters import Part, fixed_dtype, nest, parameter_shapes

BOOKKEEPING = ("bitcast", "constant", "get-tuple-element", "parameter", "tuple")
"""Operations of HLO that nothing runs for."""
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
"""Operations in which devices wait for each other."""
NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64", "s8": "int8", "s32": "int32"}
"""HLO's names of the dtypes that weights and caches have, and NumPy's."""


class ShapeSource:
    """A model of a geometry without weights: every array is zero, and takes no memory.

    Args:
        config: the geometry.
    """

    def __init__(self, config: LlamaConfig) -> None:
        self.config = config
        self._shapes = parameter_shapes(config)

    def read(self, path: str, part: Part | None = None) -> np.ndarray:
        """Zeros in the shape of the array, or of a part of it."""
        dtype = fixed_dtype(self.config, path) or np.dtype(ml_dtypes.bfloat16)
        zeros = np.broadcast_to(np.zeros((), dtype), self._shapes[path])
        return zeros if part is None else zeros[part]


def shape_head(config: ExitHeadConfig, target: LlamaConfig) -> ExitHead:
    """An exit head without weights."""
    zero = np.zeros((), ml_dtypes.bfloat16)
    return ExitHead(
        config, nest({path: np.broadcast_to(zero, shape) for path, shape in head_shapes(config, target).items()})
    )


@dataclasses.dataclass(frozen=True)
class Report:
    """Of one program, for each device. Bytes are those of the compiler's own analysis."""

    own_bytes: int
    """Of weights and caches, the drafter's among them, that the program takes: prefill takes no head, for one."""
    total_bytes: int
    """Of arguments, results and temporaries together."""
    temporary_bytes: int
    copies: int
    """Copies of arrays that have the shape of a weight or a cache."""
    copied_bytes: int
    collectives: Mapping[str, int]
    """Operations by kind; those of a loop's body count once."""
    kernels: int
    """Operations of the program's largest loop over ticks that are not bookkeeping; what a loop or branch in it holds
    counts as one."""
    cycles: int | None
    """Of all operations, each once, whichever branch they are in, as the compiler estimates them; without the time that
    memory takes to bring what is read ahead. `None` where it estimates none."""
    flops: float | None
    """Of one tick (of a loop's body once), as the compiler estimates them; `None` where it does not."""
    bytes_accessed: float | None
    """What is read ahead is in it twice: where it is written to nearer memory, and where it is used."""
    read_ahead_bytes: int
    """Brought into a nearer memory beside other work, so that the product that needs them does not wait."""


def report(program: Any, held: Any) -> Report:
    """Read a compiled program.

    Args:
        program: `jax.stages.Compiled`.
        held: the pytree of weights and caches that it takes, of arrays or shapes with shardings.
    """
    memory, text = program.memory_analysis(), program.as_text()
    parts = [(str(leaf.dtype), leaf.sharding.shard_shape(leaf.shape)) for leaf in _distinct(held)]
    taken = Counter(_entry(text)) & Counter(parts)
    own = sum(count * math.prod(shape) * np.dtype(dtype).itemsize for (dtype, shape), count in taken.items())
    # Vectors are not weights worth counting: a norm is copied in no time.
    kinds = {(dtype, tuple(sorted(shape))) for dtype, shape in parts if len(shape) > 1 and min(shape) > 1}
    copied = [size for dtype, shape, size in _copies(text) if (dtype, tuple(sorted(shape))) in kinds]
    cost = program.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost or {}
    aliased = memory.alias_size_in_bytes
    return Report(
        own_bytes=own,
        total_bytes=memory.argument_size_in_bytes + memory.output_size_in_bytes - aliased + memory.temp_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        copies=len(copied),
        copied_bytes=sum(copied),
        collectives=dict(Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text))),
        kernels=_kernels(text),
        cycles=_cycles(text),
        flops=cost.get("flops"),
        bytes_accessed=cost.get("bytes accessed"),
        read_ahead_bytes=_read_ahead(text),
    )


def _kernels(text: str) -> int:
    """Operations that run, of the loop's body with the collectives that has most of them, or of any where none has."""
    bodies = set(re.findall(r"\bbody=%?([\w.\-]+)", text))
    counts = {True: [0], False: [0]}
    for part in re.split(r"\n(?=[%\w][^\n]*\{\n)", text):
        name = part.lstrip("%").split(maxsplit=1)[0] if part.strip() else ""
        names = re.findall(r"^ +(?:ROOT )?%?[\w.\-]+ = .*? ([a-z\-]+)\(", part, flags=re.MULTILINE)
        meets = any(name.removesuffix("-start") in COLLECTIVES for name in names)
        if meets or name in bodies:
            counts[meets].append(sum(name not in BOOKKEEPING and not name.endswith("-done") for name in names))
    return max(counts[True]) or max(counts[False])


def _cycles(text: str) -> int | None:
    """What an HLO text says of its operations' cycles, added up."""
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text))) or None


def _distinct(tree: Any) -> list[Any]:
    """The arrays of a pytree, one that is there twice once."""
    return list({id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values())


def _entry(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Dtype and shape of what a program takes, from its HLO text; what it does not need is not among them."""
    found = re.search(r"entry_computation_layout=\{\((.*?)\)->", text)
    arrays: list[tuple[str, str]] = re.findall(r"(\w+)\[([\d,]*)\]", found[1]) if found else []
    return [(NAMES.get(name, name), tuple(map(int, sizes.split(",") if sizes else ()))) for name, sizes in arrays]


def _read_ahead(text: str) -> int:
    """Bytes that an HLO text brings into nearer memory, S(1) and up, beside other work; of weights' dtypes alone."""
    near = r"(\w+)\[([\d,]+)\]\{[^}]*S\([1-9]\)[^}]*\}[^=\n]*?"
    found: list[tuple[str, str]] = re.findall(rf"= \({near} copy-start\(", text)
    found += re.findall(rf"= \(\([^=\n]*?\), {near} slice-start\(", text)
    sizes = [(NAMES[name], map(int, shape.split(","))) for name, shape in found if name in NAMES]
    return sum(math.prod(shape) * np.dtype(name).itemsize for name, shape in sizes)


def _copies(text: str) -> list[tuple[str, tuple[int, ...], int]]:
    """Dtype, shape and bytes of what an HLO text copies within a device's main memory.

    A copy into a nearer memory, S(1) and up, is how a TPU reads ahead.
    """
    found = []
    for name, sizes, layout in re.findall(r"= \(?(\w+)\[([\d,]*)\](\{[^}]*\})?[^=\n]*? copy(?:-start)?\(", text):
        if name in NAMES and sizes and not re.search(r"S\([1-9]", layout):
            shape = tuple(map(int, sizes.split(",")))
            found.append((NAMES[name], shape, math.prod(shape) * np.dtype(NAMES[name]).itemsize))
    return found
