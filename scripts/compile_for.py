"""Compile a method's programs for devices that are not there, with their real compiler, and say what became of them.

For TPUs this takes an environment of its own with `pip install '.[tpu]'`, and no TPU; for GPUs one with
`pip install . 'jax[cuda13]'`, and no GPU. Weights have shapes only. Compiled, not run: what is printed is the
compiler's, and no measurement.

python scripts/compile_for.py --topology v5e:4x4 --target configs/llama-3.1-70b.json \
    --draft configs/llama-3.2-1b.json --stages 14
python scripts/compile_for.py --topology h100:2x8 --target configs/llama-3.1-70b.json \
    --draft configs/llama-3.2-1b.json --stages 14
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax

from pipedec_jax.command_line.output import Parser, check_place, fail, run_command
from pipedec_jax.whole_files import write_whole

MIB = 2**20
HIERARCHIES = ("pipespec", "speculative")
METHODS = ("pp", "stpp", "pipedec", "best-first", "ppsd", "eesd", *HIERARCHIES)
COLUMNS = (
    *("method", "program", "compiled in, s (of processor)", "weights and caches", "all", "all / those", "temporaries"),
    *("copies of them", "collectives", "kernels", "million cycles"),
    *("GFLOP", "MiB accessed", "read ahead, MiB", "floor, MiB"),
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--topology", default="v5e:4x4", help="such as v5e:4x4 (16 TPU devices) or h100:2x8 (16 GPUs)")
    parser.add_argument("--platform", help="of the compiler (tpu, or cuda where the topology is of GPUs)")
    parser.add_argument("--target", required=True, metavar="CONFIG", help="geometry (JSON, see configs/) or a model")
    parser.add_argument("--draft", metavar="CONFIG", help="the same for the draft")
    parser.add_argument(
        "--middle", nargs="+", default=[], metavar="CONFIG", help="models between them in pipespec, smallest first"
    )
    parser.add_argument("--method", "--methods", dest="methods", nargs="+", choices=METHODS, metavar="METHOD")
    parser.add_argument("--stages", type=int, metavar="N", help="by default all devices but those of smaller models")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="T")
    parser.add_argument("--idle-ranks", type=int, default=0, metavar="K", help="that hold their vocabulary alone (0)")
    parser.add_argument("--width", type=int, default=16, metavar="W")
    parser.add_argument("--children", type=int, default=16, metavar="K")
    parser.add_argument("--draft-steps", type=int, default=1, metavar="R", help="of best-first")
    parser.add_argument("--depth", type=int, default=4, help="of stpp")
    parser.add_argument("--drafter", default="model", help="of stpp, pipedec and best-first: model, ngram or both")
    parser.add_argument("--exit-layer", type=int, metavar="E", help="of ppsd and eesd (an eighth of the layers)")
    parser.add_argument("--exit-head", default="block", help="its variant (block)")
    parser.add_argument("--passes", type=int, default=4, help="of each smaller model in a tick of a hierarchy (4)")
    parser.add_argument("--context", type=int, default=4096, metavar="TOKENS", help="prompt and answer (4096)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, help="also write what was found as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Compile every method and print a table."""
    options = parse(arguments)
    if not getattr(jax.config, "jax_platforms", None):  # nothing is run: JAX itself needs no more
        jax.config.update("jax_platforms", "cpu")
    from pipedec_jax.analysis import described
    from pipedec_jax.command_line.geometries import read_geometry

    try:
        if options.out:
            check_place("--out", options.out)
        target = read_geometry(options.target, "target")
        draft = read_geometry(options.draft, "draft") if options.draft else None
        middle = [read_geometry(name, "middle") for name in options.middle]
        names = [field.name for field in dataclasses.fields(described.Sizes)]
        devices = described.described_devices(options.topology, options.platform)
        if options.stages is None:
            ranks = len(devices) // max(1, options.tensor_parallel)
            smaller = (len(middle) + 1 if draft else 0) + options.idle_ranks
            if ranks <= smaller:
                raise ValueError(
                    f"{options.topology} has {len(devices)} devices, too few for a stage over "
                    f"{options.tensor_parallel} and {smaller} smaller model(s) and idle ranks: give a larger --topology"
                )
            options.stages = min(target.layers, ranks - smaller)
        sizes = described.Sizes(**{name: getattr(options, name) for name in names})
        kind = devices[0].device_kind
        memory = described.MEMORY.get(kind)
        print(f"COMPILED for {len(devices)} x {kind} ({options.topology}), not run. {options.stages} stages, ", end="")
        print(f"{options.tensor_parallel} device(s) each, {options.dtype}, {options.context} tokens, width ", end="")
        print(f"{options.width}. Bytes are MiB a device; a device has {memory or '?'} GiB.")
        print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
        found = []
        for method in options.methods or [name for name in METHODS if draft or name not in HIERARCHIES]:
            if method not in HIERARCHIES:
                rows = described.compile_method(method, sizes, target, draft, devices)
            elif draft is None:
                raise ValueError(f"{method} needs --draft CONFIG")
            else:
                smaller = [draft, *(middle if method == "pipespec" else [])]
                rows = described.compile_hierarchy(method, sizes, target, smaller, devices)
            for row in rows:
                found.append(row)
                print("| " + " | ".join(map(str, cells(row))) + " |", flush=True)
                if memory and row["total_bytes"] > memory * 2**30:
                    print(f"warning: that is more than a device's {memory} GiB", file=sys.stderr)
        if options.out:
            values = {"argv": sys.argv[1:], "kind": "compiled, not run", "device": kind, "rows": found}
            write_whole(options.out, json.dumps(values, indent=1) + "\n")
    except (ValueError, OSError) as error:
        fail(error)


def cells(row: dict[str, Any]) -> list[Any]:
    """A row of the table."""
    collectives = ", ".join(f"{count} {name}" for name, count in sorted(row["collectives"].items())) or "none"
    copies = f"{row['copies']} ({row['copied_bytes'] / MIB:.0f} MiB)" if row["copies"] else "none"

    def over(value: float | None, unit: float) -> str:
        return "-" if value is None else f"{value / unit:.1f}"

    ticks = row["program"] == "ticks"
    return [
        row["method"],
        row["program"],
        f"{row['both_compiled_s']:.0f} ({row['both_processor_s']:.0f})" if ticks else "(both below)",
        f"{row['own_bytes'] / MIB:.0f}",
        f"{row['total_bytes'] / MIB:.0f}",
        f"{row['total_bytes'] / row['own_bytes']:.3f}",
        f"{row['temporary_bytes'] / MIB:.0f}",
        copies,
        collectives,
        str(row["kernels"]),
        over(row["cycles"], 1e6),
        over(row["flops"], 1e9),
        over(row["bytes_accessed"], MIB),
        over(row["read_ahead_bytes"], MIB),
        over(row["floor_bytes"], MIB) if ticks else "-",
    ]


if __name__ == "__main__":
    run_command(main)
