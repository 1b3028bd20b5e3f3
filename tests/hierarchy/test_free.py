"""The threads of the free-running form: an interrupt at any moment leaves none that goes on."""

from __future__ import annotations

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


def test_an_error_in_a_thread_ends_all_and_is_raised() -> None:
    engine = FakeEngine()

    def step(index: int, published: Any, passes: int) -> np.ndarray:
        if index == 1:
            raise ValueError("broken")
        return buffer()

    engine.step = step
    before = threading.active_count()
    with pytest.raises(ValueError, match="broken"):
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
