"""Peak host memory of loading onto a mesh of several processes with one CPU device each, from a synthetic checkpoint.

    python scripts/measure_loading.py WORK_DIR --processes 3
    python scripts/measure_loading.py WORK_DIR --processes 4 --tensor-parallel 2    # 2 stages of 2 devices each

On CPU the device's memory is the host's, so a process holds its stage, what it needs to run, and what loading takes on
top. Leaves nothing in WORK_DIR.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from checkpoint_trials.synthetic import LLAMA_3_8B, peak_memory, write_synthetic
from checkpoints_convert import convert
from pipedec_jax.command_line.numbers import from_1
from pipedec_jax.command_line.output import Parser, run_command


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where to work")
    parser.add_argument("--processes", type=from_1, default=3, help="with one device each (3)")
    parser.add_argument("--tensor-parallel", type=from_1, default=1, metavar="T", help="devices of a stage (1)")
    parser.add_argument("--layers", type=from_1, default=14, help="layers of LLaMA 3 8B's shape (14: 8.2 GB)")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one_process(**json.loads(options.one))
        return

    stages, rest = divmod(options.processes, options.tensor_parallel)
    if rest or stages < 1 or stages > options.layers:
        parser.error(
            f"--processes ({options.processes}) must be a multiple of --tensor-parallel ({options.tensor_parallel}), "
            f"and make at most {options.layers} stages (--layers)"
        )
    source, converted = options.directory / "source", options.directory / "converted"
    try:
        write_synthetic(dataclasses.replace(LLAMA_3_8B, layers=options.layers), source)
        convert(source, converted)
        for place in (converted, source):
            print(
                f"\n{place.name}, {stages} stages, {options.tensor_parallel} devices each, {options.dtype}:", flush=True
            )
            with socket.socket() as free:
                free.bind(("localhost", 0))
                address = f"localhost:{free.getsockname()[1]}"
            processes = []
            for rank in range(options.processes):
                what = json.dumps(
                    {
                        "address": address,
                        "rank": rank,
                        "count": options.processes,
                        "parts": options.tensor_parallel,
                        "checkpoint": str(place),
                        "dtype": options.dtype,
                    }
                )
                processes.append(subprocess.Popen([sys.executable, __file__, str(options.directory), "--one", what]))
            statuses = [process.wait() for process in processes]
            if any(statuses):
                sys.exit("a process failed")
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(converted, ignore_errors=True)


def one_process(address: str, rank: int, count: int, parts: int, checkpoint: str, dtype: str) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, count, rank)

    from checkpoints_convert import open_any
    from pipedec_jax.pipeline.placement import bytes_per_device, make_mesh, place_target
    from pipedec_jax.pipeline.split import split_layers

    jax.devices()
    before = peak_memory()
    source = open_any(checkpoint)
    split = split_layers(source.config.layers, count // parts)
    begun = time.perf_counter()
    params = place_target(make_mesh(count // parts, parts=parts), source, split, jax.numpy.dtype(dtype))
    jax.block_until_ready(params)
    seconds = time.perf_counter() - begun
    (held,) = bytes_per_device(params).values()
    share = f", part {rank % parts + 1} of {parts}" if parts > 1 else ""
    # One line in one write, so that lines of several processes do not mix.
    sys.stdout.write(
        f"  process {rank}: {split.count[rank // parts]} layers{share}, holds {held / 1e9:.2f} GB, peak RSS "
        f"{peak_memory() / 1e9:.2f} GB (before loading {before / 1e9:.2f}), so "
        f"{(peak_memory() - held) / 1e9:.2f} GB more than it holds; "
        f"{seconds:.1f} s\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
