"""What the compiler is told about a program beside the program."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh


def compiler_options(mesh: Mesh, weights: Any) -> dict[str, str] | None:
    """Options to compile a program on `mesh` that takes `weights` with; none but for narrow weights on CPU.

    XLA on CPU multiplies int8, bfloat16 and float16 matrices as float32 ones. Ordering a program for concurrency,
    as it does by default, it turns all matrices of a tick into float32 at once, which takes more memory than float32
    weights would, and is slower with int8 than turning each before its own product.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return None
    if all(leaf.dtype.itemsize >= 4 for leaf in jax.tree.leaves(weights)):
        return None
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
