"""Options of numbers out of range are refused in words, and so is what a script says is wrong with its input."""

import argparse

import pytest

from pipedec_jax.command_line import numbers
from pipedec_jax.command_line.output import run_command


@pytest.mark.parametrize(
    ("kind", "good", "bad", "message"),
    [
        (numbers.from_1, {"1": 1, "40": 40}, ["0", "-1", "1.5", "x", "", "²"], "a whole number of at least 1"),
        (numbers.from_0, {"0": 0, "7": 7}, ["-1", "1.0", "x", ""], "a whole number of at least 0"),
        (numbers.up_to_1, {"0": 0, "0.5": 0.5, "1": 1}, ["-0.1", "1.1", "nan", "x"], "a number from 0 to 1"),
        (numbers.over_0, {"0.1": 0.1}, ["0", "-1", "inf", "nan", "x"], "a number over 0"),
        (numbers.amount, {"0": 0, "2.5": 2.5}, ["-1", "inf", "nan", "x"], "a number of at least 0"),
        (numbers.process_shape, {"2x1": "2x1", "10x20": "10x20"}, ["2", "0x1", "2x", "2x1x1", "axb"], "such as 2x1"),
    ],
)
def test_what_is_out_of_range_is_named(kind, good, bad, message):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=message) as found:
            kind(text)
        assert str(found.value).endswith(f"not {text!r}")


def test_a_script_refuses_its_input_in_a_line(capsys):
    def main():
        raise FileNotFoundError(2, "No such file or directory", "here")

    with pytest.raises(SystemExit) as end:
        run_command(main, refusals=(ValueError, OSError))
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: here: No such file or directory\n"
    with pytest.raises(FileNotFoundError):
        run_command(main)
