"""Compile a method's programs for devices that are not there, with their real compiler, and say what became of them.

For TPUs this takes an environment of its own with `pip install '.[tpu]'`, and no TPU. Weights have shapes only.
Compiled, not run: what is printed is the compiler's, and no measurement.

python scripts/compile_for.py --topology v5e:4x4 --target configs/llama-3.1-70b.json \
    --draft configs/llama-3.2-1b.json --stages 14
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from pipedec_jax.command_line.options import Parser, fail

MEMORY = {"TPU v5 lite": 16, "TPU v5": 95, "TPU v5p": 95, "TPU v4": 32, "TPU v6 lite": 32, "TPU7x": 192}
"""Gigabytes (2^30 bytes) of memory of a device, by its kind."""
MIB = 2**20


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--topology", default="v5e:4x4", help="such as v5e:4x4 (16 TPU devices)")
    parser.add_argument("--platform", default="tpu", help="of the compiler (tpu)")
    parser.add_argument("--target", required=True, metavar="CONFIG", help="geometry (JSON, see configs/) or a model")
    parser.add_argument("--draft", metavar="CONFIG", help="the same for the draft")
    parser.add_argument("--methods", nargs="+", default=["pp", "stpp", "pipedec", "best-first", "ppsd", "eesd"])
    parser.add_argument("--stages", type=int, required=True, metavar="N")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="T")
    parser.add_argument("--width", type=int, default=16, metavar="W")
    parser.add_argument("--children", type=int, default=16, metavar="K")
    parser.add_argument("--draft-steps", type=int, default=1, metavar="R", help="of best-first")
    parser.add_argument("--depth", type=int, default=4, help="of stpp")
    parser.add_argument("--drafter", default="model", help="of stpp, pipedec and best-first: model, ngram or both")
    parser.add_argument("--exit-layer", type=int, metavar="E", help="of ppsd and eesd (an eighth of the layers)")
    parser.add_argument("--exit-head", default="block", help="its variant (block)")
    parser.add_argument("--context", type=int, default=4096, metavar="TOKENS", help="prompt and answer (4096)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, help="also write what was found as JSON")
    return parser.parse_args(arguments)


def described_devices(platform: str, topology: str) -> list[Any]:
    """The devices of a topology.

    Raises:
        ValueError: when it is not known, or its compiler is missing.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server is asked what this machine is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several may compile at once: none uses a device
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform=platform, topology_name=topology).devices)
    except Exception as error:  # the compiler's own errors have no common type
        raise ValueError(
            f"topology {topology!r} of {platform!r} cannot be compiled for: {error}; for TPUs, pip install 'jax[tpu]' "
            "in an environment of its own"
        ) from error


def main(arguments: list[str] | None = None) -> None:
    """Compile every method and print a table."""
    options = parse(arguments)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is run: JAX itself needs no more
    from plan import geometry

    try:
        target = geometry(options.target, "target")
        draft = geometry(options.draft, "draft") if options.draft else None
        devices = described_devices(options.platform, options.topology)
        kind = devices[0].device_kind
        memory = MEMORY.get(kind)
        print(f"COMPILED for {len(devices)} x {kind} ({options.topology}), not run. {options.stages} stages, ", end="")
        print(f"{options.tensor_parallel} device(s) each, {options.dtype}, {options.context} tokens, width ", end="")
        print(f"{options.width}. Bytes are MiB a device; a device has {memory or '?'} GiB.")
        columns = ("method", "program", "compiled in, s", "weights and caches", "all", "all / those", "temporaries")
        columns += ("copies of them", "collectives", "GFLOP", "MiB accessed", "floor, MiB")
        print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
        found = []
        for method in options.methods:
            for row in compiled(options, method, target, draft, devices):
                found.append(row)
                print("| " + " | ".join(map(str, cells(row))) + " |", flush=True)
                if memory and row["total_bytes"] > memory * 2**30:
                    print(f"warning: that is more than a device's {memory} GiB", file=sys.stderr)
        if options.out:
            values = {"argv": sys.argv[1:], "kind": "compiled, not run", "device": kind, "rows": found}
            options.out.write_text(json.dumps(values, indent=1) + "\n")
    except (ValueError, OSError) as error:
        fail(error)


