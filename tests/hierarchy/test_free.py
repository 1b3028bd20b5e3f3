"""The threads of the free-running form: an interrupt at any moment leaves none that goes on."""

from __future__ import annotations

import contextlib
import threading
import types
from typing import Any, cast

import numpy as np
import pytest

from pipedec_jax.hierarchy import free

MODELS = 3


class FakeBuffer(np.ndarray):
    """A published buffer. As of an array of JAX, its shards are listed when they are first asked for."""

    listed = False

    @property
    def addressable_shards(self) -> list[Any]:
        self.listed = True
        return []


def buffer(*figures: int) -> Any:
    """A buffer to publish."""
    return np.asarray(figures or (0, 0)).view(FakeBuffer)


class FakeEngine:
    """Models whose steps only count; no answer is ever enough."""

    def __init__(self) -> None:
        self.settings = types.SimpleNamespace(passes=(1,) * (MODELS - 1))
        self.delay = None
        self.steps = 0
        self.stepped = threading.Event()

    def step(self, index: int, published: Any, passes: int) -> np.ndarray:
        self.steps += 1
        self.stepped.set()
        return buffer(0, self.steps)

    def enough(self, packed: Any, goal: int) -> bool:
        return False


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("which", range(MODELS))
def test_an_interrupt_while_threads_start_leaves_none_running(
    monkeypatch: pytest.MonkeyPatch, which: int, after: bool
) -> None:
    engine, made = FakeEngine(), []

    class Interrupted(threading.Thread):
        def start(self) -> None:
            made.append(self)
            here = len(made) == which + 1
            if here and not after:
                raise KeyboardInterrupt
            super().start()
            if here:
                engine.stepped.wait()
                raise KeyboardInterrupt

    monkeypatch.setattr(free.threading, "Thread", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        free.run_free(cast(Any, engine), [buffer()] * MODELS, goal=1)
    assert len(made) == which + 1
    assert not any(thread.is_alive() for thread in made)
    assert all(thread.daemon for thread in made), "nor does one keep the process, however it ends"


@pytest.mark.parametrize("error", [ValueError, SystemExit])
@pytest.mark.parametrize("which", [1, MODELS - 1])
def test_an_error_in_a_thread_ends_all_and_is_raised(which: int, error: type[BaseException]) -> None:
    engine, broken = FakeEngine(), []

    def step(index: int, published: Any, passes: int) -> np.ndarray:
        if index == which:
            broken.append(threading.current_thread())
            engine.stepped.set()
            raise error("broken")
        engine.stepped.wait()
        broken[0].join()
        raise ValueError("only because the other has stopped")

    engine.step = step
    before = threading.active_count()
    with pytest.raises(error, match="broken"):
        free.run_free(cast(Any, engine), [buffer()] * MODELS, goal=1)
    assert threading.active_count() == before


def test_threads_meet_no_buffer_whose_shards_are_yet_to_be_listed() -> None:
    """JAX lists them twice, or in part, when two threads ask at once: stepping then fails."""
    engine = FakeEngine()
    count, seen = engine.step, []

    def step(index: int, published: Any, passes: int) -> Any:
        seen.extend(one.listed for one in published)
        return count(index, published, passes)

    engine.step, engine.enough = step, lambda *_: engine.steps > 50
    free.run_free(cast(Any, engine), [buffer() for _ in range(MODELS)], goal=1)
    assert len(seen) > 50 * MODELS
    assert all(seen)


class Waiting(threading.Condition):
    """News that tells when so many models wait, and how each wait has ended."""

    def __init__(self, models: int) -> None:
        super().__init__()
        self.ended: list[bool] = []
        self.left, self.all_wait = models, threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.left -= 1
        if self.left == 0:
            self.all_wait.set()
        self.ended.append(super().wait(timeout))
        return self.ended[-1]


@pytest.mark.parametrize("fails", [False, True])
def test_models_that_wait_are_woken_by_news_and_by_the_end_and_not_by_time(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    engine, news, woken = FakeEngine(), Waiting(MODELS - 1), threading.Event()
    monkeypatch.setattr(free, "IDLE_S", 10.0)
    named = types.SimpleNamespace(Condition=lambda: news, Event=threading.Event, Thread=threading.Thread)
    monkeypatch.setattr(free, "threading", named)
    given, said = {}, [buffer(place, 0) for place in range(3)]

    def step(index: int, published: Any, passes: int) -> Any:
        given[index] = passes
        if index + 1 < MODELS:
            if published[-1] is said[0]:
                woken.set()
            return buffer(3, 7)
        engine.steps += 1
        if engine.steps == 1:
            assert news.all_wait.wait(10)
            if fails:
                raise ValueError("broken")
        elif engine.steps == 2:
            assert woken.wait(5)
        return said[engine.steps - 1]

    engine.settings.passes = (5, 3)
    engine.step, engine.enough = step, lambda packed, goal: packed is said[goal]
    with pytest.raises(ValueError, match="broken") if fails else contextlib.nullcontext():
        found = free.run_free(cast(Any, engine), [buffer() for _ in range(MODELS)], goal=2)
        assert found[-1] is said[2]
        assert [list(packed) for packed in found[:-1]] == [[3, 7]] * 2
    assert given == {0: 5, 1: 3, 2: 1}
    assert all(news.ended)


def test_a_model_waits_when_it_has_nothing_to_do_and_there_was_no_news_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, waits, late = FakeEngine(), [], []
    run = free._FreeRun(cast(Any, engine), [buffer() for _ in range(MODELS)], goal=1)
    monkeypatch.setattr(run._news, "wait", lambda _: waits.append(engine.steps))
    monkeypatch.setattr(free.time, "sleep", late.append)
    engine.delay = lambda index: 0.5 + index

    def step(index: int, published: Any, passes: int) -> Any:
        engine.steps += 1
        if engine.steps == 3:
            run.newest[1] = buffer()
        if engine.steps == 5:
            run._stopped.set()
        return buffer(engine.steps, 7)  # longer, as the models above have helped, by no pass of its own

    engine.step = step
    run._steps(0)
    assert waits == [2, 4]
    assert late == [0.5] * 5
    # The target has always something to do.
    engine.steps, engine.enough = 10, lambda packed, _: packed[0] == 14
    run._stopped.clear()
    run._steps(MODELS - 1)
    assert (waits, engine.steps) == ([2, 4], 14)
