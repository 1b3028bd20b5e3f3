"""The papers' tables are commands that benchmark.py accepts, and say what they need."""

import runpy
from pathlib import Path

import pytest

from pipedec_jax.analysis.papers import TABLES

ROOT = Path(__file__).parents[2]
GIVEN = {"draft": "a", "middle": "b", "target": "c", "exit-target": "d"}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
@pytest.mark.parametrize("demo", [False, True])
def test_every_command_is_one_of_benchmark(table, demo):
    benchmark = runpy.run_path(str(ROOT / "scripts" / "benchmark.py"))
    options = benchmark["parse"](table.command(Path("prompts.txt"), Path("out"), GIVEN, demo))
    chosen = benchmark["contenders"](options)
    assert len(chosen) == len(options.methods)
    if demo:
        assert options.target is None
    else:
        assert options.target == GIVEN[table.flags[-1]]
        assert options.out == Path("out") / table.name


def test_a_missing_directory_is_named():
    with pytest.raises(ValueError, match=r"'pipespec' needs --draft \(LLaMA-3.2-1B\).*give --middle"):
        next(table for table in TABLES if table.name == "pipespec").command(
            Path("prompts.txt"), Path("out"), {"draft": "a", "target": "c"}, demo=False
        )