def compiled(
    options: argparse.Namespace, method: str, target: Any, draft: Any, devices: list[Any]
) -> list[dict[str, Any]]:
    """A method's prefill and ticks."""
    import jax.numpy as jnp

    from pipedec_jax.analysis.compiled import ShapeSource, report, shape_head
    from pipedec_jax.model.exit_head import ExitHeadConfig
    from pipedec_jax.pipeline.engine import Engine
    from pipedec_jax.pipeline.settings import EXIT_ONLY, EngineSettings

    exits, chain = method in EXIT_ONLY, method in ("pp", *EXIT_ONLY)
    layer = (options.exit_layer or max(1, target.layers // 8)) if exits else None
    settings = EngineSettings(
        method=method,
        stages=options.stages,
        tensor_parallel=options.tensor_parallel,
        width=1 if chain else options.width,
        children=1 if chain else options.children,
        draft_steps=options.draft_steps if method == "best-first" else 1,
        depth=options.depth,
        exit_layer=layer,
        dtype=jnp.dtype(options.dtype),
    )
    drafter = "model" if chain else options.drafter
    models = not chain and drafter != "ngram"
    if models and draft is None:
        raise ValueError(f"{method} with --drafter {drafter} needs --draft CONFIG")
    engine = Engine(
        ShapeSource(target),
        ShapeSource(draft) if models else None,
        settings,
        vocab_size=min(config.vocab_size for config in (target, draft) if config is not None),
        devices=devices,
        drafter=drafter,
        exit_head=shape_head(ExitHeadConfig(layer, options.exit_head), target) if layer else None,
    )
    begun = time.perf_counter()
    programs = engine.programs(options.context)
    seconds = time.perf_counter() - begun
    held = (engine.weights, engine.new_local(engine.capacity_for(options.context)))
    floor = weight_floor(engine)
    rows = []
    for name in ("prefill", "run"):
        values = dataclasses.asdict(report(getattr(programs, name), held))
        values |= {"method": method, "program": "ticks" if name == "run" else name, "both_compiled_s": seconds}
        rows.append(values | {"floor_bytes": floor})
    return rows


def weight_floor(engine: Any) -> int:
    """Bytes of weights that the rank with most to read has to read in a tick, the draft's steps included."""
    import jax
    import numpy as np

    def size(tree: Any) -> int:
        leaves = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves)

    target, drafter = engine.weights.target, engine.weights.drafter
    stage, drafting = size(target.layers), 0
    if drafter is not None and engine.settings.steps:
        head = drafter.embedding if drafter.head is None else drafter.head
        drafting = engine.settings.steps * (size(drafter.layers) + size(head))
    if engine.target.split.exit:
        return stage + drafting + size(target.output)
    return max(stage, drafting) + size(target.output)


def cells(row: dict[str, Any]) -> list[Any]:
    """A row of the table."""
    collectives = ", ".join(f"{count} {name}" for name, count in sorted(row["collectives"].items())) or "none"
    copies = f"{row['copies']} ({row['copied_bytes'] / MIB:.0f} MiB)" if row["copies"] else "none"

    def over(value: float | None, unit: float) -> str:
        return "-" if value is None else f"{value / unit:.1f}"

    return [
        row["method"],
        row["program"],
        f"{row['both_compiled_s']:.1f}" if row["program"] == "ticks" else "(both below)",
        f"{row['own_bytes'] / MIB:.0f}",
        f"{row['total_bytes'] / MIB:.0f}",
        f"{row['total_bytes'] / row['own_bytes']:.3f}",
        f"{row['temporary_bytes'] / MIB:.0f}",
        copies,
        collectives,
        over(row["flops"], 1e9),
        over(row["bytes_accessed"], MIB),
        over(row["floor_bytes"], MIB) if row["program"] == "ticks" else "-",
    ]


if __name__ == "__main__":
    main()
