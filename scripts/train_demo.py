"""Train the demo family (tokenizer, target, middle, draft) on the Python standard library's own source.

    python scripts/train_demo.py --run runs/demo

Everything a run makes lies in its folder; start the same command again after a kill and it goes on. The finished
family (three Hugging Face directories, the lists of files, the reports) is in the folder's `family/`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipedec_jax.command_line.output import Parser, check_place, fail, run_command
from pipedec_jax.training import prefer_fast_products

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, made or gone on with")
    stages = "text, target, records, middle, draft, export or evaluate"
    parser.add_argument("--until", default="evaluate", metavar="STAGE", help=f"last stage to run: {stages} (default)")
    for name in ("target", "middle", "draft"):
        file = f"demo_{name}.json"
        parser.add_argument(
            f"--{name}", type=Path, default=CONFIGS / file, metavar="FILE", help=f"its plan (default: configs/{file})"
        )
        parser.add_argument(f"--{name}-steps", type=int, metavar="N", help="scale its training to about N steps")
    parser.add_argument(
        "--records", type=Path, default=CONFIGS / "demo_records.json", metavar="FILE",
        help="what the target records for the others (default: configs/demo_records.json)",
    )  # fmt: skip
    parser.add_argument("--library", type=Path, help="source folder (default: the interpreter's standard library)")
    parser.add_argument("--log", type=Path, help="append the training's figures to this file, one JSON object a line")
    return parser.parse_args()


def main() -> None:
    """Parse and check arguments; a bad one ends with status 2."""
    options = parse()
    try:
        run(options)
    except (ValueError, OSError) as error:
        fail(error)


def run(options: argparse.Namespace) -> None:
    """Run the stages that are not done yet."""
    prefer_fast_products()
    from pipedec_jax.training.evaluate import EvaluationConfig, table
    from pipedec_jax.training.family import STAGES, Family, ModelPlan, read_portions
    from pipedec_jax.training.loop import json_log

    if options.until not in STAGES:
        raise ValueError(f"--until {options.until}: choose one of {', '.join(STAGES)}")
    if options.log is not None:
        check_place("--log", options.log)
    plans = {}
    for name in ("target", "middle", "draft"):
        plan = ModelPlan.read(getattr(options, name))
        steps = getattr(options, f"{name}_steps")
        if steps is not None and steps < 1:
            raise ValueError(f"--{name}-steps must be at least 1, not {steps}")
        plans[name] = plan if steps is None else plan.scaled(steps)

    family = Family(options.run, plans, read_portions(options.records), options.library, json_log(options.log))
    for stage in STAGES[: STAGES.index(options.until) + 1]:
        print(f"stage {stage}", flush=True)
        if stage == "evaluate":
            print(table(family.evaluate(EvaluationConfig())))
        else:
            family.run(stage)


if __name__ == "__main__":
    run_command(main)
