"""Ctrl-C that is not lost while JAX works.

JAX has Python call it in every collection of garbage. While a program is compiled that is often the first Python code
after a signal, so the interrupt is raised in there, where Python drops every exception.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading

AGAIN_S = 0.05
"""Seconds after which an interrupt that was dropped comes again."""


def take_interrupts() -> None:
    """Raise `KeyboardInterrupt` at Ctrl-C, as Python does, until it is raised where it is not dropped."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    told = sys.unraisablehook

    def again(dropped: sys.UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            told(dropped)
            return
        while True:
            try:
                threading.Timer(AGAIN_S, _thread.interrupt_main).start()
                return
            except KeyboardInterrupt:  # on a busy machine it comes before `start` returns, to be dropped here as well
                continue

    sys.unraisablehook = again


def ignore_interrupts() -> None:
    """Ctrl-C does nothing any more: for a process that is about to end, and must not be interrupted in that."""
    while True:
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            return
        except KeyboardInterrupt:  # one that had come before
            continue
