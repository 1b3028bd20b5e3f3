"""Scripts end quietly when nobody reads their output any more, and only then."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipedec_jax.command_line.output import check_place

SCRIPTS = sorted((Path(__file__).parents[2] / "scripts").glob("*.py"))
RUN = "import sys\nfrom pipedec_jax.command_line.output import run_command\n"


def run(arguments, unread=False):
    """Run Python with an output that is read, or whose reader has gone before anything is written."""
    reading, writing = os.pipe()
    if unread:
        os.close(reading)
    done = subprocess.run([sys.executable, *arguments], stdout=writing, stderr=subprocess.PIPE, timeout=120)
    os.close(writing)
    if unread:
        return done.returncode, "", done.stderr.decode()
    with os.fdopen(reading) as file:
        return done.returncode, file.read(), done.stderr.decode()


@pytest.mark.parametrize(
    "body",
    [
        "for line in range(20_000): print(line)",
        "print('a little, which Python writes at its end')",
        "print('help'); sys.exit(0)",
        "print('at once', flush=True)",
    ],
)
def test_a_command_whose_reader_has_gone_ends_with_status_1_and_says_nothing(body):
    program = f"{RUN}def main():\n    {body}\nrun_command(main)"
    assert run(["-c", program], unread=True) == (1, "", "")
    if "20_000" not in body:  # more than a pipe holds
        status, shown, said = run(["-c", program])
        assert (status, said) == (0, "")
        assert shown


def test_a_commands_own_status_and_errors_stay():
    assert run(["-c", f"{RUN}run_command(lambda: print('x') or 3)"]) == (3, "x\n", "")
    assert run(["-c", f"{RUN}run_command(lambda: sys.exit('no'))"]) == (1, "", "no\n")
    status, shown, said = run(["-c", f"{RUN}run_command(lambda: print('x') or 1 / 0)"])
    assert (status, shown) == (1, "x\n")
    assert "ZeroDivisionError" in said


def test_a_list_and_a_help_may_be_cut_off():
    folder = SCRIPTS[0].parent
    assert run([str(folder / "reproduce.py"), "--list"], unread=True) == (1, "", "")
    # argparse itself takes no notice of who has gone.
    assert run([str(folder / "generate.py"), "--help"], unread=True)[1:] == ("", "")


def test_a_place_that_can_be_written_to_is_left_as_it_was(tmp_path):
    for path in (tmp_path / "new.json", tmp_path / "no" / "such" / "folder" / "new.json"):
        check_place("--out", path)
    (tmp_path / "old.json").write_text("old")
    check_place("--out", tmp_path / "old.json")
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "old"


def test_a_place_that_cannot_be_written_to_is_an_error_also_for_who_may_do_all(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "new.json", Path("/proc/new.json")):
        with pytest.raises(ValueError, match=f"^--out {path} cannot be written: [A-Z]"):
            check_place("--out", path)


def test_every_script_is_run_so():
    for script in SCRIPTS:
        last = script.read_text(encoding="utf-8").rsplit('if __name__ == "__main__":\n', 1)[1]
        refusing = "    run_command(main, refusals=(ValueError, OSError))\n"
        assert last in ("    run_command(main)\n", "    run_command(start)\n", refusing), script.name
