"""scripts/trace.py: what it refuses before any work, and what it leaves behind."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from pipedec_jax.command_line import tracing
from pipedec_jax.command_line.tracing import trace
from pipedec_jax.decoding.hierarchy import HierarchyDecoder
from tests.plots.test_perfetto import checked
from tests.recording.test_recording import CHEAP, recorded

SCRIPT = Path(__file__).parents[1] / "scripts" / "trace.py"


def own(out: Path, /, **changes: Any) -> argparse.Namespace:
    """The script's own options."""
    options = {"ticks": (1, 40), "tree_ticks": None, "tree_nodes": 20, "format": "svg", "time": "ticks"}
    return argparse.Namespace(**{"out": out, "no_pictures": False, **options, **changes})


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is not installed."""
    for name in ("matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (["--method", "pp", "--prompt", ""], "the prompt is empty"),
        (["--max-new-tokens", "0"], "max_new_tokens must be a whole number"),
        (["--seed", "-1"], "seed must be"),
        (["--json"], "--json is not for trace.py"),
        (["--prompts", "x.jsonl"], "--prompts is not for trace.py"),
        (["--method", "all"], "method must be one of"),
    ],
)
@pytest.mark.usefixtures("no_matplotlib")
def test_bad_options_are_refused_at_once_with_matplotlib_and_without(
    tmp_path: Path, rest: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        trace(own(tmp_path / "out"), rest)
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "rest", "message"),
    [
        ({"tree_ticks": [1]}, ["--method", "pipespec"], "not for --method pipespec: it has steps, and no tree"),
        ({"time": "modeled"}, [], "--time modeled needs --calibration"),
        ({"out": Path(__file__)}, [], "--out must be a directory"),
        ({"out": Path("/dev/null/out")}, ["--max-new-tokens", "0"], "--out /dev/null/out/trace.json cannot be written"),
        ({"ticks": (9, 3)}, [], "--ticks must be two numbers from 1, the smaller one first, not 9 3"),
        ({"tree_ticks": [3, 0]}, [], "--tree-ticks are counted from 1, not 0"),
        ({"tree_nodes": 1}, [], "--tree-nodes must be at least 2, not 1"),
    ],
)
def test_bad_options_of_its_own_are_refused_at_once(
    tmp_path: Path, changes: dict[str, Any], rest: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trace(own(tmp_path / "out", **changes), rest)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_matplotlib")
def test_without_matplotlib_the_trace_and_the_counts_are_there_and_the_pictures_are_said_to_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress, recording = recorded(CHEAP[0])
    decoder = types.SimpleNamespace(
        request=lambda *_, **__: None,
        generate=lambda *_, **__: types.SimpleNamespace(text="the answer"),
        recording=lambda: recording,
        report=list,
    )
    monkeypatch.setattr(tracing, "open_decoder", lambda *_, **__: decoder)
    trace(own(tmp_path / "out"), [])
    shown = capsys.readouterr()
    assert shown.err.startswith("left out: timeline.svg, tree.svg (pictures need matplotlib: pip install ")
    hits, last = sum(progress.hits[:-1]), len(progress.hits) - 1
    late = sum(delay > recording.lag for delay, hit in zip(progress.delays[:-1], progress.hits, strict=False) if hit)
    counted = f"{len(recording.tokens)} tokens in {len(recording.ticks)} ticks (counted): {hits} hits, "
    assert f"{counted}{late} of them late, {last - hits} misses\n" in shown.out
    assert shown.out.endswith(f"written to {tmp_path / 'out'}: trace.json\n")
    assert checked(json.loads((tmp_path / "out" / "trace.json").read_text()))
    capsys.readouterr()
    trace(own(tmp_path / "out", no_pictures=True), [])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tree_ticks": [2, 999]}, "there is no tick 999"),
        ({"ticks": (998, 999)}, "no ticks from 998 to"),
    ],
)
def test_ticks_that_the_answer_did_not_reach_are_refused_before_a_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    pytest.importorskip("matplotlib")
    _, recording = recorded(CHEAP[0])
    decoder = types.SimpleNamespace(
        request=lambda *_, **__: None,
        generate=lambda *_, **__: types.SimpleNamespace(text="the answer"),
        recording=lambda: recording,
    )
    monkeypatch.setattr(tracing, "open_decoder", lambda *_, **__: decoder)
    with pytest.raises(ValueError, match=message):
        trace(own(tmp_path / "out", **changes), [])
    assert not (tmp_path / "out").exists()


def test_that_plain_decoding_was_chosen_is_said_before_anything_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = object.__new__(HierarchyDecoder)
    decoder.method = "pp"
    monkeypatch.setattr(tracing, "open_decoder", lambda *_, **__: decoder)
    with pytest.raises(ValueError, match="plain decoding was the fastest"):
        trace(own(tmp_path / "out"), ["--method", "pipespec", "--models", "auto"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_script_writes_both_pictures_and_a_valid_trace(tmp_path: Path) -> None:
    options = [
        "--method",
        "ppsd",
        "--exit-layer",
        "4",
        "--max-new-tokens",
        "12",
        "--format",
        "png",
        "--ticks",
        "1",
        "9",
    ]
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), *options]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["timeline.png", "trace.json", "tree.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("timeline.png", "tree.png"))
    events = checked(json.loads((tmp_path / "trace.json").read_text()))
    assert sum(event["ph"] == "i" for event in events) == 12
    assert "12 tokens in" in found.stdout
