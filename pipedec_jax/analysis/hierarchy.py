"""A discrete simulator of PipeSpec's hierarchy in lockstep: any number of models, many settings at once, pure NumPy.

It plays the rules of `pipedec_jax.hierarchy` tick by tick, with texts in place of models: what each model would say at
each position is drawn beforehand, M_{i-1} saying what M_i does with the acceptance of that pair. So a buffer is known
by its cursors alone: up to which position it holds the words of which model. Source: PipeSpec (arXiv 2505.01572).
All figures are *simulated*.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int32]
Words = NDArray[np.int8]


@dataclasses.dataclass(frozen=True)
class Run:
    """Sums of B simulated runs, each `[B]`."""

    tokens: NDArray[np.float64]
    """Tokens of the target."""
    ticks: NDArray[np.float64]
    """Ticks, each one pass of every stage of the target."""
    verifications: NDArray[np.float64]
    """Ticks in which the target read more than one token: those that may last longer than a plain step."""
    rollbacks: NDArray[np.float64]
    """`[k, B]` times each model but the target was rolled back."""
    undone: NDArray[np.float64]
    """`[k, B]` tokens each model but the target lost to that."""
    seconds: NDArray[np.float64]
    """Modeled time by the costs that were given: in each tick the slowest model's passes; zeros without costs."""

    @property
    def tokens_per_tick(self) -> NDArray[np.float64]:
        """`[B]`; with one stage, tokens per pass of the target."""
        return self.tokens / self.ticks


def draw_words(acceptance: Sequence[ArrayLike], length: int, runs: int, seed: int) -> Words:
    """What each model would say at each position: `[k + 1, B, T]`, equal where models agree.

    Args:
        acceptance: of M_1's pair with M_0, M_2's with M_1, and so on; each a number or `[B]`.
        length: of the text (T).
        runs: B.
        seed: of the draws.

    Raises:
        ValueError: for an acceptance that is no share, or no pair of models.
    """
    if not acceptance or not all(np.all((np.asarray(rate) >= 0) & (np.asarray(rate) <= 1)) for rate in acceptance):
        raise ValueError(f"acceptance must be a number from 0 to 1 for each pair of models, not {acceptance!r}")
    random = np.random.default_rng(seed)
    models = len(acceptance) + 1
    words = np.zeros((models, runs, length), np.int8)
    for model in range(models - 2, -1, -1):
        rate = np.broadcast_to(np.asarray(acceptance[model], np.float64), runs)[:, None]
        agree = random.random((runs, length)) < rate
        words[model] = np.where(agree, words[model + 1], models - model)
    return words


