"""Memory and speed of a conversion on a synthetic checkpoint, against copying the same bytes on the same disk.

    python scripts/measure_conversion.py WORK_DIR              # Hugging Face safetensors
    python scripts/measure_conversion.py WORK_DIR --meta 8     # Meta's files of 8 model-parallel ranks (takes torch)

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

from checkpoint_trials.synthetic import LLAMA_3_8B, peak_memory, write_synthetic, write_synthetic_meta
from checkpoints_convert.__main__ import main as convert
from pipedec_jax.command_line.numbers import from_1
from pipedec_jax.command_line.output import Parser, run_command
from pipedec_jax.model.parameters import parameter_shapes


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where to work")
    parser.add_argument("--layers", type=from_1, default=14, help="layers of LLaMA 3 8B's shape (14: 8.2 GB; 32: all)")
    parser.add_argument("--runs", type=from_1, default=3, help="of each, in turns")
    parser.add_argument("--meta", type=from_1, metavar="RANKS", help="Meta's format, split over so many files")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        if status := convert(["convert", str(options.directory / "source"), str(options.directory / "converted")]):
            sys.exit(status)
        print(peak_memory())
        return

    config = dataclasses.replace(LLAMA_3_8B, layers=options.layers)
    source, copy, converted = (options.directory / name for name in ("source", "copy", "converted"))
    try:
        if options.meta is None:
            size = write_synthetic(config, source)
        else:
            size = write_synthetic_meta(config, source, options.meta)
        largest = 2 * max(shape[0] * shape[-1] for shape in parameter_shapes(config).values() if len(shape) == 2)
        os.sync()
        files = sum(file.suffix in (".safetensors", ".pth") for file in source.iterdir())
        print(f"{size / 1e9:.2f} GB in {files} files; largest tensor {largest / 1e9:.2f} GB")
        print(f"{'run':>3} {'cp + sync':>12} {'convert + sync':>16} {'ratio':>6} {'peak RSS':>10}")
        for run in range(options.runs):
            copying, _ = timed(["cp", "-r", "--reflink=never", str(source), str(copy)])
            shutil.rmtree(copy)
            os.sync()
            converting, peak = timed([sys.executable, __file__, str(options.directory), "--one"])
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
    """Seconds that a command and a sync take, and the number it prints last, if any."""
    begun = time.perf_counter()
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    os.sync()
    return time.perf_counter() - begun, int(output.split()[-1]) if output else 0


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
