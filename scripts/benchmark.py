"""Runs decoding methods over a file of prompts in turn and writes answers, a summary, tables and plots.

Reads Spec-Bench's questions and HumanEval's problems (.jsonl, .jsonl.gz), or a prompt from each line of a text file.
Without --target and --models, the demo family answers. All methods must give the same tokens, or it fails. Killed, the
same command goes on where it stopped.

python scripts/benchmark.py --prompts question.jsonl --limit 13 --max-new-tokens 64
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipedec_jax
from pipedec_jax.analysis.questions import Question, read_questions, spread_over
from pipedec_jax.command_line import opening
from pipedec_jax.command_line.options import METHOD_NAMES
from pipedec_jax.command_line.options import parse as generate_options
from pipedec_jax.command_line.output import Parser, fail, run_command
from pipedec_jax.hierarchy import settings as hierarchy
from pipedec_jax.pipeline.settings import DRAFTERS, EXIT_ONLY, METHODS

if TYPE_CHECKING:
    from pipedec_jax.decoding.hierarchy import AnyDecoder

TREES = ("stpp", "pipedec", "best-first")
"""Methods that --width is for; the others send one token at a time, or what their passes give."""

SOME = (
    *("width", "drafter", "children", "draft_steps", "depth", "exit_layer", "exit_head", "draft_length"),
    *("passes", "form", "calibration"),
)
"""Options that are of some methods only."""

REPORT = "report"
"""Of what a run keeps of a decoder's choices: lines that say why; the rest are options of `generate.py`."""

EXACT = "all {} settings gave the same tokens in all {} answers"
NEAR_TIES = "{} of {} answers have other tokens than the first setting's ({}, where near ties are common): {}"
NO_PLOTS = "no plots: matplotlib is missing; pip install 'pipedec_jax[plots]' and run the same command again"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--prompts", metavar="FILE", type=Path, required=True, help="questions, problems, or a prompt on each line")
    add(
        "--methods",
        nargs="+",
        metavar="METHOD",
        default=["pp", "stpp", "pipedec", "best-first"],
        help=f"of {METHOD_NAMES} (pp stpp pipedec best-first); pp is the baseline of measured ratios",
    )
    add("--plain", action="store_true", help="also plain decoding by the target on one device, if it fits there")
    add("--stages", metavar="N", type=int, nargs="+", default=[4], help="devices for the target's layers (4)")
    add("--width", metavar="W", type=int, nargs="+", default=[16], help=f"of {', '.join(TREES)} (16)")
    add("--max-new-tokens", metavar="M", type=int, default=128, help="most tokens of an answer (128)")
    add("--temperature", type=float, default=0.0, help="0 takes the most likely token (0)")
    add("--top-k", type=int, default=0, help="sample among the k most likely tokens; 0 among all (0)")
    add("--top-p", type=float, default=1.0, help="sample among tokens that hold this probability (1)")
    add("--seed", type=int, default=0, help="of the sampling noise (0)")
    add("--limit", metavar="Q", type=int, help="questions, evenly spread over the file (all)")
    add("--out", metavar="DIR", type=Path, default=Path("benchmark"), help="where everything is written (benchmark)")
    add(
        "--start-ups",
        metavar="R",
        type=int,
        default=0,
        help="warm starts of each setting to measure, after a cold one (0)",
    )
    add("--chat", action="store_true", help="put the turns into the target's chat template")
    add("--target", metavar="DIR", help="converted or Hugging Face directory (the demo target)")
    add("--draft", metavar="DIR", help="the same for the draft (the demo draft, for the demo target)")
    add(
        "--models", metavar="DIR", nargs="+", help="of pipespec, the smallest first (draft and target; the demo family)"
    )
    add("--passes", metavar="C", type=int, nargs="+", help="of each model of pipespec but the target (measured times)")
    add("--form", default="lockstep", help="of pipespec: lockstep or free (lockstep)")
    add("--exit-layer", metavar="E", type=int, help="of ppsd and eesd (of a stored head, predicted quickest)")
    add("--exit-head", metavar="NAME", help="of ppsd and eesd (the best)")
    add("--draft-length", metavar="K", type=int, help="of eesd (4)")
    add("--drafter", help=f"of {', '.join(TREES)}: one of {', '.join(DRAFTERS)} (both)")
    add("--children", metavar="K", type=int, help=f"of {', '.join(TREES)}: most guesses after each token (16)")
    add("--draft-steps", metavar="R", type=int, help="of best-first in a tick (as many as fit beside a stage)")
    add("--depth", metavar="D", type=int, help="levels of a tree of stpp (12)")
    add("--dtype", help="float32, bfloat16, float16 or float64 (float32 on CPU, else the checkpoint's)")
    add("--int8", action="store_true", help="hold the matrices of the target's layers as int8 (rounds them)")
    add("--calibration", metavar="FILE", type=Path, help="JSON of measured seconds for modeled time (not of pipespec)")
    return parser.parse_args(arguments)


