"""Measure what a target's layer and head and a draft's step take on this machine, by the rows of a batch.

Writes a calibration for `generate.py --calibration FILE`, `plan.py --calibration FILE` and
`pipedec_jax.Decoder(calibration=...)`: modeled time is then in measured seconds, and where time grows with the rows,
best-first sends only what is worth it. It holds for the geometries it was measured of and is refused for others.
Weights are random; geometries come from models, or from files such as those in configs/. By default the demo family. A
target of your own, given without a draft, is measured alone.

python scripts/calibrate.py --target configs/llama-3.1-70b.json --draft configs/llama-3.2-1b.json --layers 6 \
    --dtype bfloat16 --out configs/times_DEVICE.json         # one stage of 14, on one accelerator
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

import pipedec_jax
from pipedec_jax.analysis.accelerator import measure_bandwidth
from pipedec_jax.analysis.calibration import calibrate, measure_link
from pipedec_jax.command_line.geometries import read_geometry
from pipedec_jax.command_line.output import Parser, check_place, fail, run_command
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.exit_head import ExitHeadConfig, step_weights
from pipedec_jax.modeled.cost import head_bytes, layer_bytes
from pipedec_jax.whole_files import write_whole


def geometries(target: str | None, draft: str | None) -> tuple[LlamaConfig, LlamaConfig | None]:
    """Of a target and a draft; the demo's draft goes with the demo's target only."""
    if target is None:
        demo = {name: pipedec_jax.load_demo(name).config for name in ("target", "draft")}
        return demo["target"], read_geometry(draft, "draft") if draft else demo["draft"]
    return read_geometry(target, "target"), read_geometry(draft, "draft") if draft else None


def exit_head(target: str | None, layer: int | None, name: str | None) -> ExitHeadConfig | None:
    """Of a stored exit head, if one is asked for."""
    if layer is None:
        if name is not None:
            raise ValueError(f"--exit-head {name} is for an exit: give --exit-layer too")
        return None
    from pipedec_jax.exit_store import find_exit_head

    return find_exit_head(pipedec_jax.load(target) if target else pipedec_jax.load_demo(), layer, name)


def main() -> None:
    """Parse and check arguments; a bad one ends with status 2."""
    parser = Parser(description=__doc__)
    parser.add_argument("--target", help="model directory or geometry (JSON); default: the demo target")
    parser.add_argument("--draft", help="the same for the draft (the demo draft, for the demo target)")
    parser.add_argument("--exit-layer", type=int, help="also an exit head stored beside the target")
    parser.add_argument("--exit-head", metavar="NAME", help="which one (the best)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--layers", type=int, default=2, help="layers run one after the other (default 2)")
    parser.add_argument("--slots", type=int, default=1024, help="slots of the cache (default 1024)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--ranks", type=int, help="devices that run at once (default: all accelerators, or 2 of a CPU)")
    parser.add_argument("--repeats", type=int, default=5, help="of every measurement (default 5)")
    parser.add_argument("--exchange", type=float, help="seconds a tick adds to its ranks' work (measured)")
    parser.add_argument("--out", type=Path, help="write the calibration to this file")
    args = parser.parse_args()
    try:
        for name in ("layers", "ranks", "slots", "repeats"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, not {value}")
        if min(args.rows) < 1:
            raise ValueError(f"--rows must be at least 1, not {min(args.rows)}")
        if args.exchange is not None and not 0 <= args.exchange < math.inf:
            raise ValueError(f"--exchange must be a finite number of at least 0 (seconds), not {args.exchange:g}")
        if args.out is not None:  # before anything is measured
            check_place("--out", args.out)
        run(args)
    except (ValueError, OSError, ImportError) as error:  # the last where pickled files need torch
        fail(error)


def run(args: argparse.Namespace) -> None:
    """Measure, print and write."""
    pipedec_jax.use_cpu_devices(args.ranks or 2)
    if args.ranks is None:
        args.ranks = 2 if jax.default_backend() == "cpu" else jax.device_count()
    target, draft = geometries(args.target, args.draft)
    head = exit_head(args.target, args.exit_layer, args.exit_head)
    times = calibrate(
        target,
        draft,
        exit_head=head,
        exchange=args.exchange,
        rows=args.rows,
        layers=args.layers,
        slots=args.slots,
        dtype=args.dtype,
        ranks=args.ranks,
        repeats=args.repeats,
    )
    with tqdm(total=2, desc="measuring memory and links", disable=None) as bar:
        bandwidth = measure_bandwidth()
        bar.update()
        link = measure_link(jax.devices()[: args.ranks]) if args.ranks > 1 else None
        bar.update()
    times["measured"] |= {"copy_bytes_per_s": bandwidth.copy, "read_bytes_per_s": bandwidth.read}
    if link is not None:
        times["measured"] |= {"link_latency_s": link.latency, "link_bytes_per_s": link.bandwidth}
    show(times, target, draft, head, args)
    if args.out is not None:
        write_whole(args.out, json.dumps(times, indent=1) + "\n")


def show(
    times: dict[str, Any],
    target: LlamaConfig,
    draft: LlamaConfig | None,
    head: ExitHeadConfig | None,
    args: argparse.Namespace,
) -> None:
    """Print the times, and how much of the bandwidth reading weights takes up in them."""
    measured = times["measured"]
    print(
        f"measured on {measured['device']}, JAX {measured['jax']}: milliseconds, {args.ranks} "
        f"rank{'s at once' if args.ranks > 1 else ''}, {args.dtype}, {args.slots} slots, half of them in use (medians)"
    )
    item = jnp.dtype(args.dtype).itemsize
    parts = {
        "layer": (f"stage of {args.layers} layers", args.layers, args.layers * layer_bytes(target, item)),
        "head": ("target head", 1, head_bytes(target, item)),
    }
    if draft is not None:
        parts["draft"] = ("draft step", 1, draft.layers * layer_bytes(draft, item) + head_bytes(draft, item))
    if head is not None:
        weights = step_weights(head, target)
        parts["exit_head"] = (f"exit head {head.name}", 1, item * weights["path"])
        parts["exit_vocabulary"] = ("its vocabulary", 1, item * weights["vocabulary"])
    shown = {part: values for part, values in parts.items() if part in times}
    columns = [f"{name} | GB/s, of copying" for name, _, _ in shown.values()]
    print(f"| rows | {' | '.join(columns)} |\n|{' --- |' * (1 + 2 * len(shown))}")
    cached = False
    for rows in sorted(args.rows):
        cells = []
        for part, (_, count, held) in shown.items():
            seconds = count * times[part][rows]
            speed = held / seconds
            cached |= speed > max(measured["copy_bytes_per_s"], measured["read_bytes_per_s"])
            cells.append(f"{1e3 * seconds:.3f} | {speed / 1e9:.0f}, {speed / measured['copy_bytes_per_s']:.1%}")
        print(f"| {rows} | {' | '.join(cells)} |")
    if cached:
        print("faster than reading memory: weights that stay in the processor's caches from one pass to the next")
    if times["exchange"]:
        print(f"a tick adds {1e6 * times['exchange']:.0f} us to its ranks' work")
    else:
        print("a tick adds less to its ranks' work than these measurements differ by: 0 is written (see --exchange)")
    print(
        f"copying {measured['copy_bytes_per_s'] / 1e9:.0f} GB/s (read and written), reading "
        f"{measured['read_bytes_per_s'] / 1e9:.0f} GB/s"
    )
    if "link_latency_s" in measured:
        print(
            f"to the next device {1e6 * measured['link_latency_s']:.0f} us and "
            f"{measured['link_bytes_per_s'] / 1e9:.2f} GB/s"
        )


if __name__ == "__main__":
    run_command(main)
