"""Decode a geometry on one device with random weights and a replayed text: tokens/s, bytes/s, and where the time goes.

python scripts/measure_accelerator.py --target configs/llama-3.1-8b.json configs/llama-3.2-1b.json --profile

Everything is measured, on the first device that JAX shows, the bandwidth that it is compared with in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import jax

from pipedec_jax.analysis.accelerator import PROMPT_TOKENS, DecodeTime, measure_bandwidth, measure_decoding
from pipedec_jax.analysis.profile import DeviceProfile, profile_device
from pipedec_jax.command_line.geometries import read_geometry
from pipedec_jax.command_line.numbers import from_1, up_to_1
from pipedec_jax.command_line.output import Parser, check_place, run_command
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.int8 import Int8Source
from pipedec_jax.model.random_source import RandomSource
from pipedec_jax.pipeline.fit import check_request
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.whole_files import write_whole

COLUMNS = ("width", "ticks per token", "tick, ms", "layers and head, ms", "fixed, ms", "tokens/s", "GB/s", "of copying")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--target", nargs="+", required=True, metavar="CONFIG", help="geometries (JSON, see configs/)")
    parser.add_argument("--layers", type=from_1, help="of the model that are run, such as those of one stage (all)")
    parser.add_argument("--int8", action="store_true", help="layers of int8")
    parser.add_argument("--method", default="pipedec", help="that decodes at widths over 1 (pipedec)")
    parser.add_argument("--width", type=from_1, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--children", type=from_1, help="guesses for each node (the width)")
    parser.add_argument("--draft-steps", type=from_1, default=1, help="of best-first")
    parser.add_argument("--rate", type=up_to_1, default=1.0, help="share of guesses that are right (1)")
    parser.add_argument("--tokens", type=from_1, default=128, help="of the answer (128)")
    parser.add_argument("--slots", type=from_1, help="of the cache (as many as needed)")
    parser.add_argument("--repeats", type=from_1, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--profile", action="store_true", help="also print what the profiler sees on the device")
    parser.add_argument("--out", type=Path, help="also write all figures to this file, a JSON object a line")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure every geometry and print a table of each."""
    options = parse(arguments)
    if options.out is not None:
        check_place("--out", options.out)
    configs = {name: cut(read_geometry(name, "target"), options.layers, name) for name in options.target}
    settings = [
        EngineSettings(
            method=options.method if width > 1 else "pipedec",
            stages=1,
            width=width,
            children=options.children or width,
            draft_steps=options.draft_steps if width > 1 else 1,
            dtype=options.dtype,
            capacity=options.slots,
        )
        for width in options.width
    ]
    for config, one in itertools.product(configs.values(), settings):
        check_request(one, config, config.vocab_size, [0] * PROMPT_TOKENS, options.tokens)
    device = jax.devices()[0]
    bandwidth = measure_bandwidth()
    print(
        f"measured on {device.device_kind}, JAX {jax.__version__}: copying {bandwidth.copy / 1e9:.0f} GB/s (read and "
        f"written), reading {bandwidth.read / 1e9:.0f} GB/s",
        flush=True,
    )
    rows: list[dict[str, Any]] = [{"device": device.device_kind, "jax": jax.__version__}]
    rows[0] |= dataclasses.asdict(bandwidth)
    for name, config in configs.items():
        source = RandomSource(config)
        print(f"\n{name}, {config.layers} layers, {options.dtype}{', int8 layers' if options.int8 else ''}, medians")
        print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
        profiles: dict[int, DeviceProfile | None] = {}

        def profile(settings: EngineSettings, decode: Any, found: dict[int, Any] = profiles) -> None:
            found[settings.width] = profile_device(decode)

        measured = measure_decoding(
            Int8Source(source) if options.int8 else source,
            settings,
            tokens=options.tokens,
            rate=options.rate,
            repeats=options.repeats,
            around=profile if options.profile else None,
        )
        for found in measured:
            print(row(found, bandwidth.copy), flush=True)
            rows.append({"geometry": name, "layers": config.layers, "int8": options.int8})
            rows[-1] |= dataclasses.asdict(found)
        for width, seen in profiles.items():
            print_profile(width, seen, options.tokens)
    if options.out is not None:
        write_whole(options.out, "".join(json.dumps(row) + "\n" for row in rows))


def cut(config: LlamaConfig, layers: int | None, name: str) -> LlamaConfig:
    """The same geometry with so many of its layers; `ValueError` where it has fewer."""
    if layers is None:
        return config
    if layers > config.layers:
        raise ValueError(f"--layers must be at most {config.layers}, the layers of {name}, not {layers}")
    return dataclasses.replace(config, layers=layers)


def row(found: DecodeTime, copy: float) -> str:
    """A line of the table."""
    cells = (
        found.width,
        f"{1 / found.tokens_per_tick:.2f}",
        f"{1e3 * found.tick_s:.3f} ({1e3 * found.tick_spread_s:.3f})",
        f"{1e3 * found.compute_s:.3f}",
        f"{1e3 * found.fixed_s:.3f}",
        f"{found.tokens_per_s:.1f}",
        f"{found.bytes_per_s / 1e9:.0f}",
        f"{found.bytes_per_s / copy:.1%} ({found.compute_bytes_per_s / copy:.1%})",
    )
    return f"| {' | '.join(map(str, cells))} |"


def print_profile(width: int, found: DeviceProfile | None, tokens: int, most: int = 25) -> None:
    """What ran on the device, the longest first, kernels of a kind together."""
    if found is None:
        print(f"\nwidth {width}: the profiler shows no kernels of this device")
        return
    print(
        f"\nwidth {width}, {tokens} tokens: {1e3 * found.span:.1f} ms, busy {found.busy / found.span:.1%}, "
        f"{found.kernels / tokens:.0f} kernels a token\n| kernel | a token | us a token |\n| --- | --- | --- |"
    )
    kinds: dict[str, list[float]] = {}
    for name, (count, seconds) in found.by_name.items():
        total = kinds.setdefault(re.sub(r"[_.]?\d+$", "", name)[:90], [0, 0])
        total[0] += count
        total[1] += seconds
    for name, (count, seconds) in sorted(kinds.items(), key=lambda kind: -kind[1][1])[:most]:
        print(f"| {name} | {count / tokens:.1f} | {1e6 * seconds / tokens:.1f} |")


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
