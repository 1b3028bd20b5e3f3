"""Decode a prompt with a pipelined LLaMA, streaming the text; without arguments, a sample with the demo family."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pipedec_jax
from pipedec_jax.analysis.exit_cost import Cycle
from pipedec_jax.decoding import batch
from pipedec_jax.disk_cache import use_compilation_cache
from pipedec_jax.hierarchy import settings as hierarchy
from pipedec_jax.pipeline.settings import DRAFTERS, EXIT_ONLY, METHODS

if TYPE_CHECKING:
    AnyDecoder = pipedec_jax.Decoder | pipedec_jax.HierarchyDecoder

METHOD_NAMES = ", ".join((*METHODS, *hierarchy.METHODS))
DEMO = {"pipespec": ("draft", "middle", "target"), "speculative": ("draft", "target")}
SAMPLE = "def quicksort(items):\n"
OF_METHODS: dict[str, tuple[str, ...]] = {
    "models": hierarchy.METHODS,
    "passes": hierarchy.METHODS,
    "form": ("pipespec",),
    "depth": ("stpp",),
    "draft_length": ("eesd",),
    "noise": METHODS,
    "sharpness": METHODS,
    "tensor_parallel": METHODS,
}
"""Methods of an option that others would drop without a word."""
NO_SETTINGS = ("prompt", "prompt_file", "prompts", "out", "json", "memory")
"""What may change when a file of prompts is gone on with."""
NOTHING = {"finish_reason": "interrupted", "new_tokens": 0, "token_ids": [], "text": ""}
"""Figures of an answer that was interrupted before its first token."""


class Parser(argparse.ArgumentParser):
    """Reports bad arguments in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with status 2."""
        fail(message)


def fail(message: object) -> NoReturn:
    """Say what is wrong with the input, and stop."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
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
    parser.add_argument("--target", metavar="DIR", help="converted or Hugging Face directory (the demo target)")
    parser.add_argument("--draft", metavar="DIR", help="the same for the draft (the demo draft, for the demo target)")
    parser.add_argument("--method", default="best-first", help=f"one of {METHOD_NAMES}; the text is the same")
    parser.add_argument(
        "--drafter",
        help=f"who guesses: one of {', '.join(DRAFTERS)} (both; the exit head, as model, for ppsd and eesd)",
    )
    parser.add_argument(
        "--exit-layer", metavar="E", type=int, help="layers of the target after which a head guesses, without a draft"
    )
    parser.add_argument(
        "--exit-head",
        metavar="NAME",
        help="which stored head, such as block, or target for the untrained one (the best)",
    )
    parser.add_argument("--exit-stages", metavar="N", type=int, help="stages of the exit path (as is quickest)")
    parser.add_argument("--draft-length", metavar="K", type=int, default=4, help="tokens eesd drafts, then verifies")
    parser.add_argument("--stages", metavar="N", type=int, help="stages of the target's layers (4; of pipespec, 1)")
    parser.add_argument(
        "--tensor-parallel", metavar="T", type=int, default=1, help="devices that each stage is split over (1)"
    )
    parser.add_argument(
        "--width",
        metavar="W",
        type=int,
        help="most guesses sent in a tick (16; of ppsd and eesd 1; of pipespec by passes)",
    )
    parser.add_argument(
        "--children", metavar="K", type=int, help="most guesses of the draft after each token (16; of ppsd and eesd 1)"
    )
    parser.add_argument(
        "--draft-steps", metavar="R", type=int, help="of best-first in a tick (as many as fit beside a stage)"
    )
    parser.add_argument("--depth", metavar="D", type=int, default=4, help="levels of a tree of stpp")
    parser.add_argument("--pool", metavar="P", type=int, help="most tokens best-first extends unsent")
    parser.add_argument("--sharpness", type=float, default=1.0, help="factor on the draft's logits in scoring guesses")
    parser.add_argument("--noise", default="shared", help="the draft's noise: shared (the target's), independent, none")
    parser.add_argument(
        "--models",
        metavar="DIR",
        nargs="+",
        help="of pipespec and speculative, the smallest first, the target last (the demo family); auto before them "
        "leaves those out that do not pay",
    )
    parser.add_argument(
        "--passes", metavar="C", type=int, nargs="+", help="of each model but the target in a tick (measured times)"
    )
    parser.add_argument("--form", default="lockstep", help="of pipespec: lockstep, or free (each at its own pace)")
    parser.add_argument("--max-new-tokens", metavar="M", type=int, default=128, help="most tokens of the answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the k most likely tokens; 0 among all")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among tokens that hold this probability")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling noise")
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end before this text (repeatable)")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 or float64 (float32 on CPU, else the checkpoint's)")
    parser.add_argument(
        "--int8", action="store_true", help="hold the matrices of the target's layers as int8 (rounds them)"
    )
    parser.add_argument(
        "--calibration", metavar="FILE", type=Path, help="JSON of measured seconds for modeled time, in place of bytes"
    )
    parser.add_argument("--memory", action="store_true", help="also give the bytes on each device")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text and table")
    return parser.parse_args(arguments)


