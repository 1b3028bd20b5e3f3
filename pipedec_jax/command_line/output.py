"""What every command does alike: how it takes options, says what is wrong, and ends when its reader goes away.

`| head` ends it without a word, as Python's documentation has it:
https://docs.python.org/3/library/signal.html#note-on-sigpipe
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

PICTURES = (".svg", ".png", ".pdf")
"""What a picture's name may end in."""


class Parser(argparse.ArgumentParser):
    """Shows a description as it is written, takes no abbreviated options, and reports bad arguments in one line."""

    def __init__(self, **options: Any) -> None:
        usual = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**(usual | options))

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with status 2."""
        fail(message)


class Failed(SystemExit):
    """Ends this process with status 2, after `fail` has said why."""

    def __init__(self, reason: str) -> None:
        super().__init__(2)
        self.reason = reason


def fail(message: object) -> NoReturn:
    """Say what is wrong with the input, and stop."""
    reason = in_words(message)
    print(f"error: {reason}", file=sys.stderr)
    raise Failed(reason)


def run_command(main: Callable[[], int | None], refusals: tuple[type[Exception], ...] = ()) -> None:
    """Run a script's main function. Ends the process with the status that it returns, if any; with 1 once nobody reads.

    Args:
        main: prints; what it raises is raised here, but for `BrokenPipeError` and `refusals`.
        refusals: errors by which it refuses its input: they are printed in a line, and the status is 2.
    """
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()  # what is still to be written fails here, and not when Python ends
    except BrokenPipeError:
        discard_output()
        sys.exit(1)
    except refusals as error:
        fail(error)
    if status:
        sys.exit(status)


def in_words(error: object) -> str:
    """What an error says, without the number that the system gives it."""
    if not isinstance(error, OSError) or error.errno is None or not error.strerror:
        return str(error)
    files = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return f"{' to '.join(files)}: {error.strerror}" if files else error.strerror


def check_place(option: str, path: Path) -> None:
    """Look, before long work, whether a file can be written there after it; leaves nothing behind.

    Folders that are not there are for the writer to make.

    Raises:
        ValueError: naming the option, when it cannot.
    """
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{path.name}."):
            pass
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written: {error.strerror or error}") from error


def check_picture(option: str, path: Path) -> None:
    """The same of a picture, whose kind its name says.

    Raises:
        ValueError: naming the option, when it cannot be written, or is of another kind than `PICTURES`.
    """
    if path.suffix not in PICTURES:
        raise ValueError(f"{option} must end in one of {', '.join(PICTURES)}, not {str(path)!r}")
    check_place(option, path)


def is_output(path: Path) -> bool:
    """Whether a file is what standard output goes to."""
    with contextlib.suppress(OSError):  # there is no such file, or no output of the system's
        return os.path.samestat(path.stat(), os.fstat(sys.stdout.fileno()))
    return False


def discard_output() -> None:
    """Send what is left of standard output nowhere: Python flushes it at exit and would complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
