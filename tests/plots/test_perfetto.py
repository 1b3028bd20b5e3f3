"""The trace is in Chrome's format, says what its times are, and holds what the recording does."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from pipedec_jax.plots.perfetto import TICK_US, trace_events
from tests.recording.test_recording import CHEAP, METHODS, recorded

PHASES = {"X", "M", "C", "i", "s", "t", "f"}


def checked(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a trace after a look at all that the format asks for."""
    trace = json.loads(json.dumps(trace, allow_nan=False))
    assert trace["displayTimeUnit"] in ("ms", "ns")
    events = trace["traceEvents"]
    named = {}
    for event in events:
        assert {"ph", "ts", "pid", "tid", "name"} <= event.keys()
        assert event["ph"] in PHASES
        assert isinstance(event["name"], str)
        assert event["name"]
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
        if event["ph"] == "M" and event["name"] == "thread_name":
            named[event["pid"], event["tid"]] = event["args"]["name"]
        if event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())
        if event["ph"] in "stf":
            assert {"id", "cat"} <= event.keys()
    assert {(event["pid"], event["tid"]) for event in events} <= named.keys()
    assert [event for event in events if event["name"] == "process_name"]
    slices: dict[Any, list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            slices.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in slices.values():
        spans.sort()
        assert all(one[1] <= two[0] + 1e-6 for one, two in itertools.pairwise(spans)), "slices overlap"
    flows = [event for event in events if event["ph"] in "stf"]
    for number in {event["id"] for event in flows}:
        mine = [event for event in flows if event["id"] == number]
        assert sorted(event["ph"] for event in mine) == sorted("s" + "t" * (len(mine) - 2) + "f")
        assert [event["ts"] for event in sorted(mine, key=lambda event: event["tid"])] == sorted(e["ts"] for e in mine)
    return events


@pytest.mark.parametrize("name", METHODS)
def test_a_trace_is_valid_and_holds_every_batch_bubble_and_token(name: str) -> None:
    _, recording = recorded(name)
    trace = trace_events(recording)
    events = checked(trace)
    slices = [event for event in events if event["ph"] == "X"]
    batches = [event for event in slices if event["name"].startswith("batch")]
    assert len(batches) == sum(batch is not None for one in recording.ticks for batch in one.stages)
    assert sum(event["args"]["live"] for event in batches) == sum(
        len(batch.live) for one in recording.ticks for batch in one.stages if batch
    )
    assert sum(event["name"] == "bubble" for event in slices) == recording.rows()["bubbles"]
    tokens = [event for event in events if event["ph"] == "i"]
    assert [event["args"]["token"] for event in tokens] == recording.tokens
    drafted = [event for event in slices if event["name"].startswith("draft")]
    assert bool(drafted) is recording.layout.drafter
    tracks = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert tracks == ["tokens", *recording.layout.ranks]


def test_ticks_are_never_called_time_and_modeled_time_never_measured() -> None:
    _, recording = recorded(CHEAP[0])
    trace = trace_events(recording)
    process = next(event for event in trace["traceEvents"] if event["name"] == "process_name")
    assert "1 ms is 1 tick; not time" in process["args"]["name"]
    seconds = [0.001 * (1 + one.number % 3) for one in recording.ticks]
    modeled = trace_events(recording, seconds)
    process = next(event for event in checked(modeled) if event["name"] == "process_name")
    assert "modeled time; not measured" in process["args"]["name"]
    last = max(event["ts"] + event["dur"] for event in modeled["traceEvents"] if event["ph"] == "X")
    assert last == pytest.approx(1e6 * sum(seconds))
    plain = max(event["ts"] + event["dur"] for event in trace["traceEvents"] if event["ph"] == "X")
    assert plain == pytest.approx(TICK_US * len(recording.ticks))


@pytest.mark.parametrize("change", [lambda seconds: seconds[1:], lambda seconds: [0.0, *seconds[1:]]])
def test_seconds_that_do_not_fit_are_refused(change: Any) -> None:
    _, recording = recorded(CHEAP[0])
    with pytest.raises(ValueError, match="one for every tick"):
        trace_events(recording, change([1.0] * len(recording.ticks)))
