"""Closed forms of PipeSpec, draft-then-verify and the filled pipe against the simulators and, with `--engine`, counted.

The engine runs a small random target behind models of known words, right as often as the acceptance says. Needs the
extra `plots` (matplotlib) for `--out`.

python scripts/plot_closed_forms.py --out scripts/figures/closed_forms.svg --engine 4
python scripts/plot_closed_forms.py --deep 4        # three and four models: the simulator against the engine
python scripts/plot_closed_forms.py --sweep         # how long thousands of settings take
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

import pipedec_jax
from pipedec_jax.analysis.known_words import texts_needed
from pipedec_jax.command_line.numbers import from_0, from_1, up_to_1
from pipedec_jax.command_line.output import Parser, check_picture, run_command
from pipedec_jax.modeled import closed_forms as forms
from pipedec_jax.modeled.cost import speedup_filled_pipe
from pipedec_jax.modeled.draft_then_verify import simulate_rounds
from pipedec_jax.modeled.hierarchy import draw_words, simulate
from pipedec_jax.plots.closed_forms import LOOKAHEADS, STAGES, draw_closed_forms
from pipedec_jax.plots.style import save

LENGTH = 4096
"""Tokens of a text in the engine."""
SIMULATED = 2000
"""Tokens of a simulated text."""
WITHIN = 0.03
"""Relative error of the engine's counts to which chance is kept; see `known_words.texts_needed`."""
DEEP = (
    ((0.6, 0.8), (4, 2)),
    ((0.8, 0.9), (8, 2)),
    ((0.9, 0.95), (16, 3)),
    ((0.6, 0.8, 0.9), (4, 2, 1)),
    ((0.8, 0.9, 0.95), (8, 3, 2)),
    ((0.9, 0.95, 0.98), (16, 4, 2)),
)
"""Acceptances of neighbours and passes, of three and four models."""


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--rates", type=up_to_1, nargs="+", default=[0.3, 0.5, 0.7, 0.8, 0.9, 0.95])
    parser.add_argument("--passes", type=from_1, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--runs", type=from_1, default=160, help=f"simulated texts of {SIMULATED} tokens (default 160)")
    parser.add_argument(
        "--engine",
        type=from_0,
        default=0,
        metavar="TEXTS",
        help=f"least texts of {LENGTH} tokens a cell to decode; more where their simulated spread says that chance "
        f"could exceed {100 * WITHIN:g} %% (4 standard deviations)",
    )
    parser.add_argument(
        "--deep", type=from_0, default=0, metavar="TEXTS", help="the same with deep ones, and nothing else"
    )
    parser.add_argument("--sweep", action="store_true", help="time a sweep, and nothing else")
    parser.add_argument("--out", type=Path, help="write the plots to this file (.svg, .png, .pdf)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.out:
        check_picture("--out", args.out)
    if args.sweep:
        sweep()
        return
    pipedec_jax.use_cpu_devices(4)
    if args.deep:
        deep(args.deep)
        return
    chance, tokens, counted = two_models(args)
    classic, filled = draft_then_verify(args.rates), filled_pipe(args.rates)
    if args.out is not None:
        save(draw_closed_forms(args.rates, args.passes, chance, tokens, counted, classic, filled), args.out)


def two_models(args: argparse.Namespace) -> list[np.ndarray]:
    """PipeSpec with two models, as a table.

    Returns:
        By passes and rates: simulated chances that a pass finds its input valid, tokens per verification, and these
        as the engine counted them (NaN without it).
    """
    rates, passes = (grid.ravel() for grid in np.meshgrid(args.rates, args.passes))
    words = draw_words([np.repeat(rates, args.runs)], SIMULATED, args.runs * len(rates), seed=0)
    run = simulate(words, [np.repeat(passes, args.runs)])
    tokens, ticks, verified = (
        total.reshape(-1, args.runs).sum(1) for total in (run.tokens, run.ticks, run.verifications)
    )
    guesses = forms.pipespec_guesses(passes)
    expected, chance = forms.pipespec_tokens(rates, guesses), forms.pipespec_steady_chance(rates, guesses)
    counted, texts = np.full(len(rates), np.nan), np.zeros(len(rates), int)
    if args.engine:
        spread = run.ticks.reshape(-1, args.runs)
        texts = np.asarray([max(args.engine, texts_needed(each, SIMULATED, LENGTH, WITHIN)) for each in spread])
        counted = decode(rates, passes, texts)
    print("tokens per verification of PipeSpec with two models, and the chance that a pass finds its input valid")
    engine = ["texts", "engine (counted)", "error"] if args.engine else []
    headings = ["acceptance", "passes", "closed form", "simulated", "error", *engine, "chance", "simulated", "error"]
    print(f"| {' | '.join(headings)} |\n|{' --- |' * len(headings)}")
    for row in zip(rates, passes, expected, tokens / ticks, texts, counted, chance, verified / ticks, strict=True):
        rate, count, form, found, many, own, valid, seen = row
        errors = [f"{100 * (one / other - 1):+.2f} %" for one, other in ((found, form), (own, form), (seen, valid))]
        cells = [f"{rate}", f"{count}", f"{form:.3f}", f"{found:.3f}", errors[0]]
        cells += [f"{many}", f"{own:.3f}", errors[1]] if args.engine else []
        print(f"| {' | '.join([*cells, f'{valid:.3f}', f'{seen:.3f}', errors[2]])} |")
    print(f"largest error: simulated {largest(tokens / ticks, expected)}, {largest(verified / ticks, chance)}", end="")
    print(f", engine {largest(counted, expected)}" if args.engine else "")
    shape = (len(args.passes), len(args.rates))
    return [found.reshape(shape) for found in (verified / ticks, tokens / ticks, counted)]


def draft_then_verify(rates: list[float]) -> np.ndarray:
    """Simulated tokens per round of draft-then-verify, by lookahead and rate."""
    texts = draw_words([rates], 240_000, len(rates), seed=1)
    rounds = [[simulate_rounds(texts[:, run], count) for run in range(len(rates))] for count in LOOKAHEADS]
    found = np.asarray([[one.tokens / one.rounds for one in row] for row in rounds])
    expected = np.asarray([forms.accepted_run(rates, count) for count in LOOKAHEADS])
    print(f"draft-then-verify, tokens per round: largest error, simulated {largest(found, expected)}")
    return found


def filled_pipe(rates: list[float]) -> np.ndarray:
    """PP's ticks over a filled pipe's, simulated, by stages and rate."""
    many = draw_words([np.repeat(rates, 20)], 6000, 20 * len(rates), seed=1)
    pipelined = [simulate(many, [1], stages=count) for count in STAGES]
    sums = [[total.reshape(-1, 20).sum(1) for total in (run.tokens, run.ticks)] for run in pipelined]
    found = np.asarray([count * made / took for count, (made, took) in zip(STAGES, sums, strict=True)])
    expected = np.asarray([[speedup_filled_pipe(rate, count) for rate in rates] for count in STAGES])
    print(f"filled pipe, PP's ticks over these: largest error, simulated {largest(found, expected)}")
    return found


def largest(found: np.ndarray, expected: np.ndarray) -> str:
    """The largest relative error."""
    return f"{100 * np.max(np.abs(found / expected - 1)):.2f} %"


def decode(rates: np.ndarray, passes: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Tokens per tick of the engine with two models, counted, for every cell: acceptance, passes, number of texts."""
    from pipedec_jax.analysis.known_words import KnownHierarchy

    engine = KnownHierarchy(2, LENGTH, int(max(passes)))
    seeds = 1 + np.cumsum(texts) - texts
    found = [
        engine.count([rate], [int(count)], int(many), seed=int(seed))
        for rate, count, many, seed in zip(rates, passes, texts, seeds, strict=True)
    ]
    return np.asarray([one.tokens / one.ticks for one in found])


def deep(texts: int) -> None:
    """Three and four models: tokens per tick and rollbacks, counted and simulated with the same words."""
    from pipedec_jax.analysis.known_words import KnownHierarchy

    print("| models | acceptance of neighbours | passes | engine (counted) | simulated | same counts | rollbacks |")
    print("|" + " --- |" * 7)
    engines = {models: KnownHierarchy(models, 1024, 24) for models in (3, 4)}
    for rates, passes in DEEP:
        found = engines[len(rates) + 1].count(rates, passes, texts, seed=0)
        shown = [", ".join(map(str, numbers)) for numbers in (rates, passes)]
        rolled = ", ".join(f"{count / found.tokens:.2f}" for count in found.rollbacks)
        print(
            f"| {len(rates) + 1} | {shown[0]} | {shown[1]} | {found.tokens / found.ticks:.3f} | "
            f"{found.tokens / found.simulated:.3f} | {'yes' if found.same else 'no'} | {rolled} |",
            flush=True,
        )
    print("tokens per pass of the target; rollbacks a token of each model but the target, counted")


def sweep() -> None:
    """How long thousands of settings take, measured."""
    begun = time.perf_counter()
    rates, passes, cost = np.meshgrid(np.linspace(0, 1, 101), np.arange(1, 65), np.linspace(1, 4, 31))
    for form in (forms.pipespec_speedup, forms.pipespec_lockstep_speedup):
        form(rates, passes, cost)
    forms.speculative_speedup(rates, passes, 16.0, cost)
    seconds = time.perf_counter() - begun
    print(f"closed forms: {3 * rates.size} settings in {seconds:.2f} s (measured)")
    for models, settings in ((2, 4000), (3, 2000), (4, 1000)):
        random, begun = np.random.default_rng(0), time.perf_counter()
        words = draw_words(random.uniform(0.3, 0.98, (models - 1, settings)).tolist(), 400, settings, seed=0)
        counts = [random.integers(1, 8, settings) for _ in range(models - 1)]
        simulate(words, counts, width=random.integers(2, 16, settings))
        seconds = time.perf_counter() - begun
        print(f"simulator, {models} models: {settings} settings of 400 tokens in {seconds:.2f} s (measured)")
    for method in ("pipedec", "best-first"):
        seconds = sweep_trees(method, 1000)
        print(f"simulator, {method}, 8 stages: 1000 hit rates, 64 tokens each, in {seconds:.2f} s (measured)")


def sweep_trees(method: str, rates: int) -> float:
    """Seconds that the simulator of the tree methods takes over so many hit rates, compiling apart."""
    from pipedec_jax.analysis.simulator import Simulator
    from pipedec_jax.config import LlamaConfig
    from pipedec_jax.drafters.replay import ReplayDrafter, random_text
    from pipedec_jax.pipeline.settings import EngineSettings

    config = LlamaConfig(
        vocab_size=97, width=8, feed_forward=8, layers=8, heads=1, kv_heads=1, head_size=8, context=128
    )
    settings = EngineSettings(method=method, stages=8, width=4, children=2)
    drafter = ReplayDrafter(children=2, vocab_size=97)
    simulator = Simulator(config, None, settings, vocab_size=97, drafter=drafter)
    text, at_rate = random_text(64, 97, seed=0)
    simulator.run(text[:1], text[1:], drafter_params=at_rate(0.5))
    begun = time.perf_counter()
    for rate in np.linspace(0, 1, rates):
        simulator.run(text[:1], text[1:], drafter_params=at_rate(float(rate)))
    return time.perf_counter() - begun


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
