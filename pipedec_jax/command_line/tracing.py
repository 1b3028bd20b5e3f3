"""One run of `scripts/trace.py`: decodes a prompt with the recorder on, and writes pictures and a trace."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from pipedec_jax.command_line.opening import open_decoder
from pipedec_jax.command_line.options import parse, read_prompt, request_options
from pipedec_jax.command_line.output import check_place
from pipedec_jax.decoding.hierarchy import HierarchyDecoder
from pipedec_jax.decoding.request_options import check_request_options
from pipedec_jax.hierarchy import settings as hierarchy
from pipedec_jax.plots import style
from pipedec_jax.plots.passes import draw_passes, pass_events
from pipedec_jax.plots.perfetto import trace_events
from pipedec_jax.plots.timeline import draw_timeline
from pipedec_jax.plots.tree import draw_tree, telling_ticks
from pipedec_jax.recording.history import Recording
from pipedec_jax.recording.passes import PassRecording
from pipedec_jax.whole_files import write_whole

UNUSED = ("prompts", "out", "memory", "json", "chat")
"""Options of generate.py that mean nothing here."""


def trace(own: argparse.Namespace, rest: list[str]) -> None:
    """Do what the options say. Without matplotlib there are no pictures, and standard error says so.

    Args:
        own: the script's.
        rest: those of `generate.py`.

    Raises:
        ValueError: for options that do not go together, before anything is decoded.
        OSError: when a file cannot be read or written.
    """
    check_own(own)
    options = parse(rest)
    for name in UNUSED:
        if getattr(options, name):
            raise ValueError(f"--{name} is not for trace.py")
    if options.method in hierarchy.METHODS and (own.time != "ticks" or own.tree_ticks):
        raise ValueError(f"--time and --tree-ticks are not for --method {options.method}: it has steps, and no tree")
    if own.time == "modeled" and options.calibration is None:
        raise ValueError("--time modeled needs --calibration FILE: without it a tick's cost is bytes, not seconds")
    given = request_options(options)
    check_request_options(**given)
    prompt = read_prompt(options)
    decoder = open_decoder(options, record=True)
    if isinstance(decoder, HierarchyDecoder):
        decoder.check_recorded()
    decoder.request(prompt, **given)
    pictures = pictures_of(own, hierarchical=options.method in hierarchy.METHODS)
    answer = decoder.generate(prompt, **given)
    recording = decoder.recording()
    drawn = draw_pictures(own, recording) if pictures else {}  # ticks that were not reached show before a file is there
    own.out.mkdir(parents=True, exist_ok=True)
    if isinstance(recording, PassRecording):
        written, told = pass_events(recording), summary_of_passes(recording, answer.text)
    else:
        seconds = None if own.time == "ticks" else [one.cost for one in recording.ticks]
        written, told = trace_events(recording, seconds), summary(recording, answer.text)
    write_whole(own.out / "trace.json", json.dumps(written))
    for name, figure in drawn.items():
        style.save(figure, own.out / f"{name}.{own.format}")
    print(told, *decoder.report(), sep="\n")
    print(f"written to {own.out}: {', '.join((*pictures, 'trace.json'))}")


def check_own(own: argparse.Namespace) -> None:
    """Raise `ValueError` where the script's own options cannot be met by any answer."""
    if own.out.exists() and not own.out.is_dir():
        raise ValueError(f"--out must be a directory: {own.out} is a file")
    check_place("--out", own.out / "trace.json")
    first, last = own.ticks
    if not 1 <= first <= last:
        raise ValueError(f"--ticks must be two numbers from 1, the smaller one first, not {first} {last}")
    if own.tree_ticks and min(own.tree_ticks) < 1:
        raise ValueError(f"--tree-ticks are counted from 1, not {min(own.tree_ticks)}")
    if own.tree_nodes < 2:
        raise ValueError(f"--tree-nodes must be at least 2, not {own.tree_nodes}")


def pictures_of(own: argparse.Namespace, hierarchical: bool) -> list[str]:
    """The pictures that can be drawn, by their files; of those that are wanted and cannot, standard error tells."""
    wanted = [f"{name}.{own.format}" for name in (("timeline",) if hierarchical else ("timeline", "tree"))]
    if own.no_pictures:
        return []
    try:
        style.pyplot()
    except ImportError as error:
        print(f"left out: {', '.join(wanted)} ({error}); the trace and the counts are complete", file=sys.stderr)
        return []
    return wanted


def draw_pictures(own: argparse.Namespace, recording: Recording | PassRecording) -> dict[str, Any]:
    """The timeline, and the tree where there is one, as matplotlib's figures by name."""
    if isinstance(recording, PassRecording):
        return {"timeline": draw_passes(recording, *own.ticks)}
    last = min(own.ticks[1], len(recording.ticks))
    wanted = own.tree_ticks or telling_ticks(recording)
    return {
        "timeline": draw_timeline(recording, own.ticks[0], last),
        "tree": draw_tree(recording, wanted, own.tree_nodes),
    }


def summary(recording: Recording, text: str) -> str:
    """What was counted; hits and misses as `Generation` has them, which leaves the last token out."""
    rows = recording.rows()
    kinds = [recording.kind(commit) for one in recording.ticks for commit in one.committed][:-1]
    hits, late, misses = (kinds.count(kind) for kind in ("hit", "late hit", "miss"))
    return (
        f"{text}\n\n{len(recording.tokens)} tokens in {len(recording.ticks)} ticks (counted): {hits + late} hits, "
        f"{late} of them late, {misses} misses\n"
        f"rows at the stages (counted): {rows['text']} became text, {rows['pruned']} were pruned later, "
        f"{rows['dead']} dead, {rows['open']} undecided at the end; {rows['bubbles']} bubbles"
    )


def summary_of_passes(recording: PassRecording, text: str) -> str:
    """The same of a hierarchy."""
    lines = [
        f"  {name}: {sum(step.passes for step in steps)} passes, {sum(step.rolled_back for step in steps)} rollbacks, "
        f"{sum(step.undone for step in steps)} tokens undone"
        for name, steps in zip(recording.names, recording.steps, strict=True)
    ]
    head = f"{len(recording.tokens)} tokens in {recording.last} {recording.clock}s of the target (counted)"
    return "\n".join([text, "", head, *lines])
