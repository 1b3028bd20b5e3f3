"""A recording as Chrome's trace-event JSON, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

One track for every rank and one for the tokens; slices are what a rank had in a tick, counters the rows and nodes, and
arrows lead a batch from stage to stage. Its time is ticks, drawn as a millisecond each, or modeled, never measured; the
process's name says which.

Format: "Trace Event Format" (Google, 2016), the JSON object form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipedec_jax.plots.style import visible
from pipedec_jax.recording.history import Batch, Recording, Tick

PROCESS = 1
TICK_US = 1000.0
"""Microseconds on the time axis for a tick."""


def trace_events(recording: Recording, seconds: Sequence[float] | None = None) -> dict[str, Any]:
    """The trace, ready for `json.dumps`.

    Args:
        recording: of an answer.
        seconds: modeled, of every tick; by default a tick is a millisecond on the axis, and called a tick.

    Raises:
        ValueError: where there are not as many seconds as ticks, or one is not over 0.
    """
    ticks = recording.ticks
    if seconds is None:
        spans = [TICK_US] * len(ticks)
    elif len(seconds) != len(ticks) or any(value <= 0 for value in seconds):
        raise ValueError(f"seconds must be {len(ticks)} numbers over 0, one for every tick")
    else:
        spans = [1e6 * value for value in seconds]
    starts = {one.number: sum(spans[:index]) for index, one in enumerate(ticks)}
    ends = {one.number: starts[one.number] + span for one, span in zip(ticks, spans, strict=True)}
    basis = "ticks, 1 ms is 1 tick; not time" if seconds is None else "modeled time; not measured"
    ranks = recording.layout.ranks
    events = [named("process_name", f"{recording.layout.method} ({basis})", 0)]
    for track, name in enumerate(["tokens", *ranks]):
        events.append(named("thread_name", name, track))
        events.append(event("M", "thread_sort_index", 0.0, track, args={"sort_index": track}))
    for one in ticks:
        start, length = starts[one.number], ends[one.number] - starts[one.number]
        events += _tick_events(recording, one, start, length)
        events += _arrows(recording, one, starts)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"time": basis, "method": recording.layout.method, "tokens": len(recording.tokens)},
    }


def _tick_events(recording: Recording, one: Tick, start: float, length: float) -> list[dict[str, Any]]:
    events = []
    for rank, batch in enumerate(one.stages):
        if batch is not None:
            args = {"tick": one.number, "sent in tick": batch.sent, **_rows(recording, batch)}
            name = f"batch {batch.sent}: {len(batch.live)} live, {batch.dead} dead"
            events.append(event("X", name, start, rank + 1, dur=length, args=args))
        else:
            events.append(event("X", "bubble", start, rank + 1, dur=length, args={"tick": one.number}))
    # An exit's head drafts at the end of its stage, on the stage's own track.
    if recording.layout.drafter and one.drafts:
        step = length / len(one.drafts)
        for index, draft in enumerate(one.drafts):
            if draft.extended:
                guesses = sum(map(len, draft.guesses))
                args = {"tick": one.number, "nodes extended": len(draft.extended), "guesses": guesses}
                name = f"draft step: {len(draft.extended)} rows"
                events.append(event("X", name, start + index * step, len(recording.layout.ranks), dur=step, args=args))
    for commit in one.committed:
        node = recording.nodes[commit.node]
        args = {"tick": one.number, "token": node.token, "index": commit.index, "text": node.text}
        name = f"{recording.kind(commit)}: {visible(node.text).replace(chr(92), '')}"
        # At the end of its tick, but inside, so that it belongs to no other.
        events.append(event("i", name, start + 0.99 * length, 0, s="t", args=args))
    live = sum(len(batch.live) for batch in one.stages if batch)
    dead = sum(batch.dead for batch in one.stages if batch)
    events.append(event("C", "rows in the pipe", start, 0, args={"live": live, "dead": dead}))
    events.append(event("C", "nodes of the tree", start, 0, args={"nodes": len(one.tree)}))
    return events


def _arrows(recording: Recording, one: Tick, starts: dict[int, float]) -> list[dict[str, Any]]:
    """Where the batch that enters in this tick goes."""
    if one.stages[0] is None:
        return []
    last = min(recording.layout.stages, recording.ticks[-1].number - one.number + 1)
    if last < 2:
        return []
    kinds = ["s", *["t"] * (last - 2), "f"]
    return [
        event(kind, "batch", starts[one.number + stage], stage + 1, id=one.number, cat="batch", bp="e")
        for stage, kind in enumerate(kinds)
    ]


def _rows(recording: Recording, batch: Batch) -> dict[str, Any]:
    fates = [recording.nodes[number].fate for number in batch.live]
    return {
        "rows when sent": batch.size,
        "live": len(batch.live),
        "dead": batch.dead,
        "become text": fates.count("text"),
        "pruned later": fates.count("pruned"),
        "tokens": [recording.nodes[number].text for number in batch.live],
    }


def named(kind: str, name: str, track: int) -> dict[str, Any]:
    """An event that names a process or a track."""
    return event("M", kind, 0.0, track, args={"name": name})


def event(kind: str, name: str, start: float, track: int, **more: Any) -> dict[str, Any]:
    """An event of a kind (`ph`), from `start` on the axis, on a track."""
    return {"ph": kind, "name": name, "ts": start, "pid": PROCESS, "tid": track, **more}
