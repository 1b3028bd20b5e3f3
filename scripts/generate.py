"""Decode a prompt with a pipelined LLaMA, streaming the text; without arguments, a sample with the demo family."""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt of imports breaks some, and prints where all are

from pipedec_jax.command_line.interrupts import take_interrupts
from pipedec_jax.command_line.output import fail, run_command
from pipedec_jax.command_line.running import main
from pipedec_jax.disk_cache import use_compilation_cache


def start() -> int:
    """Find the compiled programs, and run; the status to end with."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        take_interrupts()
    try:
        use_compilation_cache()
    except ValueError as error:
        fail(error)
    return main()


if __name__ == "__main__":
    run_command(start)
