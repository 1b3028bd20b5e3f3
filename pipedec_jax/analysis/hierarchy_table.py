"""Runs hierarchies over prompts and gathers counts, each answer compared with plain decoding's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pipedec_jax.clock import decode
from pipedec_jax.hierarchy.engine import HierarchyEngine


@dataclasses.dataclass(frozen=True)
class HierarchyRow:
    """One hierarchy's sums over all prompts; counted, but for the models' names."""

    tokens: int
    ticks: int
    """Passes of the target (of one stage)."""
    rollbacks: tuple[int, ...]
    """Of each model but the target."""
    undone: tuple[int, ...]
    """Tokens each model but the target lost to them."""
    passes: tuple[int, ...]
    """Of each model, those after the answer was complete included."""

    @property
    def tokens_per_tick(self) -> float:
        """With one stage, tokens per pass of the target."""
        return self.tokens / self.ticks


def count(
    engine: HierarchyEngine, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], new_tokens: int
) -> HierarchyRow:
    """Run a hierarchy over the prompts."""
    ticks, tokens = 0, 0
    below = range(len(engine.models) - 1)
    rollbacks, undone, passes = [0] * len(below), [0] * len(below), [0] * len(engine.models)
    for prompt, answer in zip(prompts, answers, strict=True):
        progress, _ = decode(engine, prompt, answer, new_tokens)
        ticks += progress.ticks[-1]
        tokens += len(progress.tokens)
        figures = engine.figures()
        for index in below:
            rollbacks[index] += figures[index].rollbacks
            undone[index] += figures[index].undone
        passes = [total + figure.passes for total, figure in zip(passes, figures, strict=True)]
    return HierarchyRow(tokens, ticks, tuple(rollbacks), tuple(undone), tuple(passes))
