"""PipeSpec with the demo family: counts, modeled time and wall clock against plain and speculative decoding.

Modeled time charges every tick the slowest model's passes, as measured in the same run among many in one program, with
the rows that they compute; rows of a verification are thus not free. A tick of a target on several stages is charged
the longest stage's part of a pass and what the exchange was measured to add. The baseline of every ratio is plain
decoding by the target alone on one device, its own loop, in the same run.

python scripts/compare_hierarchies.py                    # every selection of models; clocks of two models
python scripts/compare_hierarchies.py --delays           # lockstep and free-running with slow and jittery models
python scripts/compare_hierarchies.py --depth            # two, three and four models (the fourth a perturbed copy)
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import pipedec_jax
from pipedec_jax.analysis.held_out import held_out_prompts
from pipedec_jax.command_line.held_out_options import add_held_out_options, check_stages
from pipedec_jax.command_line.numbers import amount, from_1
from pipedec_jax.command_line.output import Parser, run_command
from pipedec_jax.disk_cache import use_compilation_cache

if TYPE_CHECKING:
    from pipedec_jax.analysis.hierarchy_study import Study

NAMES = ("draft", "middle", "target")
SPREAD = (2,)
"""Stages of a smaller model that are tried, one model at a time."""


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_held_out_options(parser, prompts=4)
    parser.add_argument("--stages", type=from_1, nargs="+", default=[1, 4], help="of the target, in the table (1 4)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--delays", action="store_true", help="with injected delays, in place of all else")
    instead.add_argument("--depth", action="store_true", help="two, three and four models, in place of all else")
    parser.add_argument("--delay-ms", type=amount, default=10.0, help="mean injected delay of a step (default 10)")
    parser.add_argument("--noise", type=amount, default=0.02, help="of the perturbed copy, in deviations (0.02)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    pipedec_jax.use_cpu_devices(len(NAMES) + max(args.stages))
    use_compilation_cache()
    from pipedec_jax.analysis import hierarchy_study as studies

    models = [pipedec_jax.load_demo(name) for name in NAMES]
    target = models[-1]
    check_stages(args.stages, target.config)
    prompts = [target.tokenizer.encode(prompt.text) for prompt in held_out_prompts(args.prompts, args.seed)]
    sources = [model.source for model in models]
    names: list[str] = list(NAMES)
    if args.depth:
        sources.insert(2, studies.perturbed(sources[-1], args.noise))
        names.insert(2, "copy")
    study = studies.Study(names, sources, target.vocab_size, prompts, args.max_new_tokens)
    if args.delays:
        show_delays(study, args.delay_ms)
    elif args.depth:
        show_depth(study)
    else:
        show_selections(study, args.stages)


def show(title: str, rows: Iterable[str]) -> None:
    """Print a table's rows as they come."""
    print(f"\n{title}\n")
    for row in rows:
        print(row, flush=True)


def show_delays(study: Study, milliseconds: float) -> None:
    """Lockstep and free-running with slow and jittery models."""
    from pipedec_jax.analysis.hierarchy_study import delays
    from pipedec_jax.hierarchy.choice import given

    engines = [
        (study.name(which), study.engine(given(which, passes, 6)))
        for which, passes in (((0, 2), (6,)), ((0, 1, 2), (6, 2)))
    ]
    title = f"measured, ms a token; steps wait for {milliseconds} ms on average"
    show(title, delays(study, engines, 1e-3 * milliseconds))


def show_depth(study: Study) -> None:
    """Two, three and four models."""
    from pipedec_jax.analysis.hierarchy_study import depth
    from pipedec_jax.hierarchy.report import lines

    measured = study.measure(())
    show("passes", lines(measured, None, (), study.names))
    rows = depth(study, measured, [(1, 3), (0, 1, 3), (0, 1, 2, 3)])
    show("efficiency by depth: tokens counted, time modeled, the rest simulated", rows)


def show_selections(study: Study, stages: Sequence[int]) -> None:
    """Every selection of models, on so many stages of the target; clocks of two models."""
    from pipedec_jax.analysis import hierarchy_study as studies
    from pipedec_jax.hierarchy.choice import selections
    from pipedec_jax.hierarchy.report import lines

    measured, every = study.measure(stages, SPREAD), selections(len(study.names))
    show("passes", lines(measured, None, (), study.names))
    show("measured, ms a token, and plain decoding's over it", studies.clocks(study, measured, [(0, 2), (1, 2)]))
    show(
        "modeled time; tokens per tick, rollbacks and undone tokens (of each model but the target) counted",
        studies.modeled(study, measured, every, stages),
    )
    show(
        "all models, a smaller one on stages as well, modeled",
        studies.places(measured, range(len(study.names)), stages, SPREAD),
    )
    show("classic draft-then-verify, modeled", studies.turns(measured, study))
    show("bounds, whatever the passes", studies.bounds(measured, stages))
    show(
        "were rows and exchange free: simulated",
        studies.rows_free(measured, study, every, sorted({*stages, 8})),
    )


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
