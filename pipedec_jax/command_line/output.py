"""Running a command whose reader may go away: `| head` ends it without a word, as Python's documentation has it.

https://docs.python.org/3/library/signal.html#note-on-sigpipe
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def run_command(main: Callable[[], int | None]) -> None:
    """Run a script's main function. Ends the process with the status that it returns, if any; with 1 once nobody reads.

    Args:
        main: prints; what it raises is raised here, but for `BrokenPipeError`.
    """
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()  # what is still to be written fails here, and not when Python ends
    except BrokenPipeError:
        discard_output()
        sys.exit(1)
    if status:
        sys.exit(status)


def discard_output() -> None:
    """Send what is left of standard output nowhere: Python flushes it at exit and would complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
