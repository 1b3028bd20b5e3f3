"""Closed forms of PipeSpec, PPSD and classic speculation against the simulator and, with `--engine`, the engine.

The engine runs a small random target behind a draft of known words, right as often as the acceptance says, so that any
acceptance can be had without trained models. Needs the extra `plots` (matplotlib) for `--out`.

python scripts/plot_closed_forms.py --out scripts/figures/closed_forms.svg
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from pipedec_jax.analysis import closed_forms as forms
from pipedec_jax.analysis.hierarchy import draw_words, simulate

VOCAB = 97
LENGTH = 4096
"""Tokens of a text in the engine."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.8, 0.9, 0.95])
    parser.add_argument("--passes", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--runs", type=int, default=160, help="simulated texts of 2000 tokens (default 160)")
    parser.add_argument("--engine", type=int, default=0, metavar="TEXTS", help=f"texts of {LENGTH} tokens to decode")
    parser.add_argument("--out", type=Path, help="write the plots to this file (.svg, .png, .pdf)")
    args = parser.parse_args()

    rates, passes = (grid.ravel() for grid in np.meshgrid(args.rates, args.passes))
    words = draw_words([np.repeat(rates, args.runs)], 2000, args.runs * len(rates), seed=0)
    run = simulate(words, [np.repeat(passes, args.runs)])
    simulated = run.tokens.reshape(-1, args.runs).sum(1) / run.ticks.reshape(-1, args.runs).sum(1)
    expected = forms.pipespec_tokens(rates, forms.pipespec_guesses(passes))
    counted = decode(rates, passes, args.engine) if args.engine else np.full(len(rates), np.nan)
    print("tokens per verification of PipeSpec with two models")
    print("| acceptance | passes | closed form | simulated | error | engine (counted) | error |")
    print("|" + " --- |" * 7)
    for row in zip(rates, passes, expected, simulated, counted, strict=True):
        rate, count, form, found, engine = row
        print(
            f"| {rate} | {count} | {form:.3f} | {found:.3f} | {100 * (found / form - 1):+.2f} % | "
            f"{engine:.3f} | {100 * (engine / form - 1):+.2f} % |"
        )
    print(f"largest error: simulated {100 * np.max(np.abs(simulated / expected - 1)):.2f} %", end="")
    print(f", engine {100 * np.max(np.abs(counted / expected - 1)):.2f} %" if args.engine else "")
    if args.out is not None:
        draw(args, simulated.reshape(len(args.passes), -1), counted.reshape(len(args.passes), -1))


def decode(rates: np.ndarray, passes: np.ndarray, texts: int) -> np.ndarray:
    """Tokens per tick of the engine, counted, for every pair of an acceptance and a number of passes."""
    import pipedec_jax

    pipedec_jax.use_cpu_devices(2)
    import jax

    from pipedec_jax.config import LlamaConfig
    from pipedec_jax.hierarchy.engine import HierarchyEngine
    from pipedec_jax.hierarchy.program import KnownModel
    from pipedec_jax.hierarchy.settings import HierarchySettings
    from pipedec_jax.model.parameters import MemorySource, initialize

    config = LlamaConfig(
        vocab_size=VOCAB, width=8, feed_forward=8, layers=1, heads=1, kv_heads=1, head_size=8, context=LENGTH + 1
    )
    target = MemorySource(config, initialize(config, jax.random.key(0)))
    settings = HierarchySettings(passes=(1,), width=int(max(passes)), capacity=LENGTH + 8)
    engine = HierarchyEngine([KnownModel(np.zeros(1, np.int32)), target], settings, vocab_size=VOCAB)
    engine.start([1], max_new_tokens=LENGTH)
    text = np.asarray([1, *engine.run(LENGTH).tokens], np.int32)
    found = []
    for number, (rate, count) in enumerate(zip(rates, passes, strict=True)):
        ticks = 0
        for index in range(texts):
            labels = draw_words([rate], len(text), 1, seed=1 + number * texts + index)[0, 0]
            engine.models[0].place_weights(KnownModel((text + labels) % VOCAB), VOCAB)
            engine.settings = dataclasses.replace(settings, passes=(int(count),))
            engine.start([1], max_new_tokens=LENGTH)
            ticks += engine.run(LENGTH).ticks[-1]
        found.append(LENGTH * texts / ticks)
    return np.asarray(found)


def draw(args: Any, simulated: np.ndarray, counted: np.ndarray) -> None:
    """A panel per form."""
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    a = np.linspace(0, 1, 200)
    figure, ((tokens, dear), (classic, ppsd)) = plt.subplots(2, 2, figsize=(11, 8))
    for index, count in enumerate(args.passes):
        (line,) = tokens.plot(a, forms.pipespec_tokens(a, count - 1), label=f"{count} passes")
        tokens.plot(args.rates, simulated[index], "o", color=line.get_color())
        tokens.plot(args.rates, counted[index], "x", color=line.get_color())
        classic.plot(a, forms.speculative_speedup(a, count, 16), label=f"{count} guesses")
        dear.plot(a, forms.pipespec_speedup(a, count, 3.5), label=f"{count} passes, free-running")
        dear.plot(a, forms.pipespec_lockstep_speedup(a, count, 3.5), "--", color=line.get_color())
    tokens.set_title("PipeSpec, tokens per verification (o simulated, x engine)")
    dear.set_title("the same where it lasts 3.5 plain steps, over plain decoding\n(dashed: lockstep)")
    classic.set_title("draft-then-verify over plain decoding, draft 16 times as fast")
    for share in (2, 4, 8):
        (line,) = ppsd.plot(a, forms.ppsd_speedup(a, 1, share), label=f"exit after 1/{share} of the layers")
        ppsd.plot(a, forms.eesd_speedup(a, 4, 1, share), "--", color=line.get_color())
    ppsd.set_title("PPSD over plain decoding, in layers (dashed: EESD, 4 tokens)")
    for panel in (tokens, dear, classic, ppsd):
        panel.set_xlabel("acceptance")
        panel.axhline(1, color="gray", linewidth=0.8)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
