"""Memory and speed of a conversion on a synthetic checkpoint, against copying the same bytes on the same disk.

    python scripts/measure_conversion.py WORK_DIR

needs three times the checkpoint's size in WORK_DIR, and leaves nothing there.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from checkpoints_convert.synthetic import LLAMA_3_8B, write_synthetic
from pipedec_jax.model.parameters import parameter_shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where to work")
    parser.add_argument("--layers", type=int, default=14, help="layers of LLaMA 3 8B's shape (14: 8.2 GB; 32: all)")
    parser.add_argument("--runs", type=int, default=3, help="of each, in turns")
    options = parser.parse_args()

    config = dataclasses.replace(LLAMA_3_8B, layers=options.layers)
    source, copy, converted = (options.directory / name for name in ("source", "copy", "converted"))
    try:
        size = write_synthetic(config, source)
        largest = 2 * max(shape[0] * shape[-1] for shape in parameter_shapes(config).values() if len(shape) == 2)
        os.sync()
        shards = len(list(source.glob("*.safetensors")))
        print(f"{size / 1e9:.2f} GB in {shards} shards; largest tensor {largest / 1e9:.2f} GB")
        print(f"{'run':>3} {'cp + sync':>12} {'convert + sync':>16} {'ratio':>6} {'peak RSS':>10}")
        for run in range(options.runs):
            copying, _ = timed(["cp", "-r", "--reflink=never", str(source), str(copy)])
            shutil.rmtree(copy)
            os.sync()
            command = [sys.executable, "-m", "checkpoints_convert", "convert", str(source), str(converted)]
            converting, peak = timed(command)
            shutil.rmtree(converted)
            os.sync()
            print(
                f"{run + 1:3d} {copying:10.1f} s {converting:14.1f} s {converting / copying:6.2f} {peak / 1e9:7.2f} GB",
                flush=True,
            )
        print(f"allowed: ratio 2, peak {(2 * largest + 1e9) / 1e9:.2f} GB")
    finally:
        for directory in (source, copy, converted, options.directory / ".converted.partial"):
            shutil.rmtree(directory, ignore_errors=True)


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds that a command and a sync take, and its peak resident bytes."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    os.sync()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return time.perf_counter() - begun, usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
