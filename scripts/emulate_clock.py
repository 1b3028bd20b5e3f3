"""Emulated time of a tick in deep pipes: every stage waits, all else is the engine's own work on this machine."""

from __future__ import annotations

import os

import pipedec_jax
from pipedec_jax.command_line.numbers import from_1, over_0
from pipedec_jax.command_line.output import Parser, run_command


def main() -> None:
    """Parse arguments, emulate and print a table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--stages", type=from_1, nargs="+", default=[8, 16], help="ranks, all stages (default 8 16)")
    parser.add_argument("--width", type=from_1, nargs="+", default=[1], help="rows a tick (default 1)")
    parser.add_argument("--wait", type=over_0, default=10.0, help="milliseconds of a stage (default 10)")
    parser.add_argument("--ticks", type=from_1, default=60, help="ticks per repeat (default 60)")
    parser.add_argument("--repeats", type=from_1, default=5, help="repeats (default 5)")
    args = parser.parse_args()

    # A rank has one thread here: a pool for the tiny products of waiting stages would only be in the others' way.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    pipedec_jax.use_cpu_devices(max(args.stages))
    from pipedec_jax.analysis.emulation import emulate

    print("emulated, milliseconds per tick with all ranks busy (median; least and most of the repeats)")
    print(
        "| stages | width | wait asked for | wait as slept | waits and exchange alone | tick | least | most |", end=""
    )
    print(" wait / tick | alone / tick |")
    print("|" + " --- |" * 10)
    for stages in args.stages:
        for width in args.width:
            row = emulate(stages, width, args.wait, args.ticks, args.repeats)
            print(
                f"| {row.stages} | {row.width} | {row.wait_ms:.2f} | {row.slept_ms:.2f} | "
                f"{row.exchange_ms:.2f} | {row.tick_ms:.2f} | {row.least_ms:.2f} | {row.most_ms:.2f} | "
                f"{row.share:.2f} | {row.exchange_ms / row.tick_ms:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
