"""The demo family's scripts refuse what cannot be measured or trained, in one line, before anything is computed."""

import os

import pytest

import evaluate_demo
import train_demo


@pytest.mark.parametrize(
    ("script", "given", "message"),
    [
        (evaluate_demo, ["--windows", "8"], "--windows must be a multiple of --batch (16), not 8"),
        (evaluate_demo, ["--prompts", "0"], "--prompts must be at least 1, not 0"),
        (evaluate_demo, ["--window", "4096"], "--window must be at most the target's context of 2048 tokens, not 4096"),
        (evaluate_demo, ["--prompt", "2000"], "--prompt and --new must be at most the target's context"),
        (evaluate_demo, ["--family", "nowhere"], "nowhere/target does not exist"),
        (train_demo, ["--run", "RUN", "--target-steps", "0"], "--target-steps must be at least 1, not 0"),
        (train_demo, ["--run", "RUN", "--until", "then"], "--until then: choose one of text, target"),
        (train_demo, ["--run", "RUN", "--log", "/dev/null/log"], "--log /dev/null/log cannot be written: "),
        (train_demo, ["--run", "RUN", "--target", "nowhere"], "nowhere: No such file"),
    ],
)
def test_bad_input_is_one_clear_line(script, given, message, monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # they change it
    monkeypatch.setattr("sys.argv", ["script", *given])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    shown = capsys.readouterr()
    assert (stopped.value.code, shown.out, shown.err.count("\n")) == (2, "", 1)
    assert message in shown.err
