"""Ctrl-C is raised wherever it comes."""

import gc
import itertools
import signal
import sys
import threading
import weakref

import pytest

from pipedec_jax.command_line.interrupts import ignore_interrupts, take_interrupts


class Thing:
    """That something can be called at the end of."""


@pytest.fixture(autouse=True)
def told(monkeypatch):
    """What is told of exceptions that Python drops."""
    found = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: found.append(dropped.exc_type))
    before = signal.getsignal(signal.SIGINT)
    take_interrupts()
    yield found
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_that_python_drops_comes_again(told):
    expect_it_again(told)


def test_it_comes_again_where_it_came_while_its_return_was_prepared(told, monkeypatch):
    class Busy(threading.Timer):
        def start(self):
            super().start()
            if not begun:
                begun.append(None)
                self.cancel()
                signal.raise_signal(signal.SIGINT)

    begun = []
    monkeypatch.setattr(threading, "Timer", Busy)
    expect_it_again(told)
    assert begun


def expect_it_again(told):
    def interrupted(*_):
        if not calls:
            calls.append(None)
            signal.raise_signal(signal.SIGINT)

    def work():
        gc.collect()
        for _ in itertools.repeat(None, 10**10):
            pass

    calls = []
    gc.callbacks.append(interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        gc.callbacks.remove(interrupted)
    assert calls
    assert told == []


def test_any_other_exception_that_python_drops_is_told(told):
    def fail(_):
        raise ValueError

    thing = Thing()
    reference = weakref.ref(thing, fail)
    del thing
    assert reference() is None
    assert told == [ValueError]


def test_one_that_ends_is_interrupted_no_more(monkeypatch):
    def pending(number, action):
        monkeypatch.undo()
        signal.raise_signal(number)
        return signal.signal(number, action)

    monkeypatch.setattr(signal, "signal", pending)
    ignore_interrupts()
    signal.raise_signal(signal.SIGINT)
