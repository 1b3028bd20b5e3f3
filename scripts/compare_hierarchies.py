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

from collections.abc import Iterable

import pipedec_jax
from pipedec_jax.analysis.held_out import held_out_prompts
from pipedec_jax.command_line.held_out_options import add_held_out_options
from pipedec_jax.command_line.output import Parser, run_command
from pipedec_jax.disk_cache import use_compilation_cache

NAMES = ("draft", "middle", "target")
SPREAD = (2,)
"""Stages of a smaller model that are tried, one model at a time."""


def main() -> None:
    parser = Parser(description=__doc__)
    add_held_out_options(parser, prompts=4)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 4], help="of the target, in the table (1 4)")
    parser.add_argument("--delays", action="store_true", help="with injected delays, in place of all else")
    parser.add_argument("--depth", action="store_true", help="two, three and four models, in place of all else")
    parser.add_argument("--delay-ms", type=float, default=10.0, help="mean injected delay of a step (default 10)")
    parser.add_argument("--noise", type=float, default=0.02, help="of the perturbed copy, in deviations (default 0.02)")
    args = parser.parse_args()

    pipedec_jax.use_cpu_devices(len(NAMES) + max(args.stages))
    use_compilation_cache()
    from pipedec_jax.analysis import hierarchy_study as studies
    from pipedec_jax.hierarchy import choice
    from pipedec_jax.hierarchy.report import lines

    models = [pipedec_jax.load_demo(name) for name in NAMES]
    target = models[-1]
    prompts = [target.tokenizer.encode(prompt.text) for prompt in held_out_prompts(args.prompts, args.seed)]
    sources = [model.source for model in models]
    names: list[str] = list(NAMES)
    if args.depth:
        sources.insert(2, studies.perturbed(sources[-1], args.noise))
        names.insert(2, "copy")
    study = studies.Study(names, sources, target.vocab_size, prompts, args.max_new_tokens)

    def show(title: str, rows: Iterable[str]) -> None:
        print(f"\n{title}\n")
        for row in rows:
            print(row, flush=True)

    if args.delays:
        engines = [
            (study.name(which), study.engine(choice.given(which, passes, 6)))
            for which, passes in (((0, 2), (6,)), ((0, 1, 2), (6, 2)))
        ]
        show(
            f"measured, ms a token; steps wait for {args.delay_ms} ms on average",
            studies.delays(study, engines, 1e-3 * args.delay_ms),
        )
        return
    measured = study.measure(*([()] if args.depth else [args.stages, SPREAD]))
    show("passes", lines(measured, None, (), names))
    if args.depth:
        show(
            "efficiency by depth: tokens counted, time modeled, the rest simulated",
            studies.depth(study, measured, [(1, 3), (0, 1, 3), (0, 1, 2, 3)]),
        )
        return
    show("measured, ms a token, and plain decoding's over it", studies.clocks(study, measured, [(0, 2), (1, 2)]))
    show(
        "modeled time; tokens per tick, rollbacks and undone tokens (of each model but the target) counted",
        studies.modeled(study, measured, choice.selections(len(names)), args.stages),
    )
    show(
        "all models, a smaller one on stages as well, modeled",
        studies.places(measured, range(len(names)), args.stages, SPREAD),
    )
    show("classic draft-then-verify, modeled", studies.turns(measured, study))
    show("bounds, whatever the passes", studies.bounds(measured, args.stages))
    show(
        "were rows and exchange free: simulated",
        studies.rows_free(measured, study, choice.selections(len(names)), sorted({*args.stages, 8})),
    )


if __name__ == "__main__":
    run_command(main)
