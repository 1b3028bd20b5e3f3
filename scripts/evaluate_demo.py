"""Measure a demo family on its held-out files: loss, and how often draft and middle guess the target's next token.

python scripts/evaluate_demo.py                      # the family that comes with the package
python scripts/evaluate_demo.py --family runs/demo/family --json report.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from pipedec_jax.command_line.output import Parser, check_place, fail, run_command
from pipedec_jax.training import prefer_fast_products
from pipedec_jax.whole_files import write_whole

MEANING = {
    "seed": "draws windows and prompts",
    "windows": "windows of held-out text for the loss, a multiple of --batch; 0 takes all text",
    "window": "tokens of a window",
    "prompts": "prompts that the target continues, a multiple of --batch",
    "prompt": "tokens of a prompt",
    "new": "tokens that the target writes after each",
    "samples": "texts kept in the report",
    "batch": "windows or prompts at a time",
}
"""Of the options that are `training.evaluate.EvaluationConfig`'s."""


def main() -> None:
    """Parse and check arguments; a bad one ends with status 2."""
    prefer_fast_products()
    import pipedec_jax
    from pipedec_jax.training.evaluate import EvaluationConfig

    parser = Parser(description=__doc__)
    shipped = Path(pipedec_jax.__file__).parent / "demo"
    parser.add_argument(
        "--family", type=Path, default=shipped, help="folder with target/, middle/, draft/ and the lists"
    )
    parser.add_argument("--library", type=Path, help="source folder (default: the interpreter's standard library)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report to this file")
    parser.add_argument("--samples-shown", type=int, default=1, help="texts to print after the table (default 1)")
    for field in dataclasses.fields(EvaluationConfig):
        meaning = f"{MEANING[field.name]} ({field.default})"
        parser.add_argument(f"--{field.name}", metavar="N", type=int, default=field.default, help=meaning)
    options = parser.parse_args()
    settings = EvaluationConfig(**{name: getattr(options, name) for name in MEANING})
    try:
        check(settings, pipedec_jax.load((options.family / "target").resolve()).config.context)
        if options.json is not None:
            check_place("--json", options.json)
        run(options, settings)
    except (ValueError, OSError) as error:
        fail(error)


def check(settings: Any, context: int) -> None:
    """Raise `ValueError`, naming the option, for sizes that nothing would be measured of, or over the context."""
    for name, value in dataclasses.asdict(settings).items():
        least = 2 if name == "window" else 0 if name in ("seed", "samples", "windows") else 1
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, not {value}")
    for name in ("windows", "prompts"):
        if (value := getattr(settings, name)) % settings.batch:
            raise ValueError(f"--{name} must be a multiple of --batch ({settings.batch}), not {value}")
    for names, value in (("--window", settings.window), ("--prompt and --new", settings.prompt + settings.new)):
        if value > context:
            raise ValueError(f"{names} must be at most the target's context of {context} tokens, not {value}")


def run(options: argparse.Namespace, settings: Any) -> None:
    """Measure, write and print."""
    from pipedec_jax.training.evaluate import table
    from pipedec_jax.training.family import evaluate_directory

    report = evaluate_directory(options.family, settings, options.library)
    if options.json:
        write_whole(options.json, json.dumps(report, indent=1) + "\n")
    print(table(report))
    for sample in report["samples"][: options.samples_shown]:
        print("\n--- prompt\n" + sample["prompt"] + "\n--- the target's greedy text\n" + sample["text"])


if __name__ == "__main__":
    run_command(main)
