"""The papers' tables are commands that benchmark.py accepts, and say what they need."""

import runpy
import subprocess
from pathlib import Path

import pytest

import reproduce
from pipedec_jax.analysis.papers import TABLES, exit_layer
from pipedec_jax.analysis.random_family import EXIT_LAYER, LAYERS, write_random_family
from pipedec_jax.exit_store import load_exit_head
from pipedec_jax.loading import demo_directory, load

ROOT = Path(__file__).parents[2]
GIVEN = {"draft": "a", "middle": "b", "target": "c", "exit-target": "d", "exit-layer": "4"}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
@pytest.mark.parametrize("demo", [False, True])
def test_every_command_is_one_of_benchmark(table, demo):
    benchmark = runpy.run_path(str(ROOT / "scripts" / "benchmark.py"))
    options = benchmark["parse"](table.command(Path("prompts.txt"), Path("out"), GIVEN, demo))
    chosen = benchmark["contenders"](options)
    assert len(chosen) == len(options.methods) + demo
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


@pytest.mark.parametrize(("status", "ended", "said"), [(2, 2, ""), (-9, 137, "pipedec was ended by signal 9\n")])
def test_a_table_that_fails_has_said_why_itself(status, ended, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("x = 1\n")
    given = ["--tables", "pipedec", "--demo", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["reproduce.py", *given])
    monkeypatch.setattr(reproduce.subprocess, "run", lambda command: subprocess.CompletedProcess(command, status))
    with pytest.raises(SystemExit) as stopped:
        reproduce.main()
    assert stopped.value.code == ended
    assert capsys.readouterr().err == (said and f"error: {said}")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--prompts", "nowhere"], "nowhere: No such file"),
        (["--prompts", "empty"], "empty holds no question"),
        (["--prompts", "one", "--limit", "0"], "limit must be at least 1, not 0"),
    ],
)
def test_bad_prompts_are_refused_before_random_models_are_written(given, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").touch()
    (tmp_path / "one").write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["reproduce.py", "--random", "--out", "out", *given])
    with pytest.raises(SystemExit) as stopped:
        reproduce.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_the_exit_is_the_trained_one_nearest_to_a_quarter():
    assert exit_layer(str(demo_directory("target"))) == 4
    with pytest.raises(ValueError, match="no exit head: train one"):
        exit_layer(str(demo_directory("draft")))


def test_random_models_are_a_family_with_an_exit_head(tmp_path):
    given = write_random_family(tmp_path)
    models = {name: load(given[name]) for name in LAYERS}
    assert [model.config.layers for model in models.values()] == [*LAYERS.values()]
    assert len({model.vocab_size for model in models.values()}) == 1
    assert exit_layer(given["exit-target"]) == EXIT_LAYER
    load_exit_head(models["target"], EXIT_LAYER)  # its fingerprint is that of the stored weights
    with pytest.raises(FileNotFoundError):
        load_exit_head(models["middle"], EXIT_LAYER)
