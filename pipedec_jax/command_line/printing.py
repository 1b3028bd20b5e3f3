"""What is printed of an answer: its figures, as JSON or as a table."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

import pipedec_jax
from pipedec_jax.command_line.options import paths_as_text
from pipedec_jax.modeled.exit_cost import Cycle
from pipedec_jax.pipeline.settings import GUESSING, OPTIONS_OF

if TYPE_CHECKING:
    from pipedec_jax.decoding.hierarchy import AnyDecoder

NOTHING = {"finish_reason": "interrupted", "new_tokens": 0, "token_ids": [], "text": ""}
"""Figures of an answer that was interrupted before its first token."""


DEFAULTED = ("depth", "draft_length", "sharpness", "noise")
"""Options that have a value also where they are not given, with the methods that use them."""


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


def described(options: argparse.Namespace, decoder: AnyDecoder, prompt: str) -> dict[str, Any]:
    """Every option with the value that was used."""
    if isinstance(decoder, pipedec_jax.HierarchyDecoder):
        used: dict[str, Any] = {
            "models": [model.name for model in decoder.models],
            "method": decoder.method,
            "form": decoder.form,
            "passes": [] if decoder.plain else decoder.settings.passes,
            "stages_by_model": [1] if decoder.plain else decoder.settings.stages,
            "width": 1 if decoder.plain else decoder.settings.widths[-1],
            "tensor_parallel": 1,
        }
    else:
        settings = decoder.settings
        guesses = decoder.method in GUESSING
        of_method = (name for name in DEFAULTED if decoder.method in OPTIONS_OF[name])
        used = {
            **{name: getattr(settings, name) for name in of_method},
            "tensor_parallel": settings.tensor_parallel,
            "draft": decoder.draft.name if decoder.draft else None,
            "draft_steps": settings.steps,
            # PP sends the root alone, whatever its settings hold of these.
            "width": decoder.width if guesses else 1,
            "children": decoder.children if guesses else 0,
            "drafter": decoder.drafter if guesses else None,
            "exit_layer": settings.exit_layer,
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
        "chosen": decoder.report(),
        **used,
    }


def memory(options: argparse.Namespace, decoder: AnyDecoder) -> dict[str, Any]:
    """Bytes on each device, where they are asked for."""
    return {"bytes_per_device": decoder.bytes_per_device()} if options.memory else {}


def counted(count: int, what: str) -> str:
    """The number of them in words, such as `1 stage`."""
    return f"{count} {what}{'s' * (count != 1)}"


def print_table(result: pipedec_jax.Generation, decoder: AnyDecoder, basis: str) -> None:
    """An answer's figures, each with what it is; `basis` says what the modeled one is from."""
    virtual = " (virtual devices share this machine's cores)" if decoder.devices[0].platform == "cpu" else ""
    lag = "a tick" if result.lag == 1 else f"{result.lag} ticks"
    rest = None if result.tpot_s is None else f"{result.tpot_s * 1e3:.1f} ms"
    hierarchy = isinstance(decoder, pipedec_jax.HierarchyDecoder)
    hit = "the smaller models had said" if hierarchy else "were in the pipe"
    lost = "the target said itself" if hierarchy else "were not, so that the pipe was refilled"
    rows = [
        ("tokens", result.new_tokens, f"after {result.prompt_tokens} of the prompt; ended by {result.finish_reason}"),
        ("ticks", result.ticks, "counted, from the root's entry into the pipe to the last token"),
        ("ticks per token", f"{result.ticks_per_token:.2f}", f"counted; {decoder.stages} with pp"),
        ("hits", result.hits, f"counted, tokens that {hit} when the target chose them"),
        ("late hits", result.late_hits, f"counted, hits that were sent more than {lag} after the token before them"),
        ("misses", result.misses, f"counted, tokens that {lost}"),
        ("time against pp", f"{result.modeled_speedup_vs_pp:.2f} x", f"modeled from {basis}"),
        ("compiling", f"{result.compile_s:.1f} s", "measured, not in the times below"),
        ("first token", f"{result.ttft_s * 1e3:.0f} ms", f"measured TTFT{virtual}"),
        ("per token", rest, f"measured TPOT after the first{virtual}"),
    ]
    dtype = f"{decoder.dtype.name}{', int8 layers' if decoder.target.config.int8 else ''}"
    places = f"{counted(decoder.stages, 'stage')}, {counted(len(decoder.devices), 'device')}"
    print(f"{decoder.method}, {places}, {dtype}")
    if isinstance(decoder, pipedec_jax.HierarchyDecoder):
        if not decoder.plain:
            print(f"  stages of the models, the smallest first: {' '.join(map(str, decoder.settings.stages))}")
    elif decoder.cycle is not None:
        print_exit(decoder, decoder.cycle)
    for line in decoder.report():
        print(f"  {line}")
    for name, value, meaning in rows:
        if value is not None:
            print(f"  {name:<16} {value!s:>9}  {meaning}")


def print_exit(decoder: pipedec_jax.Decoder, cycle: Cycle) -> None:
    """Where the exit is, and how long a tick lasts."""
    head = decoder.exit_head.config.name if decoder.exit_head else "of one's own"
    path = "stage 1" if decoder.split.exit == 1 else f"stages 1 to {decoder.split.exit}"
    layers = " + ".join(map(str, decoder.split.count))
    whose = (
        f", {cycle.vocabulary:.2f}, is over all ranks"
        if cycle.vocabulary
        else " is the target's, read for both at once"
    )
    print(f"  exit head {head} after {path} of {layers} layers")
    print(
        f"  a tick lasts as long as the longest stage, stage {cycle.stage}: {cycle.layers:.2f} layers' work "
        f"(the head {cycle.head:.2f}; its vocabulary{whose})"
    )


EXIT_PARTS = {
    "draft layers": "exit head",
    "draft embedding and head": "exit head's vocabulary",
    "draft cache": "exit head's cache",
}
"""What the draft's parts are called where an exit head drafts."""


def print_memory(decoder: AnyDecoder) -> None:
    """Bytes on each device, part by part."""
    names = EXIT_PARTS if isinstance(decoder, pipedec_jax.Decoder) and decoder.exit_head else {}
    print("\nbytes per device")
    for row in decoder.bytes_per_device():
        parts = {name: value for name, value in row.items() if isinstance(value, int)}
        print(f"  {row['device']}: {sum(parts.values()):,}")
        for name, value in parts.items():
            if value:
                print(f"    {names.get(name, name):<26} {value:>15,}")
