"""The free-running form: a host thread for every model, and nobody waits for anybody.

Each thread steps its model on the model's own devices, from the newest buffers that the others have published, and
publishes its own when that is ready. A published buffer is never written again, so a reader needs no lock: it holds a
whole version, if perhaps an old one. A model finds out that it was contradicted when it next compares its text with the
versions above, and rolls itself back; a late message can cost passes, but never make a wrong token (see `buffers`).
Source: PipeSpec (arXiv 2505.01572).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from pipedec_jax.hierarchy.buffers import FIGURES
from pipedec_jax.own_settings import own_settings

if TYPE_CHECKING:
    from pipedec_jax.hierarchy.engine import HierarchyEngine

IDLE_S = 0.05
"""Longest wait of a model that has nothing to do for news of the others."""


def run_free(engine: HierarchyEngine, published: Sequence[jax.Array], goal: int) -> list[jax.Array]:
    """Run until the target holds `goal` tokens or a complete answer; returns the newest published buffers.

    Raises:
        BaseException: the first error of any thread.
    """
    run = _FreeRun(engine, published, goal)
    threads = [threading.Thread(target=run.work, args=(index,), daemon=True) for index in range(len(published))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        # Interrupted while starting or waiting: the threads must not go on with what the next answer uses. One that is
        # not alive yet although it was started finds it stopped before its first step.
        run.stop()
        for thread in threads:
            if thread.is_alive():
                thread.join()
    if run.errors:
        raise run.errors[0]
    return run.newest


class _FreeRun:
    """What the threads share.

    Args:
        engine: whose models they step.
        published: buffers to begin with.
        goal: tokens that the target shall hold.
    """

    def __init__(self, engine: HierarchyEngine, published: Sequence[jax.Array], goal: int) -> None:
        self.newest = [_shareable(packed) for packed in published]
        self.errors: list[BaseException] = []
        self._engine = engine
        self._goal = goal
        self._passes = (*engine.settings.passes, 1)
        self._news = threading.Condition()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Let every thread end after its step."""
        self._stopped.set()
        with self._news:
            self._news.notify_all()

    def work(self, index: int) -> None:
        """Step a model until all is done; an error stops the others, and is kept for the caller's thread."""
        try:
            with own_settings():  # a thread of its own
                self._steps(index)
        except BaseException as error:
            self.errors.append(error)
            self.stop()

    def _steps(self, index: int) -> None:
        made = -1
        while not self._stopped.is_set():
            if self._engine.delay is not None:
                time.sleep(self._engine.delay(index))
            seen = list(self.newest)
            packed = self._engine.step(index, seen, self._passes[index])
            figures = np.asarray(packed)  # waits until it is ready: what is published can be read at once
            packed = _shareable(packed)
            passes = int(figures[FIGURES.index("passes")])
            with self._news:
                self.newest[index] = packed
                self._news.notify_all()
                if self._is_target(index):
                    if self._engine.enough(packed, self._goal):
                        self._stopped.set()
                elif passes == made:
                    self._wait_for_news(index, seen)
            made = passes

    def _wait_for_news(self, index: int, seen: Sequence[jax.Array]) -> None:
        """Nothing is left to guess before the others move: wait, unless they have."""
        others = (a is b for k, (a, b) in enumerate(zip(seen, self.newest, strict=True)) if k != index)
        if all(others) and not self._stopped.is_set():
            self._news.wait(IDLE_S)

    def _is_target(self, index: int) -> bool:
        return index + 1 == len(self.newest)


def _shareable(packed: jax.Array) -> jax.Array:
    """A buffer that threads may read at the same time.

    JAX lists an array's shards when it is first asked for them; two threads that ask at once get them twice, or a part.
    """
    _ = packed.addressable_shards
    return packed
