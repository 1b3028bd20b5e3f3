"""Compare the engine with plain decoding in NumPy over the full grid of stages, widths, children and ways to draw.

In float64 no token may differ. In float32 and bfloat16 every token that plain decoding (in float64, with the same
rounded weights) would not have given after the same text so far must be a near tie: they are counted, with how far its
scores were from them, beside those that plain decoding on one device in the same dtype gives. Needs a checkout with the
test extra installed; the full grid takes hours on two cores. `--only` chooses programs by words of their description,
`--small` the grid of the tests; `--drawn` has hypothesis draw the settings of all methods and drafters instead.
"""

import sys
import time
from pathlib import Path

import jax

from pipedec_jax.command_line.numbers import amount, from_1
from pipedec_jax.command_line.output import Parser, run_command

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> int:
    """Run the grid and print a line per program, then the totals."""
    parser = Parser(description=__doc__)
    parser.add_argument("--dtype", choices=("float64", "float32", "bfloat16"), default="float64")
    parser.add_argument("--small", action="store_true", help="the tests' grid instead of the full one")
    parser.add_argument("--exits", action="store_true", help="the grid of exits and exit heads")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="programs whose description has all words"
    )
    parser.add_argument("--every", type=from_1, default=1, metavar="N", help="only every Nth program of the grid")
    parser.add_argument("--drawn", type=from_1, metavar="N", help="N settings drawn by hypothesis, in float64")
    parser.add_argument("--new-tokens", type=from_1, default=32)
    parser.add_argument("--out", type=Path, metavar="FILE", help="keeps outcomes: the same command goes on with it")
    parser.add_argument("--bound", type=amount, help="largest distance of a near tie (default: by dtype)")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 17)

    from tests import grids
    from tests.exactness import compare

    if options.drawn:
        return check_drawn(options.drawn)
    bound = grids.NEAR_TIE[options.dtype] if options.bound is None else options.bound
    grid = [*grids.SMALL_GRID, *grids.EXIT_GRID] if options.small else grids.full_grid()
    if options.exits:
        grid = grids.EXIT_GRID if options.small else grids.all_exits()
    grid = [program for program in grid if all(word in f"{program[0]}, {program[1]}" for word in options.only)]
    grid = grid[:: options.every]
    if not grid:
        raise ValueError(f"--only {' '.join(options.only)}: no program's description has all of that")
    begun, everything = time.perf_counter(), []
    try:
        found = grids.run_grid(grid, options.dtype, options.new_tokens, options.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for (shape, kind, _), outcomes in zip(grid, found, strict=True):
        everything += outcomes
        print(f"{shape}, {kind}: {grids.summary(outcomes)}", flush=True)
        for outcome in outcomes:
            if options.dtype == "float64" and outcome.other:
                print(f"    tokens {outcome.other}: {outcome.combination}")
    if options.dtype != "float64":
        texts = sorted({grids.as_plain(outcome.combination) for outcome in everything}, key=str)
        plain = [compare(text, options.dtype) for text in texts]
        print(f"\nplain decoding of the same prompts on one device in {options.dtype}: {grids.summary(plain)}")
    print(f"\n{options.dtype}, {len(grid)} programs, {time.perf_counter() - begun:.0f} s")
    print(grids.summary(everything))
    print(grids.histogram(everything))
    return int(any(outcome.distance > bound for outcome in everything))


def check_drawn(count: int) -> int:
    """Compare as many combinations as hypothesis draws, and print them; raises where a token differs."""
    import hypothesis

    from tests import grids
    from tests.exactness import Combination, bench, compare

    @hypothesis.settings(max_examples=count, deadline=None, database=None, derandomize=True)
    @hypothesis.given(combination=grids.any_combination())
    def check(combination: Combination) -> None:
        outcome = compare(combination, "float64")
        print(f"{combination}: hit rate {outcome.hit_rate:.2f}, {len(outcome.other)} other tokens", flush=True)
        bench.cache_clear()
        assert not outcome.other, outcome

    check()
    return 0


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
