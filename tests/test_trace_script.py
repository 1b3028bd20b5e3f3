"""scripts/trace.py: what it refuses before any work, and what it leaves behind."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipedec_jax.command_line.tracing import trace
from tests.plots.test_perfetto import checked

SCRIPT = Path(__file__).parents[1] / "scripts" / "trace.py"


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (["--method", "pipespec"], "not for --method pipespec: it has steps, and no tree"),
        (["--json"], "--json is not for trace.py"),
        (["--prompts", "x.jsonl"], "--prompts is not for trace.py"),
        (["--method", "all"], "method must be one of"),
    ],
)
def test_options_without_a_use_are_refused_at_once(tmp_path: Path, rest: list[str], message: str) -> None:
    own = argparse.Namespace(out=tmp_path / "out", time="ticks", tree_ticks=[1], no_pictures=True)
    with pytest.raises(ValueError, match=message):
        trace(own, rest)
    assert not own.out.exists()


def test_modeled_time_asks_for_a_calibration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--time modeled needs --calibration"):
        trace(argparse.Namespace(out=tmp_path, time="modeled", tree_ticks=None, no_pictures=True), [])


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
