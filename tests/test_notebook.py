"""The tour: every cell runs, the outputs kept in the file are what it prints, and it uses public names alone."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pipedec_jax

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "scripts" / "notebooks" / "tour.ipynb"
EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


def cells(path: Path = NOTEBOOK) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def printed(cell: dict[str, Any]) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"] if output.get("name") == "stdout")


def pictures(cell: dict[str, Any]) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell["outputs"])


def test_the_notebook_is_valid_and_was_run_from_top_to_bottom() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1))
    for cell in cells():
        assert cell["outputs"], f"no outputs are kept of:\n{source(cell)}"
        assert all(output["output_type"] != "error" for output in cell["outputs"])
        assert all(output.get("name") != "stderr" for output in cell["outputs"])
    assert sum(map(pictures, cells())) == 2


def test_outputs_name_no_place_of_the_machine_they_were_made_on() -> None:
    text = "".join(printed(cell) for cell in cells())
    assert not any(place in text for place in ("/tmp/", "/home/", "/root/", "/work/", "site-packages"))


def test_cells_use_public_names_only() -> None:
    tree = ast.parse("\n".join(source(cell) for cell in cells()))
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imported if node.module and node.module.startswith("pipedec_jax")]
    assert ours
    for node in ours:
        module = importlib.import_module(node.module)
        for alias in node.names:
            assert hasattr(module, alias.name)
            assert not alias.name.startswith("_")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_"), node.attr
            if isinstance(node.value, ast.Name) and node.value.id == "pipedec_jax":
                assert node.attr in pipedec_jax.__all__, node.attr


def test_it_shows_what_the_tour_promises() -> None:
    text = "\n".join(source(cell) for cell in cells())
    for name in ("load_demo", "generate", "draw_timeline", "draw_tree", "trace_events", "width=", "(Drafter)"):
        assert name in text


@pytest.mark.slow
def test_running_it_gives_the_outputs_that_are_kept(tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "MPLBACKEND")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", EXECUTE, str(NOTEBOOK), str(tmp_path / "again.ipynb")]
    subprocess.run(command, check=True, env=environment, capture_output=True, text=True, timeout=900)
    for before, after in zip(cells(), cells(tmp_path / "again.ipynb"), strict=True):
        assert printed(after) == printed(before)
        assert pictures(after) == pictures(before)
