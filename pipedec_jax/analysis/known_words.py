"""The engine behind models of known words, right as often as an acceptance says: closed forms and simulator, counted.

The target is a small random model, so that any acceptance can be had without trained ones, and long texts in seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from numpy.typing import ArrayLike

from pipedec_jax.config import LlamaConfig
from pipedec_jax.hierarchy.engine import HierarchyEngine
from pipedec_jax.hierarchy.program import KnownModel
from pipedec_jax.hierarchy.settings import HierarchySettings
from pipedec_jax.model.parameters import MemorySource, initialize
from pipedec_jax.modeled.hierarchy import draw_words, simulate

VOCAB = 97


@dataclasses.dataclass(frozen=True)
class Counted:
    """One setting's ticks over all its texts, of the engine and of the simulator with the same words."""

    tokens: int
    ticks: int
    """Counted in the engine."""
    simulated: int
    """Ticks of the simulator."""
    rollbacks: tuple[int, ...]
    """Counted, of each model but the target."""
    same: bool
    """Whether ticks, rollbacks and undone tokens of every text are the simulator's."""


class KnownHierarchy:
    """An engine of so many models that decodes texts of some length.

    Args:
        models: their number, the target included; as many devices are needed.
        length: tokens of a text.
        width: most tokens that a verification reads.
    """

    def __init__(self, models: int, length: int, width: int) -> None:
        config = LlamaConfig(
            vocab_size=VOCAB, width=8, feed_forward=8, layers=1, heads=1, kv_heads=1, head_size=8, context=length + 1
        )
        target = MemorySource(config, initialize(config, jax.random.key(0)))
        self.settings = HierarchySettings(
            stages=(1,) * models, passes=(1,) * (models - 1), width=width, capacity=length + 8
        )
        known = [KnownModel(np.zeros(1, np.int32))] * (models - 1)
        self.engine = HierarchyEngine([*known, target], self.settings, vocab_size=VOCAB)
        self.length = length
        self.engine.start([1], max_new_tokens=length)
        self.text = np.asarray([1, *self.engine.run(length).tokens], np.int32)

    def count(self, acceptance: Sequence[float], passes: Sequence[int], texts: int, seed: int) -> Counted:
        """Decode some texts.

        Args:
            acceptance: of each pair of neighbours, the smallest first.
            passes: of each model but the target, in a tick.
            texts: how many.
            seed: of the first one's words.

        Raises:
            RuntimeError: when an answer is not the target's own text.
        """
        self.engine.settings = dataclasses.replace(self.settings, passes=tuple(passes))
        width = self.settings.widths[-1]
        drawn = [draw_words(acceptance, len(self.text), 1, seed=seed + number) for number in range(texts)]
        run = simulate(np.concatenate(drawn, axis=1), passes, width=width)
        ticks, same = 0, True
        rollbacks = np.zeros(len(passes), int)
        for number, words in enumerate(drawn):
            for model, labels in zip(self.engine.models[:-1], words[:-1, 0], strict=True):
                model.place_weights(KnownModel((self.text + labels) % VOCAB), VOCAB)
            self.engine.start([1], max_new_tokens=self.length)
            progress = self.engine.run(self.length)
            if progress.tokens != self.text[1:].tolist():
                raise RuntimeError("an answer differs from the target's own text")
            own = np.asarray([(figure.rollbacks, figure.undone) for figure in self.engine.figures()[:-1]])
            played = np.stack((run.rollbacks[:, number], run.undone[:, number]), axis=1)
            same &= progress.ticks[-1] == run.ticks[number] and bool(np.all(own == played))
            ticks += progress.ticks[-1]
            rollbacks += own[:, 0]
        return Counted(self.length * texts, ticks, int(run.ticks.sum()), tuple(rollbacks.tolist()), same)


def texts_needed(ticks: ArrayLike, length: int, counted: int, error: float, deviations: float = 4.0) -> int:
    """Texts to count so that chance alone stays within an error: so many standard deviations of their mean make it.

    Args:
        ticks: of simulated texts of the same setting, two at least.
        length: tokens of each of those.
        counted: tokens of a text that will be counted; its spread goes with the root of the length.
        error: relative, of the mean.
        deviations: 4 leave one cell in 16,000 beyond it.

    Raises:
        ValueError: for fewer than two texts, whose spread nobody knows.
    """
    ticks = np.asarray(ticks, np.float64)
    if ticks.size < 2:
        raise ValueError(f"the spread of texts needs two of them at least, not {ticks.size}")
    spread = np.std(ticks, ddof=1) / np.mean(ticks) * np.sqrt(length / counted)
    return max(1, int(np.ceil((deviations * spread / error) ** 2)))
