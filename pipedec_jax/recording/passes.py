"""The recording of a hierarchy: what each model had published after each of its steps, and so what it did in them.

It costs nothing but keeping what is published anyway. In lockstep the k-th step of every model is tick k; where models
take turns, it is turn k; where they run free, steps of different models have no common clock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from pipedec_jax.hierarchy.buffers import FIGURES


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a model: some passes between two looks at the others."""

    model: int
    number: int
    """From 1 on, of this model."""
    passes: int
    rolled_back: bool
    """Whether a larger model contradicted it."""
    undone: int
    """Tokens it lost to that."""
    gained: int
    """Tokens it then took over from above or wrote itself."""
    length: int
    """Tokens of the answer that it holds after the step."""


@dataclasses.dataclass(frozen=True)
class PassRecording:
    """All steps of all models for an answer."""

    method: str
    form: str
    names: tuple[str, ...]
    """Of the models, the smallest first, the target last."""
    steps: tuple[tuple[Step, ...], ...]
    """Of each model, in order."""
    tokens: tuple[int, ...]
    """The answer, as far as the target has it."""
    texts: tuple[str, ...]
    """Their texts."""

    @property
    def clock(self) -> str:
        """What the number of a step means to all models alike; `step` where it means nothing."""
        if self.method == "speculative":
            return "turn"
        return "tick" if self.form == "lockstep" else "step"

    @property
    def last(self) -> int:
        """The target's last step with a pass; steps that were begun ahead come after the answer's end."""
        return max((step.number for step in self.steps[-1] if step.passes), default=0)

    def new_tokens(self, number: int) -> tuple[str, ...]:
        """The texts that the target gained in its step of this number."""
        step = self.steps[-1][number - 1]
        return self.texts[step.length - step.gained : step.length]


def read_passes(
    published: Sequence[tuple[int, np.ndarray]],
    method: str,
    form: str,
    names: Sequence[str],
    prompt_length: int,
    text: Callable[[int], str] = str,
) -> PassRecording:
    """Tell what the models have published.

    Args:
        published: model and buffer (`buffers.pack`), in each model's order; the first of each is that after prefill.
        method: `pipespec` or `speculative`.
        form: `lockstep` or `free`.
        names: of the models.
        prompt_length: tokens of the prompt.
        text: of a token.
    """
    steps: list[list[Step]] = [[] for _ in names]
    names_of_figures: tuple[str, ...] = FIGURES
    before: dict[int, dict[str, int]] = {}
    last = np.zeros(0, np.int32)
    for index, packed in published:
        now: dict[str, int] = dict(zip(names_of_figures, packed[: len(FIGURES)].tolist(), strict=True))
        old = before.get(index)
        before[index] = now
        if index + 1 == len(names):
            last = packed[len(FIGURES) + prompt_length : len(FIGURES) + now["length"]]
        if old is None:
            continue
        undone = now["undone"] - old["undone"]
        steps[index].append(
            Step(
                model=index,
                number=len(steps[index]) + 1,
                passes=now["passes"] - old["passes"],
                rolled_back=now["rollbacks"] > old["rollbacks"],
                undone=undone,
                gained=now["length"] - old["length"] + undone,
                length=now["length"] - prompt_length,
            )
        )
    tokens = tuple(last.tolist())
    return PassRecording(method, form, tuple(names), tuple(map(tuple, steps)), tokens, tuple(map(text, tokens)))
