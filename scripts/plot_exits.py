"""PPSD and EESD over the acceptance rate: where drafting first and verifying then falls below plain decoding.

Lines are closed forms (`pipedec_jax.modeled.closed_forms`), in ticks: PP's over the method's. Dots are counted: the
replay drafter stands at the exit and is right with the given rate, ticks are simulated. The same for any model, and for
equal stages PPSD's is L / (a E + (1 - a) L) in layers. Needs the extra `plots` (matplotlib) for the picture.

python scripts/plot_exits.py --out scripts/figures/exits.svg
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

import pipedec_jax
from pipedec_jax.command_line.numbers import from_0, from_1, up_to_1
from pipedec_jax.command_line.output import Parser, check_picture, run_command

VOCAB = 97


def main() -> None:
    """Parse arguments, simulate, print a table and draw the plot."""
    parser = Parser(description=__doc__)
    parser.add_argument("--stages", type=from_1, default=8, help="of the demo target's 16 layers (8)")
    parser.add_argument("--exits", type=from_1, nargs="+", default=[2, 4, 8], help="layers of the exit path (2 4 8)")
    parser.add_argument("--draft-lengths", type=from_1, nargs="+", default=[1, 4, 8], help="of EESD (1 4 8)")
    parser.add_argument("--rates", type=up_to_1, nargs="+", default=[0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1])
    parser.add_argument("--tokens", type=from_1, default=500, help="tokens of the replayed text (500)")
    parser.add_argument("--seed", type=from_0, default=0)
    parser.add_argument("--out", type=Path, help="write the plot to this file (.svg, .png, .pdf)")
    args = parser.parse_args()
    if args.out:
        check_picture("--out", args.out)

    from pipedec_jax.analysis.simulator import Simulator
    from pipedec_jax.drafters.replay import ReplayAtExit, random_text
    from pipedec_jax.modeled import closed_forms
    from pipedec_jax.pipeline.settings import EngineSettings

    target = pipedec_jax.load_demo("target").config
    text, at_rate = random_text(args.tokens, VOCAB, args.seed)

    def counted(simulator: Simulator, rate: float) -> float:
        return simulator.run(text[:1], text[1:], drafter_params=at_rate(rate)).ticks[-1] / args.tokens

    methods = [("ppsd", 1), *(("eesd", length) for length in args.draft_lengths)]
    counts: dict[tuple[int, str], list[float]] = {}
    forms: dict[tuple[int, str], list[float]] = {}
    fine = np.linspace(0, 1, 101).tolist()
    print(f"PP's ticks over the method's on {args.stages} stages, by acceptance rate: ", end="")
    print(f"simulated with {args.tokens} tokens / closed form")
    print("| exit layer | exit stages | method | " + " | ".join(map(str, args.rates)) + " |")
    print("|" + " --- |" * (3 + len(args.rates)))
    for layer in args.exits:
        for method, length in methods:
            settings = EngineSettings(
                method=method, stages=args.stages, exit_layer=layer, width=1, children=1, draft_length=length
            )
            drafter = ReplayAtExit(children=1, vocab_size=VOCAB)
            simulator = Simulator(target, None, settings, vocab_size=VOCAB, drafter=drafter)
            e = simulator.split.exit

            def form(rate: float, method: str = method, n: int = args.stages, e: int = e, k: int = length) -> float:
                if method == "ppsd":
                    return float(n / closed_forms.ppsd_ticks_per_token(rate, e, n))
                return float(n / closed_forms.eesd_ticks_per_token(rate, k, e, n))

            name = method if method == "ppsd" else f"eesd, {length} drafts"
            counts[layer, name] = [args.stages / counted(simulator, rate) for rate in args.rates]
            forms[layer, name] = [form(rate) for rate in fine]
            both = zip(args.rates, counts[layer, name], strict=True)
            cells = [f"{found:.2f} / {form(rate):.2f}" for rate, found in both]
            print(f"| {layer} | {e} | {name} | " + " | ".join(cells) + " |", flush=True)
    if args.out is not None:
        draw(counts, forms, args.exits, args.rates, fine, args.out)


def draw(
    counts: dict[tuple[int, str], list[float]],
    forms: dict[tuple[int, str], list[float]],
    exits: list[int],
    rates: list[float],
    fine: list[float],
    out: Path,
) -> None:
    """A panel per exit: closed forms as lines, counted ticks as dots, plain decoding at 1."""
    from pipedec_jax.plots.rates import draw_over_rates
    from pipedec_jax.plots.style import save

    def lines(panel: Any, layer: int) -> None:
        for (number, name), values in forms.items():
            if number == layer:
                (line,) = panel.plot(fine, values, label=name)
                panel.plot(rates, counts[layer, name], ".", color=line.get_color())
        panel.axhline(1, color="black", linewidth=0.8, linestyle="--", label="plain decoding (pp)")

    panels = {f"exit after {layer} layers": functools.partial(lines, layer=layer) for layer in exits}
    save(draw_over_rates(panels, "acceptance rate", "ticks of PP / ticks (dots: simulated)", width=4.6), out)


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
