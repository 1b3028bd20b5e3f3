"""Which of some models to use, and how many passes a tick: chosen from what was measured on this machine.

Measured are the seconds of a pass of each model at a few widths, and what each model says along a piece of the target's
own text. Every selection of models, passes and widths is then simulated on those words
(`pipedec_jax.analysis.hierarchy`), a tick charged what was measured, and the least time per token wins. So a model in
the middle is left out where it does not pay, and a verification is as wide as pays where rows are not free.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pipedec_jax.analysis.cost import lockstep_tick_cost
from pipedec_jax.analysis.hierarchy import simulate
from pipedec_jax.hierarchy.buffers import FIGURES
from pipedec_jax.hierarchy.program import ModelProgram
from pipedec_jax.hosts.processes import process_count
from pipedec_jax.model.parameters import ParameterSource
from pipedec_jax.pipeline.engine import make_request
from pipedec_jax.sampling import GREEDY, Sampling

WIDTHS = (1, 4, 16)
"""Widths that are timed; others are interpolated."""
MOST_PASSES = 24
"""Most passes of a model in a tick that are tried."""
REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of some models, the smallest first."""

    seconds: tuple[Mapping[int, float], ...]
    """Of a pass of each model, by width."""
    words: np.ndarray
    """`[k + 1, T]`: what each model says at each position of the target's texts, one after another; the target's row is
    the texts. The first token is given."""

    def pass_seconds(self, model: int, width: int) -> float:
        """Of a pass at any width: interpolated, and beyond the widest in proportion to the last step."""
        known = self.seconds[model]
        widths = sorted(known)
        if len(widths) > 1 and width > widths[-1]:
            a, b = widths[-2:]
            return known[b] + (known[b] - known[a]) / (b - a) * (width - b)
        return float(np.interp(width, widths, [known[w] for w in widths]))

    def agreement(self, model: int) -> float:
        """Share of the text's tokens that a model says as the target does."""
        return float(np.mean(self.words[model, 1:] == self.words[-1, 1:]))


@dataclasses.dataclass(frozen=True)
class Choice:
    """A selection, and what it should cost by measured passes and simulated ticks."""

    models: tuple[int, ...]
    """Indices of the models in use, the smallest first, the target last."""
    passes: tuple[int, ...]
    """Of each but the target, in a tick."""
    width: int
    tokens_per_tick: float
    """Simulated."""
    tick_seconds: float
    """From measured passes: those of the slowest model."""
    speedup: float
    """Over plain decoding by the target alone, in this modeled time."""


