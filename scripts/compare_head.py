"""Heads on one stage against their vocabulary sharded over the stages: a tick modeled, and measured here.

First the LM head, which would be the last stage's; then the head of an early exit (PPSD), which would be the exit's.
Modeled from bytes of weights (16-bit) for geometries under configs/; measured on two busy ranks with random weights of
`--measured`'s geometry, made smaller `--shrink` times in every width and in vocabulary (layers stay), float32.

python scripts/compare_head.py
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pipedec_jax
from pipedec_jax.checks import check_count
from pipedec_jax.command_line.geometries import read_geometry
from pipedec_jax.command_line.output import Parser, fail, run_command

if TYPE_CHECKING:
    from pipedec_jax.config import LlamaConfig
    from pipedec_jax.model.parameters import Parameters, ParameterSource

CONFIGS = Path(__file__).parent.parent / "configs"
MODELED = (
    ("llama-3.2-1b", 2),
    ("llama-3.2-1b", 4),
    ("llama-3.2-1b", 8),
    ("llama-3.1-8b", 4),
    ("llama-3.1-8b", 8),
    ("llama-3.1-8b", 16),
    ("llama-3.1-70b", 8),
    ("llama-3.1-70b", 14),
)
"""Geometries and stages."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--measured", default="llama-3.2-1b", metavar="NAME", help="geometry that is measured")
    parser.add_argument("--shrink", type=int, default=8, help="times smaller it is (8)")
    parser.add_argument("--stages", type=int, default=2, help="ranks it is measured on (2)")
    parser.add_argument("--exit-heads", nargs="+", default=["block", "target"], help="variants (block target)")
    parser.add_argument("--width", type=int, nargs="+", default=[1, 16], help="rows of a batch (1 16)")
    parser.add_argument("--ticks", type=int, default=100, help="of a measurement (100)")
    parser.add_argument("--repeats", type=int, default=5, help="of every measurement, in turn (5)")
    parser.add_argument("--shared-cores", action="store_true", help="let a rank use the cores of others that wait")
    return parser.parse_args(arguments)


