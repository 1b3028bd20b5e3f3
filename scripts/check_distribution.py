"""The law of drawn tokens: the engine's draws against plain sampling, by a chi-square test, with a control.

Small random models, a fresh seed for every draw. Each setting's first token, its second (guessed before the first was
drawn), and both together are tested against plain sampling's exact probabilities; the controls are the first and the
second at a total variation of 0.02 from theirs, which the test must reject. Status 1 where a law is rejected, or a
control is not.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import pipedec_jax
from pipedec_jax.command_line.numbers import from_0, from_1, up_to_1
from pipedec_jax.command_line.output import Parser, run_command
from pipedec_jax.config import LlamaConfig
from pipedec_jax.sampling import Sampling

if TYPE_CHECKING:
    from pipedec_jax.model.parameters import Parameters
    from pipedec_jax.pipeline.engine import Engine

CONFIG = LlamaConfig(vocab_size=32, width=32, feed_forward=48, layers=4, heads=4, kv_heads=2, head_size=8, context=256)
METHODS = ("pp", "pipedec", "best-first", "stpp", "ppsd", "eesd")
EXIT_LAYER = 2
SAMPLINGS = (
    Sampling(temperature=1.0),
    Sampling(temperature=0.7),
    Sampling(temperature=1.0, top_k=12),
    Sampling(temperature=1.0, top_p=0.9),
)


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--draws", type=from_1, default=40000, help="answers for each setting (default 40000)")
    parser.add_argument("--stages", type=from_1, default=2, help="stages of the target (default 2)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="methods (default: all)")
    numbers = range(1, 1 + len(SAMPLINGS))
    parser.add_argument(
        "--samplings", type=int, nargs="+", choices=numbers, default=numbers, help="which (default: all)"
    )
    parser.add_argument("--seed", type=from_0, default=0, help="first seed of all (default 0)")
    parser.add_argument("--alpha", type=up_to_1, default=1e-4, help="a law is rejected below this p (default 1e-4)")
    args = parser.parse_args()
    if args.draws < 20000:
        parser.error(f"--draws must be at least 20000 to see a distortion of 0.02, not {args.draws}")
    return args


def open_engine(method: str, stages: int, target: Parameters, draft: Parameters) -> Engine:
    """A method with a small tree, the untrained head where it drafts at an exit."""
    from pipedec_jax.model.exit_head import ExitHead, ExitHeadConfig
    from pipedec_jax.model.parameters import MemorySource
    from pipedec_jax.pipeline.engine import Engine
    from pipedec_jax.pipeline.settings import EXIT_ONLY, EngineSettings

    exits, most = method in EXIT_ONLY, 1 if method == "eesd" else 4
    settings = EngineSettings(
        method=method,
        stages=stages,
        width=most,
        children=most,
        depth=2,
        exit_layer=EXIT_LAYER if exits else None,
        draft_length=2,
        prefill_width=8,
        capacity=64,
    )
    return Engine(
        MemorySource(CONFIG, target),
        None if exits or method == "pp" else MemorySource(CONFIG, draft),
        settings,
        vocab_size=CONFIG.vocab_size,
        exit_head=ExitHead(ExitHeadConfig(EXIT_LAYER, "target"), {}) if exits else None,
    )


def main() -> None:
    """Draw, test and print a table."""
    args = parse()
    pipedec_jax.use_cpu_devices(args.stages + 1)
    from pipedec_jax.analysis.distribution import check, pair_of_models

    target, draft = pair_of_models(CONFIG, seed=1)
    seed, failed = args.seed, False
    print(f"measured: p of a chi-square test, {args.draws} draws a setting, {args.stages} stages; cells in brackets")
    heads = "method", "temperature", "top k", "top p", "first token", "second", "both", "first, 0.02 off"
    print(f"| {' | '.join(heads)} | second, 0.02 off |\n|{' --- |' * 9}")
    for method in args.methods:
        engine = open_engine(method, args.stages, target, draft)
        for number in args.samplings:
            sampling = SAMPLINGS[number - 1]
            drawn = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed)
            seed += args.draws  # no two settings share a seed
            found = check(engine, target, [5, 3, 17, 9], drawn, args.draws)
            rows = found.first, found.second, found.pair, found.control_first, found.control_second
            cells = [f"{row.p_value:.2g} ({row.cells})" for row in rows]
            print(
                f"| {method} | {drawn.temperature} | {drawn.top_k} | {drawn.top_p} | {' | '.join(cells)} |", flush=True
            )
            failed |= not found.passed(args.alpha)
    if failed:
        raise SystemExit("a law was rejected, or a control was not: see the table")


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
