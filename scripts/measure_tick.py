"""Time of a tick beside the time of its stages' own compute, with all ranks busy, on this machine's devices.

python scripts/measure_tick.py                                               # the demo target
python scripts/measure_tick.py --config configs/llama-3.2-1b.json --layers 4 # a geometry with random weights, float32
"""

from __future__ import annotations

import dataclasses
import json

import pipedec_jax
from pipedec_jax.analysis.held_out import held_out_prompts
from pipedec_jax.command_line.numbers import from_1
from pipedec_jax.command_line.output import Parser, run_command


def main() -> None:
    """Parse arguments, measure and print a table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--config", help="geometry (JSON, see configs/); weights are random")
    parser.add_argument("--layers", type=from_1, help="with --config: layers in place of the geometry's")
    parser.add_argument("--stages", type=from_1, default=2, help="ranks, all target stages (default 2)")
    parser.add_argument("--width", type=from_1, nargs="+", default=[1, 8, 32], help="rows a tick (default 1 8 32)")
    parser.add_argument("--ticks", type=from_1, default=200, help="ticks per repeat (default 200)")
    parser.add_argument("--repeats", type=from_1, default=5, help="repeats, in turn (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line instead of the table")
    args = parser.parse_args()
    if args.layers is not None and args.config is None:
        parser.error("--layers is for --config")

    pipedec_jax.use_cpu_devices(args.stages)
    from pipedec_jax.analysis.tick_cost import measure_tick_cost
    from pipedec_jax.command_line.geometries import read_geometry
    from pipedec_jax.model.random_source import RandomSource
    from pipedec_jax.pipeline.settings import EngineSettings

    if args.config is None:
        demo = pipedec_jax.load_demo("target")
        target, vocab_size = demo.source, demo.vocab_size
        prompt = demo.tokenizer.encode(held_out_prompts(1, 0)[0].text)
    else:
        config = read_geometry(args.config, "config")
        config = config if args.layers is None else dataclasses.replace(config, layers=args.layers)
        target, vocab_size, prompt = RandomSource(config), config.vocab_size, [1, 2, 3]
    if not args.json:
        print("measured, milliseconds per tick (medians; spread of the repeats in brackets)")
        print("| stages | width | tick | stages' own compute | fixed cost | compute / tick |")
        print("| --- | --- | --- | --- | --- | --- |")
    for width in args.width:
        settings = EngineSettings(stages=args.stages, width=width, children=min(width, 4))
        row = measure_tick_cost(target, settings, prompt, vocab_size=vocab_size, ticks=args.ticks, repeats=args.repeats)
        if args.json:
            print(json.dumps(dataclasses.asdict(row) | {"fixed_ms": row.fixed_ms, "share": row.share}))
            continue
        print(
            f"| {row.stages} | {row.width} | {row.tick_ms:.2f} ({row.tick_spread_ms:.2f}) | {row.compute_ms:.2f} "
            f"({row.compute_spread_ms:.2f}) | {row.fixed_ms:.2f} | {row.share:.2f} |"
        )


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
