"""Train early-exit heads for a frozen target by self-distillation, and store them beside it.

    python scripts/train_exit_head.py --target DIR --exit-layer 4 8 --head block --data src/*.py
    python scripts/train_exit_head.py --target DIR --plan configs/demo_exits.json --data @LIST --held-out @LIST

All exits and variants learn in one pass over the data. Start the same command again after a kill and it goes on. The
heads are in DIR/exits/; the run's checkpoints in its own folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pipedec_jax.command_line.output import Parser, check_place, fail, run_command
from pipedec_jax.training import prefer_fast_products

if TYPE_CHECKING:
    from pipedec_jax.training.exit_run import ExitRun
    from pipedec_jax.training.exits import ExitPlan

HEAD_OPTIONS = ("exit_layer", "head", "width", "feed_forward", "tied")
TRAINING_OPTIONS = (
    "steps", "batch", "length", "learning_rate", "adam_learning_rate", "weight_decay", "hard", "warmup", "accumulate",
    "dtype", "seed",
)  # fmt: skip


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--target", required=True, metavar="DIR", help="converted checkpoint or Hugging Face directory")
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="FILE",
        help="text files, @LIST for a list's files (as train_demo.py writes it), or a directory of records",
    )  # fmt: skip
    parser.add_argument(
        "--held-out", nargs="+", default=[], metavar="FILE",
        help="text files or @LIST to measure on (default: the last of the data's files)",
    )  # fmt: skip
    parser.add_argument("--root", type=Path, help="where a list's files lie (default: Python's standard library)")
    parser.add_argument(
        "--records", type=Path, metavar="FILE",
        help="let the target first continue pieces of the data, as this plan says (configs/demo_records.json), and "
        "train on that text: it is what the heads will meet",
    )  # fmt: skip
    parser.add_argument("--run", type=Path, help="folder of the run (default: runs/exits-..., named by its settings)")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="heads and training, instead of the options below")
    heads = parser.add_argument_group("heads (default: norm-linear)")
    heads.add_argument("--exit-layer", type=int, nargs="+", metavar="E", help="layers of the exit path; one or more")
    heads.add_argument("--head", nargs="+", metavar="VARIANT", help="block or norm-linear; one or both")
    heads.add_argument("--width", type=int, metavar="R", help="a narrower head: map the hidden rows to this width")
    heads.add_argument("--feed-forward", type=int, metavar="F", help="feed-forward width of the block")
    heads.add_argument("--tied", action="store_true", default=None, help="share the target's LM head")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, help="default 1000")
    training.add_argument("--batch", type=int, help="sequences of one pass (default 8)")
    training.add_argument("--length", type=int, help="tokens of a sequence (default 512)")
    training.add_argument("--accumulate", type=int, help="passes of one step (default 1)")
    training.add_argument("--learning-rate", type=float, help="peak, of blocks and maps (default 5e-4)")
    training.add_argument("--adam-learning-rate", type=float, help="peak, of norms and vocabulary (default 5e-4)")
    training.add_argument("--weight-decay", type=float, help="default 0")
    training.add_argument("--hard", type=float, help="share of the loss for the target's greedy token (default 0.5)")
    training.add_argument("--warmup", type=float, help="share of the steps in which the rate rises (default 0.03)")
    training.add_argument("--dtype", help="float32 (default) or bfloat16: what is computed in")
    training.add_argument("--seed", type=int, help="default 0")
    parser.add_argument("--store-dtype", help="what the heads are stored in (default: the target's dtype)")
    parser.add_argument(
        "--every", type=int, metavar="N", help="steps between measurements, 0 for none (default: a tenth of all)"
    )
    parser.add_argument("--save-seconds", type=float, default=180.0, help="time between checkpoints (default 180)")
    parser.add_argument("--log", type=Path, help="append the run's figures to this file, one JSON object a line")
    return parser.parse_args()


def plan_of(options: argparse.Namespace) -> ExitPlan:
    """Heads and training, from a file or the options."""
    from pipedec_jax.training.exits import ExitPlan

    given = [name for name in (*HEAD_OPTIONS, *TRAINING_OPTIONS) if getattr(options, name) is not None]
    if options.plan:
        if given:
            raise ValueError(f"--plan says all about heads and training: leave out --{given[0].replace('_', '-')}")
        return ExitPlan.read(options.plan)
    if not options.exit_layer:
        raise ValueError("say where to exit: --exit-layer E, or --plan FILE")
    return ExitPlan.simple(**{name: getattr(options, name) for name in given})


def open_run(options: argparse.Namespace) -> ExitRun:
    """The run of the options, all of which are checked before anything is computed."""
    from pipedec_jax.exit_store import FOLDER
    from pipedec_jax.training.exit_run import ExitRun
    from pipedec_jax.training.family import read_portions

    for name in ("every", "save_seconds"):
        if getattr(options, name) is not None and not getattr(options, name) >= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 0, not {getattr(options, name)}")
    run = ExitRun(
        options.target,
        plan_of(options),
        options.data,
        options.held_out,
        root=options.root,
        portions=read_portions(options.records) if options.records else (),
        directory=options.run,
        store_dtype=options.store_dtype,
        save_seconds=options.save_seconds,
    )
    check_place("--target", Path(run.target.name) / FOLDER / "head")
    check_place("--run", run.directory / "run")
    if options.log:
        check_place("--log", options.log)
        options.log.parent.mkdir(parents=True, exist_ok=True)
    return run


def main() -> None:
    options = parse()
    prefer_fast_products()
    from pipedec_jax.training.evaluate import agreement_table
    from pipedec_jax.training.exit_run import worse_than_untrained
    from pipedec_jax.training.loop import json_log

    try:
        run = open_run(options)
    except (ValueError, OSError, ImportError) as error:  # the last where pickled files need torch
        fail(error)

    print(f"run in {run.directory}", flush=True)
    for folder in run.replaced:
        print(f"at its end, replaces {folder}", flush=True)
    try:
        every = max(1, run.plan.training.steps // 10) if options.every is None else options.every
        heads = run.train(json_log(options.log), every)
    except ValueError as error:
        fail(error)
    agreement = run.measure(heads)
    print(agreement_table(agreement))
    if worse := worse_than_untrained(agreement):
        print(
            f"the untrained head (--exit-head target) agrees more than {', '.join(worse)}: train longer, or on more "
            "text, best the target's own (--records)"
        )
    for folder in run.save(heads, agreement):
        print(f"saved {folder}")


if __name__ == "__main__":
    run_command(main)
