"""Scripts that measure or check refuse what cannot be, in one line, before anything is computed."""

from pathlib import Path

import pytest

import check_hosts
import compare_exits
import compare_head
import compare_hierarchies
import compare_methods
import compare_noise
import compare_peers
import compare_schedules
import compare_widths
import count_exits
import kill_batches
import kill_hosts
import measure_accelerator
import measure_context
import pipedec_jax
import plot_exits
import plot_hit_rates
import run_long
import study_order
from pipedec_jax.command_line.output import run_command

DRAFT = str(Path(__file__).parents[2] / "configs" / "llama-3.2-1b.json")


@pytest.mark.parametrize(
    ("script", "given"),
    [
        (compare_head, ["--repeats", "0"]),
        (compare_head, ["--stages", "0"]),
        (kill_batches, ["nowhere", "--kills", "0"]),
        (measure_context, ["--tokens", "0"]),
        (measure_context, ["--capacity", "0"]),
        (run_long, ["--ticks", "0"]),
    ],
)
def test_no_number_of_something_is_refused(script, given, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["script", *given])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    shown = capsys.readouterr()
    assert (stopped.value.code, shown.out) == (2, "")
    assert shown.err == f"error: {given[-2]} must be a whole number of at least 1, not 0\n"


@pytest.mark.parametrize(
    "script",
    [
        *(compare_exits, compare_hierarchies, compare_methods, compare_noise, compare_schedules, compare_widths),
        *(count_exits, study_order),
    ],
)
def test_more_stages_than_layers_are_refused_before_fewer_are_tried(script, monkeypatch, capsys):
    given = ["17"] if script is compare_noise else ["2", "17"]
    monkeypatch.setattr("sys.argv", ["script", "--stages", *given])
    monkeypatch.setattr(pipedec_jax, "use_cpu_devices", lambda _: None)  # there are fewer here
    monkeypatch.setenv("PIPEDEC_JAX_COMPILATION_CACHE", "off")
    with pytest.raises(SystemExit) as stopped:
        run_command(script.main, refusals=(ValueError, OSError))
    shown = capsys.readouterr()
    assert (stopped.value.code, shown.out) == (2, "")
    assert shown.err in (
        "error: --stages must be at most 16, the target's layers, not 17\n",
        "error: stages (17) must not exceed the target's layers (16)\n",
    )


@pytest.mark.parametrize(
    ("script", "given", "message"),
    [
        (check_hosts, ["nowhere", "--shapes", "2"], "argument --shapes: must be processes x devices of each, such as"),
        (check_hosts, ["nowhere", "--timeout", "-1"], "argument --timeout: must be a number over 0, not '-1'"),
        (compare_head, ["--measured", "none"], "there is no geometry "),
        (compare_head, ["--exit-heads", "none"], "exit head 'none' is not known; choose one of target, norm-linear"),
        (kill_hosts, ["nowhere", "--faults", "none"], "--faults none: no fault's name holds any of that"),
        (plot_exits, ["--out", "plot.jpeg"], "--out must end in one of .svg, .png, .pdf, not 'plot.jpeg'"),
        (plot_hit_rates, ["--out", "/dev/null/plot.svg"], "--out /dev/null/plot.svg cannot be written: "),
        (measure_accelerator, ["--target", "none"], "none does not exist: give a converted checkpoint"),
        (measure_accelerator, ["--target", DRAFT, "--layers", "99"], "--layers must be at most 16, the layers of "),
        (measure_accelerator, ["--target", DRAFT, "--method", "none"], "method must be one of pp, stpp, "),
        (measure_accelerator, ["--target", DRAFT, "--dtype", "none"], "argument --dtype: invalid choice: 'none'"),
        (measure_accelerator, ["--target", DRAFT, "--tokens", "999999"], "prompt (16 tokens) and max_new_tokens (99"),
        (measure_accelerator, ["--target", DRAFT, "--out", "/dev/null/rows"], "--out /dev/null/rows cannot be written"),
        (compare_peers, ["--out", "/dev/null/rows"], "--out /dev/null/rows cannot be written: "),
        (compare_schedules, ["--trees", "none.json"], "--trees none.json: there is no such file; find_static_tree.py"),
    ],
)
def test_what_there_is_not_is_refused(script, given, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["script", *given])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIPEDEC_JAX_COMPILATION_CACHE", "off")
    with pytest.raises(SystemExit) as stopped:
        run_command(script.main, refusals=(ValueError, OSError))
    shown = capsys.readouterr()
    assert (stopped.value.code, shown.out) == (2, "")
    assert shown.err.startswith(f"error: {message}")
    assert shown.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