def measure(
    sources: Sequence[ParameterSource],
    prompts: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    devices: Sequence[jax.Device],
    dtype: Any,
    new_tokens: int = 96,
    sampling: Sampling = GREEDY,
    widths: Sequence[int] = WIDTHS,
) -> Measured:
    """Time passes of each model alone, and see what they say along the target's texts after some prompts.

    Args:
        sources: the models' weights, the smallest first, the target last.
        prompts: token ids.
        vocab_size: ids that are tokens.
        devices: one for each model.
        dtype: of weights, activations and caches.
        new_tokens: of each text.
        sampling: how tokens are drawn.
        widths: that are timed.
    """
    longest = max(len(prompt) for prompt in prompts)
    capacity = 1 << (longest + 2 * new_tokens + max(widths) - 1).bit_length()
    requests = [make_request(prompt, capacity - len(prompt), capacity, sampling) for prompt in prompts]
    seconds: list[dict[int, float]] = [{} for _ in sources]
    words: list[np.ndarray] = []
    texts: list[jax.Array] = []
    for index in reversed(range(len(sources))):
        for width in widths if index else sorted({1, max(widths)}):
            program = ModelProgram(
                sources[index],
                stages=1,
                width=width,
                devices=devices[index : index + 1],
                dtype=dtype,
                vocab_size=vocab_size,
                prefill_width=128,
            )
            above = int(index + 1 < len(sources))
            said: list[np.ndarray] = []
            alone: list[jax.Array] = []
            for number, request in enumerate(requests):
                own = program.start(request, sampling.mode, below=False, above=above)
                # Its own first buffer in place of the target's: nothing is rolled back by it.
                assert own is not None  # the devices are this process's
                alone = [program.put(own)] if above else []
                if not above and len(texts) < len(requests):
                    program.step(None, [], new_tokens, capacity)
                    texts.append(jax.block_until_ready(program.step(None, [], 0, capacity)))
                    said.append(np.asarray(texts[-1])[len(FIGURES) :])
                elif above and width == max(widths):
                    # It reads what the target wrote, and chooses as it goes; then its passes have nothing new to read.
                    alone = [program.put(texts[number])]
                    program.step(None, alone, -(-new_tokens // width) + 1, capacity)
                    said.append(np.asarray(program.state.said))
                else:
                    program.step(None, alone, 1, capacity)
                    break
            seconds[index][width] = _time(program, alone, capacity)
            if said:
                # What was said of each text's first token does not count; of the first text it is given.
                spans = [slice(len(prompt), len(prompt) + new_tokens) for prompt in prompts]
                spans[0] = slice(len(prompts[0]) - 1, spans[0].stop)
                words.insert(0, np.concatenate([one[span] for one, span in zip(said, spans, strict=True)]))
    found = np.stack(words).astype(np.int32)
    found[:, 0] = found[-1, 0]
    return Measured(seconds=tuple(seconds), words=found)


def _time(program: ModelProgram, above: Sequence[jax.Array], capacity: int) -> float:
    """Least seconds of a pass over some steps of a few passes each."""
    passes, found = 8, []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        jax.block_until_ready(program.step(None, above, passes, capacity))
        found.append((time.perf_counter() - begun) / passes)
    return min(found)


def choose(measured: Measured, *, all_models: bool = False, stages: int = 1, exchange: float = 0.0) -> Choice:
    """The selection with the least modeled time per token.

    Args:
        measured: from `measure`.
        all_models: whether none may be left out.
        stages: of the target; a pass is taken to last that part of the whole.
        exchange: seconds that a tick adds.
    """
    return max(
        (
            choice
            for models in selections(len(measured.seconds), all_models)
            for choice in tried(measured, models, stages, exchange)
        ),
        key=lambda choice: choice.speedup,
    )


def agree(choice: Choice | None, models: int) -> Choice:
    """The first process's choice, in every one of them; `models` is the number that it chose among."""
    if choice is None:
        blank = (0,) * models
        choice = Choice(models=blank, passes=blank, width=0, tokens_per_tick=0.0, tick_seconds=0.0, speedup=0.0)
    if process_count() == 1:
        return choice
    numbers = [len(choice.models), choice.width, *choice.models, *choice.passes]
    counts = np.zeros(2 * models + 2, np.int32)
    counts[: len(numbers)] = numbers
    figures = np.asarray((choice.tokens_per_tick, choice.tick_seconds, choice.speedup), np.float32)
    counts, figures = multihost_utils.broadcast_one_to_all((counts, figures))
    used, width, *numbers = (int(number) for number in counts)
    return Choice(tuple(numbers[:used]), tuple(numbers[used : 2 * used - 1]), width, *(float(x) for x in figures))


def selections(models: int, all_models: bool = False) -> list[tuple[int, ...]]:
    """All selections of at least two models that hold the target, the last one."""
    if all_models:
        return [tuple(range(models))]
    target = models - 1
    return [(*chosen, target) for size in range(1, models) for chosen in itertools.combinations(range(target), size)]


def tried(measured: Measured, models: Sequence[int], stages: int = 1, exchange: float = 0.0) -> list[Choice]:
    """Every number of passes and every width worth trying with these models."""
    widths = sorted({w for seconds in measured.seconds for w in (*seconds, 2, 6, 8, 12) if 1 < w <= max(WIDTHS)})
    plain = measured.pass_seconds(len(measured.seconds) - 1, 1)
    settings: list[tuple[tuple[int, ...], int, float]] = []
    for width in widths:
        target = measured.pass_seconds(models[-1], width) / stages
        fits = []
        for place, model in enumerate(models[:-1]):
            each = measured.pass_seconds(model, width if place else 1)
            most = max(1, min(MOST_PASSES, int(1.25 * target / each)))
            # Of the smallest, all numbers that fit beside the target; of the others, what is left to verify is little.
            fits.append(range(1, most + 1) if place == 0 else range(1, min(most, 3) + 1))
        for passes in itertools.product(*fits):
            costs = [
                (measured.pass_seconds(model, width if place else 1), count)
                for place, (model, count) in enumerate(zip(models[:-1], passes, strict=True))
            ]
            settings.append((passes, width, lockstep_tick_cost([*costs, (target, 1)], exchange)))
    words = np.broadcast_to(
        labels(measured.words[list(models)])[:, None], (len(models), len(settings), measured.words.shape[1])
    )
    run = simulate(
        words,
        [[passes[place] for passes, _, _ in settings] for place in range(len(models) - 1)],
        width=[width for _, width, _ in settings],
        stages=stages,
    )
    return [
        Choice(
            models=tuple(models),
            passes=passes,
            width=width,
            tokens_per_tick=float(run.tokens_per_tick[number]),
            tick_seconds=tick,
            speedup=float(run.tokens_per_tick[number] * (plain + exchange) / tick),
        )
        for number, (passes, width, tick) in enumerate(settings)
    ]


def labels(words: np.ndarray) -> np.ndarray:
    """Small numbers in place of tokens, equal where those are: the first model from the target down that says them."""
    labels = np.zeros(words.shape, np.int8)
    for model in range(len(words) - 2, -1, -1):
        labels[model] = len(words) - 1 - model
        for larger in range(model + 1, len(words)):
            labels[model] = np.where(words[model] == words[larger], labels[larger], labels[model])
    return labels
