"""Decode a prompt and show what happened in every tick: a timeline, the tree as it grows, a trace for Perfetto.

python scripts/trace.py --out DIR [--ticks 1 40] [--tree-ticks 6 7 8] [options of generate.py]

DIR then holds `timeline.svg` (ranks against ticks), `tree.svg` (the tree in a few ticks) and `trace.json` (open it at
https://ui.perfetto.dev, or in chrome://tracing). All is counted in ticks, which are not time; with `--time modeled` and
`--calibration FILE` the trace's times are modeled. Pictures need the extra `plots` (matplotlib); without
it they are left out, and said to be.
"""

from __future__ import annotations

from pathlib import Path

from pipedec_jax.command_line.output import Parser, fail, run_command
from pipedec_jax.command_line.tracing import trace
from pipedec_jax.disk_cache import use_compilation_cache


def main() -> None:
    """Parse this script's own options; what is left over are generate.py's."""
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go")
    parser.add_argument(
        "--ticks", type=int, nargs=2, default=(1, 40), metavar=("A", "B"), help="of the timeline (1 40)"
    )
    parser.add_argument("--tree-ticks", type=int, nargs="+", metavar="T", help="panels of the tree (three in a row)")
    parser.add_argument("--tree-nodes", type=int, default=20, help="most nodes of a panel (20)")
    parser.add_argument("--format", default="svg", choices=("svg", "png", "pdf"), help="of the pictures (svg)")
    parser.add_argument("--time", default="ticks", choices=("ticks", "modeled"), help="in the trace (ticks)")
    parser.add_argument("--no-pictures", action="store_true", help="the trace alone, without matplotlib")
    own, rest = parser.parse_known_args()
    try:
        use_compilation_cache()
        trace(own, rest)
    except (ValueError, OSError, ImportError) as error:  # the last where pickled files need torch
        fail(error)


if __name__ == "__main__":
    run_command(main)
