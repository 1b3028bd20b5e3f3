"""The engine behind models of known words, right as often as an acceptance says: closed forms and simulator, counted.

The target is a small random model, so that any acceptance can be had without trained ones, and long texts in seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from pipedec_jax.analysis.hierarchy import draw_words, simulate
from pipedec_jax.config import LlamaConfig
from pipedec_jax.hierarchy.engine import HierarchyEngine
from pipedec_jax.hierarchy.program import KnownModel
from pipedec_jax.hierarchy.settings import HierarchySettings
from pipedec_jax.model.parameters import MemorySource, initialize

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
        ticks, simulated, same = 0, 0, True
        rollbacks = np.zeros(len(passes), int)
        for number in range(texts):
            words = draw_words(acceptance, len(self.text), 1, seed=seed + number)
            for model, labels in zip(self.engine.models[:-1], words[:-1, 0], strict=True):
                model.place_weights(KnownModel((self.text + labels) % VOCAB), VOCAB)
            self.engine.start([1], max_new_tokens=self.length)
            progress = self.engine.run(self.length)
            if progress.tokens != self.text[1:].tolist():
                raise RuntimeError("an answer differs from the target's own text")
            run, figures = simulate(words, passes, width=width), self.engine.figures()[:-1]
            own = np.asarray([(figure.rollbacks, figure.undone) for figure in figures])
            played = np.stack((run.rollbacks[:, 0], run.undone[:, 0]), axis=1)
            same &= progress.ticks[-1] == run.ticks[0] and bool(np.all(own == played))
            ticks, simulated = ticks + progress.ticks[-1], simulated + int(run.ticks[0])
            rollbacks += own[:, 0]
        return Counted(self.length * texts, ticks, simulated, tuple(rollbacks.tolist()), same)