def read_prompt(options: argparse.Namespace) -> str:
    if options.prompt_file is not None:
        try:
            return options.prompt_file.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{options.prompt_file} is not UTF-8 text: {error}") from error
    return SAMPLE if options.prompt is None else options.prompt


def read_calibration(path: Path | None) -> dict[str, float] | None:
    """The times that `analysis.cost.Costs` names, or `None`."""
    if path is None:
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no calibration {path}; scripts/calibrate.py writes one") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold one JSON object of seconds, not {type(values).__name__}")
    return values


def check_options(options: argparse.Namespace) -> None:
    """Raise `ValueError` where an option is given that the method has no use for."""
    defaults = parse([])
    for name, methods in OF_METHODS.items():
        if options.method not in methods and getattr(options, name) != getattr(defaults, name):
            raise ValueError(
                f"--{name.replace('_', '-')} is not for --method {options.method}, but for {', '.join(methods)}"
            )


def open_decoder(options: argparse.Namespace) -> AnyDecoder:
    if options.dtype == "float64":
        import jax

        jax.config.update("jax_enable_x64", True)
    if options.method not in (*METHODS, *hierarchy.METHODS):
        raise ValueError(f"method must be one of {METHOD_NAMES}, not {options.method!r}")
    check_options(options)
    if options.method in hierarchy.METHODS:
        return open_hierarchy(options)
    draft = None
    if options.target is None:
        target = pipedec_jax.load_demo("target", int8=options.int8)
        draft = pipedec_jax.load_demo("draft")
    else:
        target = pipedec_jax.load(options.target, int8=options.int8)
    if options.draft is not None:
        draft = pipedec_jax.load(options.draft)
    exits = options.exit_layer is not None or options.method in EXIT_ONLY
    if exits:
        if options.draft is not None:
            raise ValueError("with an exit the target drafts for itself: leave --draft out")
        draft = None
    elif options.drafter == "ngram":
        if options.draft is not None:
            raise ValueError("--drafter ngram takes no --draft")
        draft = None
    elif draft is None and options.method != "pp":
        raise ValueError(f"--method {options.method} needs --draft DIR beside --target DIR, or --drafter ngram")
    return pipedec_jax.Decoder(
        target,
        draft,
        method=options.method,
        stages=4 if options.stages is None else options.stages,
        tensor_parallel=options.tensor_parallel,
        width=options.width,
        children=options.children,
        exit_layer=options.exit_layer,
        exit_head=options.exit_head,
        exit_stages=options.exit_stages,
        draft_length=options.draft_length,
        dtype=options.dtype,
        calibration=read_calibration(options.calibration),
        drafter=options.drafter,
        draft_steps=options.draft_steps,
        depth=options.depth,
        pool=options.pool,
        sharpness=options.sharpness,
        noise=options.noise,
    )


