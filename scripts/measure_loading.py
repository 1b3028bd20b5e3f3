"""Peak host memory of loading onto a mesh of several processes with one CPU device each, from a synthetic checkpoint.

    python scripts/measure_loading.py WORK_DIR --processes 3

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where to work")
    parser.add_argument("--processes", type=int, default=3, help="and stages")
    parser.add_argument("--layers", type=int, default=14, help="layers of LLaMA 3 8B's shape (14: 8.2 GB)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one_process(**json.loads(options.one))
        return

    source, converted = options.directory / "source", options.directory / "converted"
    try:
        write_synthetic(dataclasses.replace(LLAMA_3_8B, layers=options.layers), source)
        convert(source, converted)
        for place in (converted, source):
            print(f"\n{place.name}, {options.processes} stages, {options.dtype}:", flush=True)
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


def one_process(address: str, rank: int, count: int, checkpoint: str, dtype: str) -> None:
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
    split = split_layers(source.config.layers, count)
    begun = time.perf_counter()
    params = place_target(make_mesh(count), source, split, jax.numpy.dtype(dtype))
    jax.block_until_ready(params)
    seconds = time.perf_counter() - begun
    (held,) = bytes_per_device(params).values()
    # One line in one write, so that lines of several processes do not mix.
    sys.stdout.write(
        f"  rank {rank}: {split.count[rank]} layers, holds {held / 1e9:.2f} GB, peak RSS {peak_memory() / 1e9:.2f} GB "
        f"(before loading {before / 1e9:.2f}), so {(peak_memory() - held) / 1e9:.2f} GB more than it holds; "
        f"{seconds:.1f} s\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
