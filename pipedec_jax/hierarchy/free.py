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

if TYPE_CHECKING:
    from pipedec_jax.hierarchy.engine import HierarchyEngine

IDLE_S = 0.05
"""Longest wait of a model that has nothing to do for news of the others."""


def run_free(engine: HierarchyEngine, published: Sequence[jax.Array], goal: int) -> list[jax.Array]:
    """Run until the target holds `goal` tokens or a complete answer; returns the newest published buffers.

    Raises:
        BaseException: the first error of any thread.
    """
    newest = list(published)
    news = threading.Condition()
    errors: list[BaseException] = []
    stop = threading.Event()
    passes = (*engine.settings.passes, 1)

    def work(index: int) -> None:
        made = -1
        while not stop.is_set():
            if engine.delay is not None:
                time.sleep(engine.delay(index))
            seen = list(newest)
            packed = engine.step(index, seen, passes[index])
            figures = np.asarray(packed)  # waits until it is ready: what is published can be read at once
            with news:
                newest[index] = packed
                news.notify_all()
                if index + 1 == len(newest):
                    if engine.enough(packed, goal):
                        stop.set()
                elif figures[1] == made:
                    # Nothing left to guess before the others move.
                    same = [a is b for k, (a, b) in enumerate(zip(seen, newest, strict=True)) if k != index]
                    if all(same) and not stop.is_set():
                        news.wait(IDLE_S)
            made = figures[1]

    def run(index: int) -> None:
        try:
            work(index)
        except BaseException as error:  # handed on to the caller's thread
            errors.append(error)
        finally:
            if errors or index + 1 == len(newest):
                stop.set()
            with news:
                news.notify_all()

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(newest))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        # Interrupted while starting or waiting: the threads must not go on with what the next answer uses. One that is
        # not alive yet although it was started finds `stop` set before its first step.
        stop.set()
        with news:
            news.notify_all()
        for thread in threads:
            if thread.is_alive():
                thread.join()
    if errors:
        raise errors[0]
    return newest
