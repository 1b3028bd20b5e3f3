"""Scripts that measure or check refuse what cannot be, in one line, before anything is computed."""

import pytest

import compare_head
import kill_batches
import measure_context
import run_long


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