def shrunk(config: LlamaConfig, times: int) -> LlamaConfig:
    """A geometry so many times smaller.

    Raises:
        ValueError: where it cannot be.
    """
    if config.heads % times or config.vocab_size < 2 * times:
        raise ValueError(f"--shrink must be a divisor of the {config.heads} heads, not {times}")
    return dataclasses.replace(
        config,
        vocab_size=config.vocab_size // times,
        width=config.width // times,
        feed_forward=config.feed_forward // times,
        heads=config.heads // times,
        kv_heads=max(1, config.kv_heads // times),
    )


def show_modeled_head() -> None:
    """Where the LM head stands, in bytes, for all of `MODELED`."""
    from pipedec_jax.analysis.head_place import modeled_ticks
    from pipedec_jax.modeled.cost import byte_costs

    print(
        "The LM head\nmodeled, GiB of weights that the slowest stage reads in a tick (all stages busy, links left out)"
    )
    print(
        "| geometry | stages | head last | head last, layers balanced | sharded | last / sharded | balanced / sharded |"
    )
    print("|" + " --- |" * 7)
    for name, stages in MODELED:
        config = published(name)
        ticks = modeled_ticks(byte_costs(config, None, 2), config.layers, stages)
        cells = [f"{value / 2**30:.3f}" for value in (ticks.last, ticks.balanced, ticks.sharded)]
        cells += [f"{ticks.last / ticks.sharded:.2f}", f"{ticks.balanced / ticks.sharded:.2f}"]
        print(f"| {name} | {stages} | " + " | ".join(cells) + " |")


def show_measured_head(source: ParameterSource, options: argparse.Namespace) -> None:
    """The same in seconds, of one small model."""
    from pipedec_jax.analysis.head_place import measure_places, modeled_ticks
    from pipedec_jax.modeled.cost import byte_costs

    modeled = modeled_ticks(byte_costs(source.config, None, 4), source.config.layers, options.stages)
    print(
        f"\nmeasured, ms a tick of layers, head and exchange on {options.stages} ranks ({options.measured}, "
        f"{options.shrink} times smaller, float32, "
        f"{'ranks share the cores' if options.shared_cores else 'a core each'}); "
        f"modeled {modeled.last / modeled.sharded:.2f}"
    )
    print("| width | head last | sharded | last / sharded |\n| --- | --- | --- | --- |", flush=True)
    for width in options.width:
        seconds = measure_places(source, options.stages, width, ticks=options.ticks, repeats=options.repeats)
        last, sharded = 1e3 * seconds["last"], 1e3 * seconds["sharded"]
        print(f"| {width} | {last:.2f} | {sharded:.2f} | {last / sharded:.2f} |", flush=True)


def show_modeled_exit(variants: Sequence[str]) -> None:
    """Where an exit head's vocabulary stands, in bytes, for all of `MODELED`."""
    from pipedec_jax.analysis.exit_place import modeled_exit
    from pipedec_jax.model.exit_head import ExitHeadConfig

    print("\nAn exit head, after a quarter of the layers")
    print("modeled, GiB of weights that the slowest stage reads in a tick of PPSD's chain (exit stages), and token")
    print("| geometry | stages | head | on the exit's stage | sharded | a tick: exit / sharded | a token |")
    print("|" + " --- |" * 7)
    for name, stages in MODELED:
        config = published(name)
        for variant in variants:
            found = modeled_exit(config, ExitHeadConfig(config.layers // 4, variant), stages, 2)
            cells = [f"{one.tick / 2**30:.3f} ({one.exit_stages})" for one in found.values()]
            old, new = found["exit"], found["sharded"]
            cells += [f"{old.tick / new.tick:.2f}", f"{old.token / new.token:.2f}"]
            print(f"| {name} | {stages} | {variant} | " + " | ".join(cells) + " |")


def show_measured_exit(source: ParameterSource, params: Parameters, options: argparse.Namespace) -> None:
    """The same in seconds, of one small model."""
    import jax

    from pipedec_jax.analysis.exit_place import measure_exit_places
    from pipedec_jax.model.exit_head import ExitHead, ExitHeadConfig, initialize_head

    print(f"\nmeasured, ms a tick of PPSD on {options.stages} ranks, the exit after half of the layers")
    print("| head | width | on the exit's stage | sharded | exit / sharded |\n|" + " --- |" * 5, flush=True)
    for variant in options.exit_heads:
        head = ExitHeadConfig(source.config.layers // 2, variant)
        own = {} if variant == "target" else jax.device_get(initialize_head(head, source.config, params, seed=0))
        for width in options.width:
            found = measure_exit_places(source, ExitHead(head, own), options.stages, width, repeats=options.repeats)
            old, new = (1e3 * found[place] for place in ("exit", "sharded"))
            print(f"| {variant} | {width} | {old:.2f} | {new:.2f} | {old / new:.2f} |", flush=True)


def published(name: str) -> LlamaConfig:
    """A geometry under `configs/`."""
    return read_geometry(str(CONFIGS / f"{name}.json"), "geometry")


def main(arguments: list[str] | None = None) -> None:
    """Print all tables."""
    options = parse(arguments)
    from pipedec_jax.model.exit_head import ExitHeadConfig

    try:
        for name in ("stages", "ticks", "repeats", "shrink"):
            check_count(f"--{name}", getattr(options, name))
        small = shrunk(published(options.measured), options.shrink)
        for variant in options.exit_heads:
            ExitHeadConfig(1, variant)
    except (ValueError, OSError) as error:
        fail(error)
    if not options.shared_cores:  # as devices have no others' processors
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    pipedec_jax.use_cpu_devices(options.stages)
    import jax

    from pipedec_jax.model.parameters import MemorySource, initialize

    show_modeled_head()
    try:
        params = initialize(small, jax.random.key(0))
        source = MemorySource(small, params)
        show_measured_head(source, options)
        show_modeled_exit(options.exit_heads)
        show_measured_exit(source, params, options)
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    run_command(main)
