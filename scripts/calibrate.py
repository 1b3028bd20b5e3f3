"""Measure what a target's layer and head and a draft's step take on this machine, by the rows of a batch.

Writes a calibration for `generate.py --calibration FILE` and `pipedec_jax.Decoder(calibration=...)`: modeled time is
then in measured seconds, and where time grows with the rows, best-first sends only what is worth it. Weights are
random; geometries come from models, or from files such as those in configs/. By default the demo family.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pipedec_jax
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.exit_head import ExitHeadConfig


def geometry(name: str | None, demo: str) -> LlamaConfig:
    """Of the demo family, of a JSON file, or of a model's directory."""
    if name is None:
        return pipedec_jax.load_demo(demo).config
    path = Path(name)
    if path.suffix == ".json":
        values = json.loads(path.read_text(encoding="utf-8"))
        return LlamaConfig.from_dict(values.get("model", values))
    return pipedec_jax.load(path).config


def exit_head(target: str | None, layer: int | None, name: str | None) -> ExitHeadConfig | None:
    """Of a stored exit head, if one is asked for."""
    if layer is None:
        return None
    from pipedec_jax.exit_store import find_exit_head

    return find_exit_head(pipedec_jax.load(target) if target else pipedec_jax.load_demo(), layer, name)


def main() -> None:
    """Parse arguments, measure, print a table and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="model directory or geometry (JSON); default: the demo target")
    parser.add_argument("--draft", help="the same for the draft; default: the demo draft")
    parser.add_argument("--exit-layer", type=int, help="also an exit head stored beside the target")
    parser.add_argument("--exit-head", metavar="NAME", help="which one (the best)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="of the batches")
    parser.add_argument("--layers", type=int, default=2, help="layers run one after the other (default 2)")
    parser.add_argument("--slots", type=int, default=1024, help="slots of the cache (default 1024)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--ranks", type=int, default=2, help="devices that run at once (default 2)")
    parser.add_argument("--repeats", type=int, default=5, help="of every measurement (default 5)")
    parser.add_argument("--exchange", type=float, default=0.0, help="seconds a tick adds (see measure_tick.py)")
    parser.add_argument("--out", type=Path, help="write the calibration to this file")
    args = parser.parse_args()

    pipedec_jax.use_cpu_devices(args.ranks)
    from pipedec_jax.analysis.calibration import calibrate

    times = calibrate(
        geometry(args.target, "target"),
        geometry(args.draft, "draft"),
        exit_head=exit_head(args.target, args.exit_layer, args.exit_head),
        exchange=args.exchange,
        rows=args.rows,
        layers=args.layers,
        slots=args.slots,
        dtype=args.dtype,
        ranks=args.ranks,
        repeats=args.repeats,
    )
    print(f"measured, milliseconds, {args.ranks} ranks at once, {args.dtype}, {args.slots} slots (medians)")
    parts = {"layer": "target layer", "head": "target head", "draft": "draft step", "exit_head": "exit head"}
    shown = [part for part in parts if part in times]
    print(f"| rows | {' | '.join(parts[part] for part in shown)} |")
    print("|" + " --- |" * (1 + len(shown)))
    for rows in sorted(args.rows):
        found = [f"{1e3 * times[part][rows]:.3f}" for part in shown]
        print(f"| {rows} | {' | '.join(found)} |")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(times, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
