"""Ticks per token of all schedules at equal hit rates: the comparison that does not depend on any model.

The replay drafter makes one guess after each token, right with the given chance, so that every method sees the same
hits; what differs is the schedule. Ticks are simulated. PipeDec's draft makes a step a tick, best-first's one, two or
four. A static tree is drafted while the pipe is empty: with as many steps a tick as the others it takes `depth / steps`
ticks and N of the pipe a round, and the best of many depths is shown for each rate (the second number is that depth).
"Drafting in one tick" lets it draft any depth in a tick. Needs the extra `plots` (matplotlib).

python scripts/plot_hit_rates.py --out scripts/figures/hit_rates.svg
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pipedec_jax
from pipedec_jax.command_line.numbers import from_0, from_1, up_to_1
from pipedec_jax.command_line.output import Parser, check_picture, run_command

METHODS: dict[str, dict[str, Any]] = {
    "pp": {"method": "pp"},
    "pipedec": {"method": "pipedec", "width": 1},
    "best-first, 2 draft steps": {"method": "best-first", "draft_steps": 2, "width": 4},
    "best-first, 4 draft steps": {"method": "best-first", "draft_steps": 4, "width": 8},
}
DEPTHS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)
"""Of the static trees."""
DRAWN = ("pp", "stpp, depth 4, 1 draft step", "stpp, best depth, 1 draft step", "stpp, best depth, 4 draft steps")
"""Lines of the plot, besides PipeDec and best-first."""


def main() -> None:
    """Parse arguments, simulate, print a table and draw the plot."""
    parser = Parser(description=__doc__)
    parser.add_argument("--stages", type=from_1, nargs="+", default=[4, 8, 16])
    parser.add_argument("--rates", type=up_to_1, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99])
    parser.add_argument("--depths", type=from_1, nargs="+", default=DEPTHS, help="levels of the static trees (1 to 64)")
    parser.add_argument("--tokens", type=from_1, default=500, help="tokens of the replayed text (default 500)")
    parser.add_argument("--seed", type=from_0, default=0)
    parser.add_argument("--out", type=Path, help="write the plot to this file (.svg, .png, .pdf)")
    args = parser.parse_args()
    if args.out:
        check_picture("--out", args.out)

    from pipedec_jax.analysis.simulator import Simulator
    from pipedec_jax.analysis.static_trees import REPLAYED_VOCABULARY, replayed_rounds, ticks_with_drafting
    from pipedec_jax.drafters.replay import ReplayDrafter, random_text
    from pipedec_jax.pipeline.settings import EngineSettings

    target = pipedec_jax.load_demo("target").config
    text, at_rate = random_text(args.tokens, REPLAYED_VOCABULARY, args.seed)
    rounds = {depth: replayed_rounds(depth, args.rates, args.tokens, args.seed) for depth in args.depths}
    found: dict[tuple[int, str], list[float]] = {}
    print(f"simulated ticks per token of a text of {args.tokens} tokens, by hit rate")
    print("| stages | method | " + " | ".join(map(str, args.rates)) + " |")
    print("|" + " --- |" * (2 + len(args.rates)))

    def report(stages: int, name: str, ticks: list[int], notes: list[str] | None = None) -> None:
        found[stages, name] = [count / args.tokens for count in ticks]
        cells = [f"{value:.2f}{note}" for value, note in zip(found[stages, name], notes or [""] * 99, strict=False)]
        print(f"| {stages} | {name} | " + " | ".join(cells) + " |", flush=True)

    for stages in args.stages:

        def tree(index: int, depth: int, levels: int, stages: int = stages) -> int:
            return ticks_with_drafting(rounds[depth][index], stages, depth, levels)

        indices = range(len(args.rates))
        for depth in sorted({4, 8, 16} & set(args.depths)):
            name = f"stpp, depth {depth}"
            report(stages, f"{name}, drafting in one tick", [tree(i, depth, depth) for i in indices])
            report(stages, f"{name}, 1 draft step", [tree(i, depth, 1) for i in indices])
        for levels in (1, 2, 4):
            best = [min((tree(i, depth, levels), depth) for depth in args.depths) for i in indices]
            name = f"stpp, best depth, {levels} draft step{'s' * (levels > 1)}"
            report(stages, name, [ticks for ticks, _ in best], [f" ({depth})" for _, depth in best])
        for name, settings in METHODS.items():
            drafter = ReplayDrafter(children=1, vocab_size=REPLAYED_VOCABULARY, chances=(0.9,))
            chosen = EngineSettings(stages=stages, children=1, **settings)
            simulator = Simulator(target, None, chosen, vocab_size=REPLAYED_VOCABULARY, drafter=drafter)
            runs = [simulator.run(text[:1], text[1:], drafter_params=at_rate(rate)) for rate in args.rates]
            report(stages, name, [progress.ticks[-1] for progress in runs])
    if args.out is not None:
        draw(found, args.stages, args.rates, args.out)


def draw(found: dict[tuple[int, str], list[float]], stages: list[int], rates: list[float], out: Path) -> None:
    """A panel per stage count: the speedup over PP in ticks."""
    from pipedec_jax.plots.rates import draw_over_rates
    from pipedec_jax.plots.style import save

    def lines(panel: Any, count: int) -> None:
        for (number, name), ticks in found.items():
            if number == count and name in (*DRAWN, *METHODS):
                panel.plot(rates, [count / value for value in ticks], marker=".", label=name)

    panels = {f"{count} stages": functools.partial(lines, count=count) for count in stages}
    save(draw_over_rates(panels, "hit rate", "ticks of PP / ticks (simulated)", width=4.2), out)


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