def simulate(
    words: Words,
    passes: Sequence[ArrayLike],
    *,
    width: ArrayLike = 1024,
    stages: int | Sequence[int] = 1,
    costs: Sequence[ArrayLike] | None = None,
) -> Run:
    """Decode texts of known words: M_k makes one pass a tick, the others so many each.

    Args:
        words: `[k + 1, B, T]`, from `draw_words`; of the target, the text itself.
        passes: of M_0 .. M_{k-1} in a tick, each a number or `[B]`; on several stages, ticks of the model's own pipe.
        width: most tokens that a verification reads; a number or `[B]`. M_0 reads one at a time.
        stages: of each model, M_0's first, or of the target alone, the others having one. A token takes that many
            passes; other tokens follow in the next pass, of M_0 none: it reads what it has said itself.
        costs: seconds of a pass of each model (of one stage, the slowest) in which 0, 1, 2, ... rows are read, each
            `[rows]` or `[B, rows]`; more rows cost what the last number does.

    Raises:
        ValueError: when numbers of models do not fit, or nothing can be made.
    """
    models, B, T = words.shape
    if costs is not None and len(costs) != models:
        raise ValueError(f"{models} models need {models} rows of costs, not {len(costs)}")
    tables = [_table(cost, B) for cost in costs] if costs is not None else [np.zeros((B, 1))] * models
    row = np.arange(B)
    if len(passes) != models - 1 or models < 2:
        raise ValueError(f"{models} models need {models - 1} numbers of passes, not {len(passes)}")
    staged = [*[1] * (models - 1), stages] if isinstance(stages, int) else list(stages)
    if len(staged) != models:
        raise ValueError(f"{models} models need {models} numbers of stages, or the target's alone, not {len(staged)}")
    if min(staged) < 1 or T < 2:
        raise ValueError(f"need at least one stage and a text of two tokens, not {stages} and {T}")
    counts = [np.broadcast_to(np.asarray(count, np.int32), B) for count in passes]
    widths = [np.ones(B, np.int32), *[np.broadcast_to(np.asarray(width, np.int32), B)] * (models - 1)]
    if any(np.any(count < 1) for count in (*counts, *widths)):
        raise ValueError("passes and widths must be at least 1")
    play = _Play(words)
    top = models - 1
    buffers = [[np.ones(B, np.int32)] * models for _ in range(models)]  # one token is given
    pipes = [_Pipe(B, count, looks_back=0 < model < top and count > 1) for model, count in enumerate(staged)]
    ticks, verifications, seconds = np.zeros(B), np.zeros(B), np.zeros(B)
    rollbacks, undone = np.zeros((top, B)), np.zeros((top, B))
    live = np.ones(B, bool)
    while np.any(live):
        ticks += live
        begun = buffers
        buffers = [list(buffer) for buffer in begun]
        # All models at once, from what the buffers held when the tick began.
        slowest = np.zeros(B)
        for model, pipe in enumerate(pipes):
            contradicted, spent = np.zeros(B, bool), np.zeros(B)
            turns = int(np.max(counts[model])) if model < top else 1
            if model == 0 and staged[0] == 1:  # each pass says what follows the one before: all at once
                made = np.minimum(counts[0], T - pipe.read)
                length, end = buffers[0][0], pipe.read + np.where(live, made, 0)
                buffers[0][0] = np.where(end >= length, np.minimum(end + 1, T), length)
                pipe.read = end
                one, none = tables[0][row, min(1, tables[0].shape[1] - 1)], tables[0][:, 0]
                spent, turns = made * one + (counts[0] - made) * none, 0
            for turn in range(turns):
                going = live & (turn < counts[model]) if model < top else live
                length = buffers[model][model]
                below = begun[model - 1] if model else buffers[0]
                reach = np.where(contradicted, length, np.maximum(length, below[max(model - 1, 0)]))
                start, end = pipe.read, np.minimum(pipe.read + widths[model], reach)
                if model == top:
                    verifications += live & (end - start > 1)
                leaving = pipe.send(start, end, going)
                spent += np.where(going, pipe.most(tables[model], row), 0)
                if pipe.looks_back:
                    pipe.feed(_text_read(buffers[model], below, model, contradicted), going)
                grown, wrong = play.verify(model, below, length, leaving)
                grown = np.where(going, grown, length)
                contradicted |= going & wrong
                # What was sent beyond a wrong token is dropped.
                pipe.cut(np.where(going & wrong, grown - 1, T))
                buffers[model][model] = grown
            slowest = np.maximum(slowest, spent)
        seconds += np.where(live, slowest, 0)
        # Rollback, from the target down.
        for model in range(top - 1, -1, -1):
            upper, mine = buffers[model + 1], buffers[model]
            differs = play.difference(mine, model, upper, model + 1)
            rolled = live & (differs < T)
            rollbacks[model] += rolled
            undone[model] += np.where(rolled, mine[model] - differs, 0)
            length = np.where(rolled, upper[model + 1], np.maximum(mine[model], upper[model + 1]))
            buffers[model] = [*mine[:model], length, *upper[model + 1 :]]
            pipes[model].cut(np.where(rolled, differs, T))
            if pipes[model].looks_back:
                fed = [np.minimum(border, pipes[model].read) for border in pipes[model].fed]
                pipes[model].cut(np.where(live, play.difference(fed, model - 1, buffers[model], model), T))
        buffers = [
            [np.where(live, new, old) for new, old in zip(*pair, strict=True)]
            for pair in zip(buffers, begun, strict=True)
        ]
        live = live & (buffers[top][top] < T)
    return Run(
        tokens=buffers[top][top] - 1.0,
        ticks=ticks,
        verifications=verifications,
        rollbacks=rollbacks,
        undone=undone,
        seconds=seconds,
    )


def _table(cost: ArrayLike, runs: int) -> NDArray[np.float64]:
    table = np.asarray(cost, np.float64)
    return np.broadcast_to(table, (runs, table.shape[-1]))


def _text_read(own: Sequence[Ints], below: Sequence[Ints], model: int, alone: NDArray[np.bool_]) -> list[Ints]:
    """The text that a model reads, as a buffer of the model below: its own, then, if not alone, what that one adds."""
    length, models = own[model], len(own)
    further = [np.where(alone, 0, border) for border in below[model - 1 :]]
    upper = [
        np.where(border > length, border, own[place])
        for place, border in zip(range(model, models), further[1:], strict=True)
    ]
    return [*own[: model - 1], np.maximum(length, further[0]), *upper]


