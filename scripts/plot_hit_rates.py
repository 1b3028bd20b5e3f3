"""Ticks per token of all schedules at equal hit rates: the comparison that does not depend on any model.

The replay drafter makes one guess after each token, right with the given chance, so that every method sees the same
hits; what differs is the schedule. Ticks are simulated. Needs the extra `plots` (matplotlib).

python scripts/plot_hit_rates.py --out scripts/figures/hit_rates.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pipedec_jax

METHODS: dict[str, dict[str, Any]] = {
    "pp": {"method": "pp"},
    "stpp, depth 4": {"method": "stpp", "depth": 4, "width": 1},
    "stpp, depth 8": {"method": "stpp", "depth": 8, "width": 1},
    "pipedec": {"method": "pipedec", "width": 1},
    "best-first, 2 draft steps": {"method": "best-first", "draft_steps": 2, "width": 4},
    "best-first, 4 draft steps": {"method": "best-first", "draft_steps": 4, "width": 8},
}
VOCAB = 97


def main() -> None:
    """Parse arguments, simulate, print a table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99])
    parser.add_argument("--tokens", type=int, default=500, help="tokens of the replayed text (default 500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the plot to this file (.svg, .png, .pdf)")
    args = parser.parse_args()

    from pipedec_jax.analysis.simulator import Simulator
    from pipedec_jax.drafters.replay import ReplayDrafter, random_text
    from pipedec_jax.pipeline.settings import EngineSettings

    target = pipedec_jax.load_demo("target").config
    text, at_rate = random_text(args.tokens, VOCAB, args.seed)
    found: dict[tuple[int, str], list[float]] = {}
    print(f"simulated ticks per token of a text of {args.tokens} tokens, by hit rate")
    print("| stages | method | " + " | ".join(map(str, args.rates)) + " |")
    print("|" + " --- |" * (2 + len(args.rates)))
    for stages in args.stages:
        for name, settings in METHODS.items():
            drafter = ReplayDrafter(children=1, vocab_size=VOCAB, chances=(0.9,))
            chosen = EngineSettings(stages=stages, children=1, **settings)
            simulator = Simulator(target, None, chosen, vocab_size=VOCAB, drafter=drafter)
            for rate in args.rates:
                ticks = simulator.run(text[:1], text[1:], drafter_params=at_rate(rate)).ticks[-1]
                found.setdefault((stages, name), []).append(ticks / args.tokens)
            row = " | ".join(f"{value:.2f}" for value in found[stages, name])
            print(f"| {stages} | {name} | {row} |", flush=True)
    if args.out is not None:
        draw(found, args.stages, args.rates, args.out)


def draw(found: dict[tuple[int, str], list[float]], stages: list[int], rates: list[float], out: Path) -> None:
    """A panel per stage count: the speedup over PP in ticks."""
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    figure, panels = plt.subplots(1, len(stages), figsize=(4.2 * len(stages), 3.8), squeeze=False)
    for panel, count in zip(panels[0], stages, strict=True):
        for name in METHODS:
            panel.plot(rates, [count / ticks for ticks in found[count, name]], marker=".", label=name)
        panel.set_title(f"{count} stages")
        panel.set_xlabel("hit rate")
        panel.set_yscale("log", base=2)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("ticks of PP / ticks (simulated)")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


if __name__ == "__main__":
    main()
