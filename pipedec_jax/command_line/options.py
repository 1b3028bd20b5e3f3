"""The options of `scripts/generate.py`: which there are, and what of them does not go together."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipedec_jax.command_line.output import Parser
from pipedec_jax.decoding import batch
from pipedec_jax.hierarchy import settings as hierarchy
from pipedec_jax.hosts.group import PATIENCE, START_PATIENCE
from pipedec_jax.pipeline.settings import DRAFTERS, GUESSING, METHODS, OPTIONS_OF
from pipedec_jax.small_files import json_kind

DESCRIPTION = (
    "Decode a prompt with a pipelined LLaMA, streaming the text; without arguments, a sample with the demo family."
)
STATUSES = (
    "Ends with status 0; 1 where every prompt of --prompts is bad, now or before, or nobody reads the output any more; "
    "2 for bad input; 75 when another process is gone; 130 when interrupted."
)
METHOD_NAMES = ", ".join((*METHODS, *hierarchy.METHODS))
SAMPLE = "def quicksort(items):\n"
OF_METHODS: dict[str, tuple[str, ...]] = {
    "models": hierarchy.METHODS,
    "passes": hierarchy.METHODS,
    "form": ("pipespec",),
    **{name: methods for name, methods in OPTIONS_OF.items() if name != "adaptive"},
    "width": (*GUESSING, *hierarchy.METHODS),
    "tensor_parallel": METHODS,
    "idle_ranks": METHODS,
}
"""Methods of an option that others would drop without a word."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command's arguments; ends the process where they are wrong."""
    parser = Parser(description=DESCRIPTION, epilog=STATUSES, formatter_class=argparse.HelpFormatter)
    _add_prompts(parser)
    _add_models(parser)
    _add_exit(parser)
    _add_sizes(parser)
    _add_hierarchy(parser)
    _add_request(parser)
    _add_numbers(parser)
    _add_hosts(parser)
    parser.add_argument("--memory", action="store_true", help="also give the bytes on each device")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text and table")
    options = parser.parse_args(arguments)
    if options.stages is not None and len(options.stages) == 1:
        (options.stages,) = options.stages
    return options


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    """What is decoded."""
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue (a sample when there is none)")
    prompt.add_argument("--prompt-file", metavar="FILE", type=Path, help="read the prompt from a UTF-8 file")
    prompt.add_argument(
        "--prompts", metavar="FILE", type=Path, help="JSON Lines: text, or objects with prompt or messages"
    )
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="of --prompts: append the answers here; goes on where it was"
    )
    parser.add_argument("--chat", action="store_true", help="put the prompt into the target's chat template")


def _add_models(parser: argparse.ArgumentParser) -> None:
    """Who decodes, how, and who guesses."""
    parser.add_argument("--target", metavar="DIR", help="converted or Hugging Face directory (the demo target)")
    parser.add_argument("--draft", metavar="DIR", help="the same for the draft (the demo draft, for the demo target)")
    parser.add_argument(
        "--method", default="best-first", help=f"one of {METHOD_NAMES} (best-first); the text is the same"
    )
    parser.add_argument(
        "--drafter",
        help=f"who guesses: one of {', '.join(DRAFTERS)} (both; the exit head, as model, for ppsd and eesd)",
    )


def _add_exit(parser: argparse.ArgumentParser) -> None:
    """Where the target guesses by itself."""
    parser.add_argument(
        "--exit-layer",
        metavar="E",
        type=int,
        help="layers of the target after which a head guesses, without a draft (of ppsd and eesd, where heads are "
        "stored, as is predicted quickest)",
    )
    parser.add_argument(
        "--exit-head",
        metavar="NAME",
        help="which stored head, by how its name begins, such as block, or target for the untrained one (the best)",
    )
    parser.add_argument("--exit-stages", metavar="N", type=int, help="stages of the exit path (as is quickest)")
    parser.add_argument("--draft-length", metavar="K", type=int, help="tokens eesd drafts, then verifies (4)")


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    """Stages, and sizes of trees."""
    parser.add_argument(
        "--stages",
        metavar="N",
        type=int,
        nargs="+",
        help="stages of the target's layers (4; of pipespec and speculative, 1); of these two also one number for each "
        "model, in the order of --models",
    )
    parser.add_argument("--tensor-parallel", metavar="T", type=int, help="devices that each stage is split over (1)")
    parser.add_argument(
        "--idle-ranks",
        metavar="K",
        type=int,
        help="ranks that only keep devices of a TPU slice in use (0)",
    )
    parser.add_argument(
        "--width",
        metavar="W",
        type=int,
        help="most guesses sent in a tick (16; of ppsd and eesd 1; of pipespec by passes)",
    )
    parser.add_argument(
        "--children",
        metavar="K",
        type=int,
        help="most guesses of the draft after each token (16; of ppsd as --width, at most 16; of eesd 1)",
    )
    parser.add_argument(
        "--draft-steps", metavar="R", type=int, help="of best-first in a tick (as many as fit beside a stage)"
    )
    parser.add_argument("--depth", metavar="D", type=int, help="levels of a tree of stpp (12)")
    parser.add_argument("--pool", metavar="P", type=int, help="most tokens best-first extends unsent (2 (R - 1) W)")
    parser.add_argument("--sharpness", type=float, help="factor on the draft's logits in scoring guesses (1)")
    parser.add_argument("--noise", help="the draft's noise: shared (the target's), independent, none (shared)")