def contenders(options: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """What `generate.py` would be told for each setting, by its name."""
    models = options.models
    if models and models[0] == "auto":
        raise ValueError("--models auto is for generate.py: here, name the models")
    if models is None and options.target is not None:
        models = [name for name in (options.draft, options.target) if name]
    target = options.target or (models[-1] if models else None)
    draft = options.draft or (models[0] if models and options.target is None else None)
    shared = {name: getattr(options, name) for name in ("dtype", "int8")}
    found: dict[str, dict[str, Any]] = {}
    for stages in options.stages:
        for method in options.methods:
            name, used = f"{method}-{stages}", {**shared, "method": method, "stages": stages}
            if method in hierarchy.METHODS:
                if models and len(models) == 1:
                    raise ValueError(
                        f"--methods {method} needs --draft DIR beside --target DIR, or two --models or more"
                    )
                pair = [models[0], models[-1]] if models and method == "speculative" else models
                used["models"] = pair
                if method == "pipespec":
                    used |= {"form": options.form, "passes": options.passes}
                found[name] = used
                continue
            used |= {"target": target, "calibration": options.calibration}
            if method in EXIT_ONLY:
                exits = ("exit_layer", "exit_head", *(["draft_length"] if method == "eesd" else []))
                found[name] = used | {key: getattr(options, key) for key in exits}
            elif method in TREES:
                own = {"stpp": ["depth"], "best-first": ["draft_steps"]}.get(method, [])
                used |= {key: getattr(options, key) for key in ("drafter", "children", *own)}
                used["draft"] = None if options.drafter == "ngram" else draft
                for width in options.width:
                    found[f"{name}x{width}"] = used | {"width": width}
            elif method in METHODS:
                found[name] = used
            else:
                raise ValueError(f"method must be one of {METHOD_NAMES}, not {method!r}")
    if options.plain and "pp-1" not in found:
        found["pp-1"] = {**shared, "method": "pp", "stages": 1, "target": target, "calibration": options.calibration}
    plain = vars(parse(["--prompts", ""]))
    for name in SOME:
        if getattr(options, name) != plain[name] and not any(name in used for used in found.values()):
            raise ValueError(f"--{name.replace('_', '-')} is of no use to --methods {' '.join(options.methods)}")
    return {name: overlaid(used) for name, used in found.items()}


def overlaid(used: dict[str, Any]) -> argparse.Namespace:
    """The defaults of `generate.py`, but for these."""
    return argparse.Namespace(**{**vars(generate_options([])), **used})


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What a run must keep when it goes on after a kill; how many questions may change."""
    import jax

    from pipedec_jax.analysis.benchmark import digest

    given = {name: value for name, value in vars(options).items() if name not in ("out", "limit", "start_ups")}
    given["prompts"] = f"{options.prompts.name}, SHA-256 {digest(options.prompts)}"
    given["calibration"] = digest(options.calibration) if options.calibration else None
    return given | {"pipedec_jax": pipedec_jax.__version__, "jax": jax.__version__}


def main(arguments: list[str] | None = None) -> None:
    """Run; ends with status 2 for bad input, 1 when tokens differ, 130 when interrupted."""
    options = parse(arguments)
    try:
        run(options)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def run(options: argparse.Namespace) -> None:
    try:
        if options.out.exists() and not options.out.is_dir():
            raise ValueError(f"--out must be a directory: {options.out} is a file")
        if options.start_ups < 0:
            raise ValueError(f"--start-ups must be at least 0, not {options.start_ups}")
        questions = spread_over(read_questions(options.prompts), options.limit)
        chosen = contenders(options)
        most = max(options.stages) + max(1, len(options.models or opening.DEMO["pipespec"]) - 1)
        pipedec_jax.use_cpu_devices(most)
        benchmark, settings, reports = prepare(options, questions, chosen)
    except (ValueError, OSError, ImportError) as error:  # the last where pickled files need torch
        fail(error)
    from pipedec_jax.clock import TokensDifferError

    try:
        benchmark.run()
    except TokensDifferError as error:
        for name in ("summary.json", "table.md"):  # of an earlier run, which said that all was well
            (options.out / name).unlink(missing_ok=True)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except (ValueError, OSError) as error:
        fail(error)
    start_ups = measure_start_ups(options, chosen, benchmark)
    report(options, benchmark, settings, reports, start_ups)


def measure_start_ups(
    options: argparse.Namespace, chosen: dict[str, argparse.Namespace], benchmark: Any
) -> list[dict[str, Any]]:
    """Starts of a process for each setting, kept as lines of a file, so that a killed run goes on."""
    from tqdm import tqdm

    from pipedec_jax.analysis import startup
    from pipedec_jax.analysis.answer_file import LineFile

    kept = LineFile(options.out / "start_ups.jsonl")
    missing = (
        [name for name in chosen if name not in {row["decoder"] for row in kept.rows}] if options.start_ups else []
    )
    plain = vars(generate_options([]))
    question = next(one for one in benchmark.questions if one.id not in benchmark.left_out)
    for name in tqdm(missing, desc="starting up", unit="setting", disable=None):
        given = {key: value for key, value in vars(chosen[name]).items() if value != plain.get(key)}
        with tempfile.TemporaryDirectory(prefix="pipedec_jax_start_") as place:
            seconds = [
                startup.measure_first_text(given, question.turns[0], options.max_new_tokens, Path(place))
                for _ in range(1 + options.start_ups)
            ]
        kept.append({"decoder": name, "measured_cold_s": seconds[0], "measured_warm_s": seconds[1:]})
    return kept.rows


def prepare(
    options: argparse.Namespace, questions: list[Question], chosen: dict[str, argparse.Namespace]
) -> tuple[Any, dict[str, Any], dict[str, list[str]]]:
    """The benchmark with all its decoders, its settings, and by decoder what was chosen and why."""
    from pipedec_jax.analysis.benchmark import Benchmark, open_run, save_run

    settings = settings_of(options)
    earlier = open_run(options.out, settings)
    for name, found in earlier.items():
        vars(chosen[name]).update({key: value for key, value in found.items() if key != REPORT})
    decoders = {name: opening.open_decoder(used) for name, used in chosen.items()}
    request = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    benchmark = Benchmark(decoders, questions, options.out, request, options.chat)
    for decoder in decoders.values():
        decoder.prepare()  # only now that all else is well
    # What was chosen, by measurement or of the heads there are, must not be chosen otherwise when the run goes on.
    kept = {name: found for name, decoder in decoders.items() if (found := chosen_by(decoder))} | earlier
    save_run(options.out, settings, kept)
    return benchmark, settings, {name: found.get(REPORT, []) for name, found in kept.items()}


def chosen_by(decoder: AnyDecoder) -> dict[str, Any]:
    """Options of `generate.py` under which a decoder would be what it chose to be, and what it says of that."""
    if isinstance(decoder, pipedec_jax.HierarchyDecoder):
        return {"passes": decoder.settings.passes, "width": decoder.settings.width, REPORT: decoder.report()}
    head = decoder.exit_head_config
    if head is None or not decoder.exit_forecasts:
        return {}
    return {"exit_layer": head.exit_layer, "exit_head": head.name, REPORT: decoder.report()}


def report(
    options: argparse.Namespace,
    benchmark: Any,
    settings: dict[str, Any],
    reports: dict[str, list[str]],
    start_ups: list[dict[str, Any]],
) -> None:
    """Write and print what was found."""
    from pipedec_jax.analysis import benchmark_summary
    from pipedec_jax.hosts.processes import usable_cores
    from pipedec_jax.whole_files import write_whole

    who = {
        name: described(decoder, benchmark.models[name], reports.get(name, []))
        for name, decoder in benchmark.decoders.items()
    }
    summary = benchmark_summary.summarize(who, benchmark.rows(), benchmark.warm_ups.rows, start_ups)
    device = next(iter(benchmark.decoders.values())).devices[0]
    cores = usable_cores()
    where = f"{device.platform}, {device.device_kind}" if device.platform != "cpu" else f"CPU, {cores} cores"
    dtype = next(iter(benchmark.decoders.values())).dtype.name
    exact = EXACT.format(len(who), summary["answers"])
    if differing := {name: len(found) for name, found in benchmark.differing.items() if found}:
        counts = ", ".join(f"{count} of {name}" for name, count in differing.items())
        exact = NEAR_TIES.format(sum(differing.values()), summary["answers"], dtype, counts)
    summary = {
        "settings": settings,
        "models": benchmark.directories,
        "machine": where,
        "tokens": exact,
        "first_differences": benchmark.differing,
        "questions_left_out": {str(key): reason for key, reason in benchmark.left_out.items()},
        **summary,
    }
    out: Path = options.out
    write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    left = len(summary["questions_left_out"])
    lines = [
        f"{summary['questions']} questions of {options.prompts.name} ({left} more are too long), {summary['answers']} "
        f"answers of at most {options.max_new_tokens} tokens, temperature {options.temperature:g}; {where}, "
        f"{dtype}. Checked: {exact}."
    ]
    if device.platform == "cpu":
        lines.append(
            f"Stages are virtual devices that share {cores} cores: measured times of more than {cores} devices show no "
            "pipeline's gain."
        )
    lines += [f"{name}: {line}" for name, one in who.items() for line in one.chosen]
    text = "\n".join(lines) + "\n\n" + benchmark_summary.tables(summary)
    write_whole(out / "table.md", text)
    print(text)
    try:
        plots = benchmark_summary.plot(summary, out)
    except ImportError:
        plots = []
        print(NO_PLOTS, file=sys.stderr)
    names = ["summary.json", "table.md", *(path.name for path in plots)]
    print(f"written to {out}: {', '.join(names)}, answers/ (Spec-Bench's format), figures/")


def described(decoder: AnyDecoder, models: list[str], chosen: list[str]) -> Any:
    from pipedec_jax.analysis.benchmark_summary import Contender

    if isinstance(decoder, pipedec_jax.HierarchyDecoder):
        width = decoder.settings.widths[-1]
    else:
        width = None if decoder.method == "pp" else decoder.width
    return Contender(decoder.method, decoder.stages, len(decoder.devices), width, tuple(models), tuple(chosen))


if __name__ == "__main__":
    run_command(main)
