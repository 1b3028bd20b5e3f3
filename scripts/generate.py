"""Decode a prompt with a pipelined LLaMA, streaming the text; without arguments, a sample with the demo family."""

from __future__ import annotations

from pipedec_jax.command_line.options import fail
from pipedec_jax.command_line.output import run_command
from pipedec_jax.command_line.running import main
from pipedec_jax.disk_cache import use_compilation_cache


def start() -> int:
    """Find the compiled programs, and run; the status to end with."""
    try:
        use_compilation_cache()
    except ValueError as error:
        fail(error)
    return main()


if __name__ == "__main__":
    run_command(start)