def _add_hierarchy(parser: argparse.ArgumentParser) -> None:
    """What is for hierarchies of models alone."""
    parser.add_argument(
        "--models",
        metavar="DIR",
        nargs="+",
        help="of pipespec and speculative, the smallest first, the target last (the demo family); auto before them "
        "chooses from measurements: models, stages of each, passes and form, or plain decoding where that is faster",
    )
    parser.add_argument(
        "--passes",
        metavar="C",
        type=int,
        nargs="+",
        help="of each model but the target in a tick (on several stages, ticks of its pipe); of speculative, the "
        "lookahead (as is fastest by measured times)",
    )
    parser.add_argument(
        "--form", help="of pipespec: lockstep, or free, each at its own pace (lockstep; with --models auto the faster)"
    )


def _add_request(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn, and where an answer ends."""
    parser.add_argument("--max-new-tokens", metavar="M", type=int, default=128, help="most tokens of the answer (128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (0)")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the k most likely tokens; 0 among all (0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among tokens that hold this probability (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling noise (0)")
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end before this text (repeatable)")


def _add_numbers(parser: argparse.ArgumentParser) -> None:
    """What is computed in, and what time is modeled from."""
    parser.add_argument("--dtype", help="float32, bfloat16, float16 or float64 (float32 on CPU, else the checkpoint's)")
    parser.add_argument(
        "--int8", action="store_true", help="hold the matrices of the target's layers as int8 (rounds them)"
    )
    parser.add_argument(
        "--calibration", metavar="FILE", type=Path, help="JSON of measured seconds for modeled time, in place of bytes"
    )


def _add_hosts(parser: argparse.ArgumentParser) -> None:
    """How several processes find and watch each other."""
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of several processes: where the first one listens")
    parser.add_argument("--num-processes", metavar="P", type=int, help="how many there are, each started like this one")
    parser.add_argument("--process-id", metavar="I", type=int, help="which one this is, from 0; that one prints")
    parser.add_argument(
        "--hosts", metavar="HOW", help="in place of these three: auto (TPU pods, SLURM, Open MPI, Kubernetes)"
    )
    parser.add_argument(
        "--patience",
        metavar="S",
        type=float,
        default=PATIENCE,
        help=f"seconds until a process is taken for gone ({PATIENCE:g})",
    )
    parser.add_argument(
        "--start-patience",
        metavar="S",
        type=float,
        default=START_PATIENCE,
        help=f"seconds to wait for processes to start, read weights and compile ({START_PATIENCE:g})",
    )


def read_prompt(options: argparse.Namespace) -> str:
    """The prompt's text.

    Raises:
        ValueError: when its file holds no text.
        OSError: when there is no such file.
    """
    if options.prompt_file is not None:
        try:
            return options.prompt_file.read_bytes().decode("utf-8-sig")  # editors of Windows put a mark first
        except UnicodeDecodeError as error:
            raise ValueError(f"{options.prompt_file} is not UTF-8 text: {error}") from error
    return SAMPLE if options.prompt is None else options.prompt


def read_calibration(path: Path | None) -> dict[str, float] | None:
    """The times that `modeled.cost.Costs` names, or `None`."""
    if path is None:
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"there is no calibration {path}; scripts/calibrate.py writes one") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold one JSON object of seconds, not {json_kind(values)}")
    return values


def check_options(options: argparse.Namespace) -> None:
    """Raise `ValueError` where an option is given that the method has no use for."""
    for name, methods in OF_METHODS.items():
        if options.method not in methods and getattr(options, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} is not for --method {options.method}, but for {', '.join(methods)}"
            )
    if options.method == "pp" and options.draft is not None:
        raise ValueError("--draft is not for --method pp, where nobody guesses: leave it out")
    for name in ("noise", "sharpness"):
        if options.drafter == "ngram" and getattr(options, name) is not None:
            raise ValueError(f"--{name} is for guesses of a model: look-up (--drafter ngram) has no use for it")


def request_options(options: argparse.Namespace) -> dict[str, Any]:
    """What a prompt's line may change, as `Decoder.request` takes it."""
    return {name: getattr(options, name) for name in batch.OPTIONS}


def paths_as_text(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON takes them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
