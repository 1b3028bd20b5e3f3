"""Many ticks in one process: whether memory stays flat, and every answer stays plain decoding's."""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from pipedec_jax.clock import first_difference
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.fit import tree_slots
from pipedec_jax.sampling import Sampling

LONGEST_PROMPT = 64
"""Tokens of the longest prompt; prompts are drawn tokens."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer of the run, and what stood in memory after it."""

    tokens: int
    """Tokens of the answer."""
    ticks: int
    """Its ticks."""
    hits: int
    differing: int
    """Tokens from the first on that plain decoding gave otherwise."""
    resident_bytes: int
    """Of the process, weights and both engines included."""
    array_bytes: int
    """Of all arrays that JAX holds."""


def resident_bytes() -> int:
    """Bytes of memory that this process has now; the most it ever had where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def differing(found: Sequence[int], expected: Sequence[int]) -> int:
    """Tokens of two texts from the first one on that is not the same."""
    first = first_difference(found, expected)
    return 0 if first is None else max(len(found), len(expected)) - first


def long_run(engine: Engine, plain: Engine, *, ticks: int, temperature: float, seed: int = 0) -> Iterator[Answer]:
    """Answer prompts of drawn tokens until `ticks` have passed; greedy and sampled answers take turns.

    Args:
        engine: what is tested; answers are as long as its cache (`EngineSettings.capacity`) allows.
        plain: plain decoding of the same model, in the same dtype.
        ticks: of `engine`, in all.
        temperature: of the sampled answers.
        seed: of prompts and noise.

    Raises:
        ValueError: when the engine has no fixed capacity.
    """
    capacity = engine.settings.capacity
    if capacity is None:
        raise ValueError("a long run needs engines of a fixed capacity: give one in their settings")
    longest = min(engine.target.config.context, capacity - tree_slots(engine.settings))
    random = np.random.default_rng(seed)
    passed = count = 0
    while passed < ticks:
        length = int(random.integers(1, LONGEST_PROMPT + 1))
        prompt = random.integers(engine.target.vocab_size, size=length).tolist()
        sampling = Sampling(temperature=temperature if count % 2 else 0.0, seed=count)
        found = []
        for each in (engine, plain):
            each.start(prompt, max_new_tokens=longest - length, sampling=sampling)
            found.append(each.run(longest - length))
        progress = found[0]
        passed, count = passed + progress.ticks[-1], count + 1
        yield Answer(
            tokens=len(progress.tokens),
            ticks=progress.ticks[-1],
            hits=sum(progress.hits),
            differing=differing(progress.tokens, found[1].tokens),
            resident_bytes=resident_bytes(),
            array_bytes=sum(array.nbytes for array in jax.live_arrays()),
        )