def open_hierarchy(options: argparse.Namespace) -> pipedec_jax.HierarchyDecoder:
    if options.target is not None or options.draft is not None:
        raise ValueError(f"--method {options.method} takes --models, not --target and --draft")
    for name in ("children", "drafter", "draft_steps", "exit_layer", "exit_head", "exit_stages", "pool", "calibration"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is not for --method {options.method}")
    names = options.models or []
    select = names[:1] == ["auto"]
    load, names = pipedec_jax.load, names[select:]
    if not names:
        load, names = pipedec_jax.load_demo, DEMO[options.method]
    models = [*(load(name) for name in names[:-1]), load(names[-1], int8=options.int8)]
    stages = [1] * (len(models) - 1) + [1 if options.stages is None else options.stages]
    return pipedec_jax.HierarchyDecoder(
        models,
        method=options.method,
        form=options.form,
        stages=stages,
        passes=options.passes,
        width=options.width,
        select=select,
        dtype=options.dtype,
    )


def main(arguments: list[str] | None = None) -> None:
    """Run, and end quietly when interrupted (status 130) or when nobody reads the output any more."""
    try:
        run(parse(arguments))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Python flushes standard output at exit and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def run(options: argparse.Namespace) -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    if options.prompts or options.out:
        run_batch(options)
        return
    try:
        prompt = read_prompt(options)
        if not prompt:
            raise ValueError("the prompt is empty; give some text")
        decoder = open_decoder(options)
        given = request_options(options)
        tokens = decoder.target.chat(prompt) if options.chat else prompt
        decoder.request(tokens, **given)
        decoder.prepare()  # only now that all else is well
    except (ValueError, OSError) as error:
        fail(error)
    if not options.chat and not options.json:
        print(prompt, end="", flush=True)
    if sys.stderr.isatty():
        print("compiling (some seconds to a minute) ...", file=sys.stderr)
    stream, shown, error = None, 0, None
    try:
        stream = decoder.stream(tokens, chunk=16 if options.json else 4, **given)
        for piece in stream:
            if not options.json:
                print(piece, end="", flush=True)
                shown += len(piece)
    except (KeyboardInterrupt, FloatingPointError) as stopped:
        error = stopped
    result = stream.partial() if stream else None
    if not options.json:
        print((result.text[shown:] if result else "") + "\n")
    show(options, decoder, prompt, result)
    if isinstance(error, FloatingPointError):
        fail(error)
    if error is not None:
        raise error


def request_options(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in batch.OPTIONS}


def show(options: argparse.Namespace, decoder: AnyDecoder, prompt: str, result: pipedec_jax.Generation | None) -> None:
    """The figures of an answer; `None` for one that was interrupted before its first token."""
    if options.json:
        figures = result.to_dict() if result else NOTHING
        print(json.dumps({**described(options, decoder, prompt), **figures, **memory(options, decoder)}))
        return
    if result is None:
        return
    basis = "the calibration's times" if options.calibration else "the bytes of weights a rank reads"
    print_table(result, decoder, basis)
    if options.memory:
        print_memory(decoder)


def run_batch(options: argparse.Namespace) -> None:
    """Decode the prompts of a file."""
    if options.prompts is None or options.out is None:
        fail("--prompts FILE and --out FILE need each other")
    if options.memory:
        fail("--memory is for one prompt")
    try:
        decoder = open_decoder(options)
        given = {**paths_as_text(vars(options)), "target": decoder.target.name, "dtype": decoder.dtype.name}
        settings = {name: given[name] for name in given if name not in NO_SETTINGS}
        done = batch.decode_file(
            decoder, options.prompts, options.out, settings=settings, chat=options.chat, **request_options(options)
        )
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        print(f"\n{options.out} has every answer that was finished; the same command goes on", file=sys.stderr)
        raise
    print(json.dumps(dataclasses.asdict(done)) if options.json else done)


def paths_as_text(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def described(options: argparse.Namespace, decoder: AnyDecoder, prompt: str) -> dict[str, Any]:
    """Every option with the value that was used."""
    if isinstance(decoder, pipedec_jax.HierarchyDecoder):
        used: dict[str, Any] = {
            "models": [model.name for model in decoder.models],
            "passes": decoder.settings.passes,
            "width": decoder.settings.widths[-1],
        }
    else:
        used = {
            "draft": decoder.draft.name if decoder.draft else None,
            "draft_steps": decoder.settings.steps,
            "width": decoder.width,
            "children": decoder.children,
            "drafter": decoder.drafter,
            "exit_head": decoder.exit_head.config.name if decoder.exit_head else None,
            "layers_by_stage": decoder.split.count,
            "exit_stages": decoder.split.exit or None,
        }
    return {
        **paths_as_text(vars(options)),
        "prompt": prompt,
        "target": decoder.target.name,
        "stages": decoder.stages,
        "dtype": decoder.dtype.name,
        **used,
    }


def memory(options: argparse.Namespace, decoder: AnyDecoder) -> dict[str, Any]:
    return {"bytes_per_device": decoder.bytes_per_device()} if options.memory else {}


def print_table(result: pipedec_jax.Generation, decoder: AnyDecoder, basis: str) -> None:
    virtual = " (virtual devices share this machine's cores)" if decoder.devices[0].platform == "cpu" else ""
    lag = "a tick" if result.lag == 1 else f"{result.lag} ticks"
    rest = "" if result.tpot_s is None else f"{result.tpot_s * 1e3:.1f} ms"
    rows = [
        ("tokens", result.new_tokens, f"after {result.prompt_tokens} of the prompt; ended by {result.finish_reason}"),
        ("ticks", result.ticks, "counted, from the root's entry into the pipe to the last token"),
        ("ticks per token", f"{result.ticks_per_token:.2f}", f"counted; {decoder.stages} with pp"),
        ("hits", result.hits, "counted, tokens that were in the pipe when the target chose them"),
        ("late hits", result.late_hits, f"counted, hits that were sent more than {lag} after the token before them"),
        ("misses", result.misses, "counted, tokens that were not, so that the pipe was refilled"),
        ("time against pp", f"{result.modeled_speedup_vs_pp:.2f} x", f"modeled from {basis}"),
        ("compiling", f"{result.compile_s:.1f} s", "measured, not in the times below"),
        ("first token", f"{result.ttft_s * 1e3:.0f} ms", f"measured TTFT{virtual}"),
        ("per token", rest, f"measured TPOT after the first{virtual}"),
    ]
    dtype = f"{decoder.dtype.name}{', int8 layers' if decoder.target.config.int8 else ''}"
    print(f"{decoder.method}, {decoder.stages} stages, {len(decoder.devices)} devices, {dtype}")
    if isinstance(decoder, pipedec_jax.Decoder) and decoder.cycle is not None:
        print_exit(decoder, decoder.cycle)
    for name, value, meaning in rows:
        if value is not None:
            print(f"  {name:<16} {value!s:>9}  {meaning}")


def print_exit(decoder: pipedec_jax.Decoder, cycle: Cycle) -> None:
    """Where the exit is, and how long a tick lasts."""
    head = decoder.exit_head.config.name if decoder.exit_head else "of one's own"
    path = "stage 1" if decoder.split.exit == 1 else f"stages 1 to {decoder.split.exit}"
    layers = " + ".join(map(str, decoder.split.count))
    print(f"  exit head {head} after {path} of {layers} layers")
    print(
        f"  a tick lasts as long as the longest stage, which is stage {cycle.stage}: {cycle.layers:.2f} layers' work; "
        f"the head with its vocabulary is {cycle.head:.2f}"
    )


def print_memory(decoder: AnyDecoder) -> None:
    print("\nbytes per device")
    for row in decoder.bytes_per_device():
        parts = {name: value for name, value in row.items() if isinstance(value, int)}
        print(f"  {row['device']}: {sum(parts.values()):,}")
        for name, value in parts.items():
            if value:
                print(f"    {name:<26} {value:>15,}")


if __name__ == "__main__":
    try:
        use_compilation_cache()
    except ValueError as error:
        fail(error)
    main()
