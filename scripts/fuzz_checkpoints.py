"""Try corrupted checkpoints by the thousand; ends at the first that is handled badly, naming its seed.

python scripts/fuzz_checkpoints.py --inputs 10000
"""

from __future__ import annotations

import collections
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from checkpoint_trials.fuzzing import Fuzzer, limit_memory
from checkpoint_trials.synthetic import peak_memory
from pipedec_jax.command_line.numbers import from_0, from_1
from pipedec_jax.command_line.output import Parser, run_command


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--inputs", type=from_1, default=10_000)
    parser.add_argument("--first", type=from_0, default=0, help="seed of the first input")
    parser.add_argument("--directory", type=Path, help="where to work (default: the system's temporary directory)")
    parser.add_argument("--show", action="store_true", help="print what became of each input")
    options = parser.parse_args()

    begun = time.perf_counter()
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        fuzzer = Fuzzer(Path(directory) / "fuzz")
        # What the first conversions load stays.
        for seed in range(50):
            fuzzer.run(seed)
        limit_memory()
        begun_at = peak_memory()
        for seed in tqdm(range(options.first, options.first + options.inputs), disable=None):
            outcome = fuzzer.run(seed)
            outcomes["correct result" if outcome.error is None else outcome.error.split(":")[0]] += 1
            if options.show:
                print(f"{seed}: {outcome.what} -> {outcome.error or 'correct result'}")
    print(f"{options.inputs} inputs in {time.perf_counter() - begun:.0f} s, none handled badly")
    for name, count in outcomes.most_common():
        print(f"  {count:6d}  {name}")
    print(f"peak memory grew by {(peak_memory() - begun_at) / 1e6:.0f} MB")


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
