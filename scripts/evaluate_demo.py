"""Measure a demo family on its held-out files: loss, and how often draft and middle guess the target's next token.

python scripts/evaluate_demo.py                      # the family that comes with the package
python scripts/evaluate_demo.py --family runs/demo/family --json report.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from pipedec_jax.command_line.output import run_command
from pipedec_jax.training import prefer_fast_products
from pipedec_jax.whole_files import write_whole


def main() -> None:
    prefer_fast_products()
    import pipedec_jax
    from pipedec_jax.training.evaluate import EvaluationConfig, table
    from pipedec_jax.training.family import evaluate_directory

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shipped = Path(pipedec_jax.__file__).parent / "demo"
    parser.add_argument(
        "--family", type=Path, default=shipped, help="folder with target/, middle/, draft/ and the lists"
    )
    parser.add_argument("--library", type=Path, help="source folder (default: the interpreter's standard library)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report to this file")
    parser.add_argument("--samples-shown", type=int, default=1, help="texts to print after the table (default 1)")
    for field in dataclasses.fields(EvaluationConfig):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help=f"default {field.default}")
    options = parser.parse_args()
    names = [field.name for field in dataclasses.fields(EvaluationConfig)]
    settings = EvaluationConfig(**{name: getattr(options, name) for name in names})
    report = evaluate_directory(options.family, settings, options.library)
    if options.json:
        write_whole(options.json, json.dumps(report, indent=1) + "\n")
    print(table(report))
    for sample in report["samples"][: options.samples_shown]:
        print("\n--- prompt\n" + sample["prompt"] + "\n--- the target's greedy text\n" + sample["text"])


if __name__ == "__main__":
    run_command(main)
