"""Kill conversions at random moments, a hundred times, and compare what they end with byte for byte.

python scripts/kill_conversions.py WORK_DIR --kills 100
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path

from tqdm import tqdm

from checkpoint_trials.killing import Killer
from checkpoint_trials.synthetic import LLAMA_3_8B, write_synthetic
from pipedec_jax.command_line.numbers import from_0, from_1
from pipedec_jax.command_line.output import Parser, run_command


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where to work")
    parser.add_argument("--kills", type=from_1, default=100, help="at least")
    parser.add_argument("--layers", type=from_1, default=2, help="of width 512, 8 MB each")
    parser.add_argument("--first", type=from_0, default=0, help="seed of the first conversion")
    options = parser.parse_args()

    directory: Path = options.directory
    directory.mkdir(parents=True, exist_ok=True)
    try:
        config = dataclasses.replace(
            LLAMA_3_8B, vocab_size=8000, width=512, feed_forward=2048, layers=options.layers, heads=8, head_size=64
        )
        size = write_synthetic(config, directory / "source", shard_bytes=40 * 10**6)
        begun = time.perf_counter()
        killer = Killer(directory / "source", directory)
        print(f"{size / 1e6:.0f} MB; a conversion takes {killer.seconds:.2f} s when nobody kills it", flush=True)
        kills = conversions = 0
        with tqdm(total=options.kills, disable=None) as bar:
            while kills < options.kills:
                killed = killer.run(options.first + conversions)
                kills += killed
                conversions += 1
                bar.update(killed)
        print(
            f"{kills} kills in {conversions} conversions, every one the same bytes in the end; "
            f"{time.perf_counter() - begun:.0f} s"
        )
    finally:
        for name in ("source", "converted", ".converted.partial"):
            shutil.rmtree(directory / name, ignore_errors=True)


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
