"""Time of a tick by how far the cache is filled and how large it is: attention reads the slots in use alone.

A target of the demo's geometry, but for its context, and random weights, on one device. Measured: the median over
`--repeats` of the time of a token after the prompt; cache sizes in turn (A B A B).

python scripts/measure_context.py
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import jax
import numpy as np

import pipedec_jax
from pipedec_jax.checks import check_count
from pipedec_jax.command_line.output import Parser, fail, run_command


def main() -> None:
    """Parse arguments and measure."""
    parser = Parser(description=__doc__)
    parser.add_argument("--capacity", type=int, nargs="+", default=[2048, 8192, 32768], help="slots of the cache")
    parser.add_argument("--context", type=int, default=1000, help="tokens of the prompt (default 1000)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens decoded in a measurement (default 24)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    try:
        measure(args)
    except ValueError as error:
        fail(error)


def measure(args: argparse.Namespace) -> None:
    """Measure, and print the table.

    Raises:
        ValueError: when the options cannot be measured.
    """
    for name in ("context", "tokens", "repeats"):
        check_count(f"--{name}", getattr(args, name))
    for capacity in args.capacity:
        check_count("--capacity", capacity)

    from pipedec_jax.model.parameters import MemorySource, initialize
    from pipedec_jax.pipeline.engine import Engine
    from pipedec_jax.pipeline.settings import EngineSettings

    config = dataclasses.replace(pipedec_jax.load_demo("target").config, context=max(args.capacity))
    source = MemorySource(config, initialize(config, jax.random.key(0)))
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, args.context).tolist()
    engines = {
        capacity: Engine(
            source, None, EngineSettings(method="pp", stages=1, capacity=capacity), vocab_size=config.vocab_size
        )
        for capacity in args.capacity
    }
    seconds: dict[int, list[float]] = {capacity: [] for capacity in engines}
    for repeat in range(args.repeats + 1):
        for capacity, engine in engines.items():
            engine.start(prompt, max_new_tokens=args.tokens + 1)
            engine.run(1)
            begun = time.perf_counter()
            engine.run(args.tokens)
            if repeat:  # the first round warms up
                seconds[capacity].append((time.perf_counter() - begun) / args.tokens)
    medians = {capacity: statistics.median(values) for capacity, values in seconds.items()}
    least = medians[args.capacity[0]]
    print(f"measured, {config.layers} layers, {args.context} tokens of context, one device, float32")
    print("| slots | ms a tick, median | lowest | highest | over that of the first |\n|" + " --- |" * 5)
    for capacity, median in medians.items():
        spread = f"{1e3 * min(seconds[capacity]):.2f} | {1e3 * max(seconds[capacity]):.2f}"
        print(f"| {capacity} | {1e3 * median:.2f} | {spread} | {median / least:.2f} |")


if __name__ == "__main__":
    run_command(main)