class _Pipe:
    """What a model has read, and what is at each of its stages, of B runs.

    Args:
        runs: B.
        stages: of the model.
        looks_back: whether the text that it has read ahead of its own can turn out another: of a model between others,
            on several stages, when one above is ahead of it.
    """

    def __init__(self, runs: int, stages: int, looks_back: bool) -> None:
        self.looks_back = looks_back
        self.read = np.zeros(runs, np.int32)
        """Up to where the first stage has read."""
        self.first = [self.read] * stages
        """From where each stage has read last, the first stage's first."""
        self.end = [self.read] * stages
        """And up to where."""
        self.fed: Sequence[Ints] = ()
        """Where it looks back: the text that was read, up to `read`, as a buffer of the model below."""

    def feed(self, text: Sequence[Ints], going: NDArray[np.bool_]) -> None:
        """Remember the text that is read, where it is going."""
        old = self.fed or text
        self.fed = [np.where(going, *pair) for pair in zip(text, old, strict=True)]

    def send(self, first: Ints, end: Ints, going: NDArray[np.bool_]) -> Ints:
        """Move on and let the next rows in, where it is going; returns up to where those that leave have read."""
        self.first = [np.where(going, *pair) for pair in zip([first, *self.first[:-1]], self.first, strict=True)]
        self.end = [np.where(going, *pair) for pair in zip([end, *self.end[:-1]], self.end, strict=True)]
        self.read = np.where(going, end, self.read)
        return self.end[-1]

    def most(self, table: NDArray[np.float64], row: NDArray[np.int64]) -> NDArray[np.float64]:
        """Seconds of the stage that takes longest, by the rows that it has."""
        most = table.shape[1] - 1
        costs = [table[row, np.clip(end - first, 0, most)] for first, end in zip(self.first, self.end, strict=True)]
        return np.max(costs, axis=0)

    def cut(self, border: Ints) -> None:
        """Drop all from a position on."""
        self.read = np.minimum(self.read, border)
        self.end = [np.minimum(end, border) for end in self.end]


def most_tokens_per_pass(words: NDArray[np.integer], width: int) -> float:
    """Bound on the tokens per pass of the target of any hierarchy on a known text, whatever its passes and timing.

    Each pass reads at most its own last token and `width - 1` guesses, and a guess is right at best where any of the
    smaller models says the target's token.

    Args:
        words: `[k + 1, T]`, of the target the text itself; the first token is given.
        width: most tokens that a verification reads.
    """
    right = [*np.any(words[:-1, 1:] == words[-1, 1:], axis=0).tolist(), False]
    position, passes = 0, 0
    while position + 1 < len(right):
        run = right.index(False, position) - position
        position += min(run, width - 1) + 1
        passes += 1
    return (len(right) - 1) / passes


class _Play:
    """Compares buffers, each known by its borders: up to `buffer[j]` it holds words of the models j and above."""

    def __init__(self, words: Words) -> None:
        self.models, self.runs, self.length = words.shape
        self._row = np.arange(self.runs)
        self._next: dict[tuple[int, int], Ints] = {}
        position = np.arange(self.length, dtype=np.int32)
        for j in range(self.models):
            for m in range(j):
                # [B, T + 1]: from each position on, the next one at which the words of two models differ.
                found = np.full((self.runs, self.length + 1), self.length, np.int32)
                found[:, :-1] = np.where(words[j] != words[m], position, self.length)
                self._next[j, m] = np.minimum.accumulate(found[:, ::-1], axis=1)[:, ::-1]
                self._next[m, j] = self._next[j, m]

    def difference(self, one: Sequence[Ints], first: int, two: Sequence[Ints], second: int) -> Ints:
        """The first position that both buffers, of models `first` and `second`, hold and differ at; T for none."""
        found = np.full(self.runs, self.length, np.int32)
        for j in range(first, self.models):
            for m in range(second, self.models):
                if j == m:
                    continue
                low = np.zeros(self.runs, np.int32)
                low = low if j + 1 == self.models else np.maximum(low, one[j + 1])
                low = low if m + 1 == self.models else np.maximum(low, two[m + 1])
                where = self._next[j, m][self._row, np.minimum(low, self.length)]
                found = np.minimum(found, np.where(where < np.minimum(one[j], two[m]), where, self.length))
        return found

    def verify(self, model: int, below: Sequence[Ints], length: Ints, end: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """A model's pass over the text before position `end`.

        Returns:
            The new length of its buffer, and whether that contradicts the buffer below.
        """
        differs = np.full(self.runs, self.length, np.int32)
        if model:
            whole = np.full(self.runs, self.length, np.int32)
            own = [*[length] * model, whole, *[length] * (self.models - 1 - model)]
            differs = self.difference(own, model, self._from(below, model, length), model - 1)
        grown = np.minimum(np.minimum(differs, end) + 1, self.length)
        grown = np.where(end >= length, grown, length).astype(np.int32)
        return grown, differs < grown

    def _from(self, below: Sequence[Ints], model: int, length: Ints) -> list[Ints]:
        """The buffer below, which agrees with this model's up to its length."""
        return [*below[:model], *[np.maximum(border, length) for border in below[model:]]]
