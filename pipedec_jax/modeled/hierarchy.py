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
        words: `[k + 1, B, T]`, from `draw_words`; of the target, the text itself. `[k + 1, 1, T]` are all runs' words.
        passes: of M_0 .. M_{k-1} in a tick, each a number or `[B]`; on several stages, ticks of the model's own pipe.
        width: most tokens that a verification reads; a number or `[B]`. M_0 reads one at a time.
        stages: of each model, M_0's first, or of the target alone, the others having one. A token takes that many
            passes; other tokens follow in the next pass, of M_0 none: it reads what it has said itself.
        costs: seconds of a pass of each model (of one stage, the slowest) in which 0, 1, 2, ... rows are read, each
            `[rows]` or `[B, rows]`; more rows cost what the last number does.

    Raises:
        ValueError: when numbers of models do not fit, or nothing can be made.
    """
    models, _, T = words.shape
    if costs is not None and len(costs) != models:
        raise ValueError(f"{models} models need {models} rows of costs, not {len(costs)}")
    if len(passes) != models - 1 or models < 2:
        raise ValueError(f"{models} models need {models - 1} numbers of passes, not {len(passes)}")
    staged = [*[1] * (models - 1), stages] if isinstance(stages, int) else list(stages)
    if len(staged) != models:
        raise ValueError(f"{models} models need {models} numbers of stages, or the target's alone, not {len(staged)}")
    if min(staged) < 1 or T < 2:
        raise ValueError(f"need at least one stage and a text of two tokens, not {stages} and {T}")
    (B,) = np.broadcast_shapes(words.shape[1:2], *map(np.shape, passes), np.shape(width))
    counts = [np.broadcast_to(np.asarray(count, np.int32), B) for count in (*passes, 1)]
    widths = [np.broadcast_to(np.asarray(rows, np.int32), B) for rows in (1, *[width] * (models - 1))]
    if any(np.any(count < 1) for count in (*counts, *widths)):
        raise ValueError("passes and widths must be at least 1")
    tables = [_table(cost, B) for cost in costs] if costs is not None else [np.zeros((B, 1))] * models
    hierarchies = _Hierarchies(_Texts(words, B), counts, widths, staged, tables)
    while np.any(hierarchies.live):
        hierarchies.tick()
    return hierarchies.run()


def _table(cost: ArrayLike, runs: int) -> NDArray[np.float64]:
    table = np.asarray(cost, np.float64)
    return np.broadcast_to(table, (runs, table.shape[-1]))


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


class _Texts:
    """Compares buffers, each known by its borders: up to `buffer[j]` it holds words of the models j and above.

    A buffer is `[models, B]`, and so is every border `[B]`.
    """

    def __init__(self, words: Words, runs: int) -> None:
        self.models, own, self.length = words.shape
        self.runs = runs
        self._row = np.arange(runs) if own > 1 else 0
        self._next: dict[tuple[int, int], Ints] = {}
        position = np.arange(self.length, dtype=np.int32)
        for j in range(self.models):
            for m in range(j):
                # [B or 1, T + 1]: from each position on, the next one at which the words of two models differ.
                found = np.full((own, self.length + 1), self.length, np.int32)
                found[:, :-1] = np.where(words[j] != words[m], position, self.length)
                self._next[j, m] = np.minimum.accumulate(found[:, ::-1], axis=1)[:, ::-1]
                self._next[m, j] = self._next[j, m]

    def difference(self, one: Ints, first: int, two: Ints, second: int) -> Ints:
        """The first position that both buffers, of models `first` and `second`, hold and differ at; T for none."""
        found = np.full(self.runs, self.length, np.int32)
        for j in range(first, self.models):
            for m in range(second, self.models):
                if j != m:
                    low = np.maximum(self._after(one, j), self._after(two, m))
                    found = np.minimum(found, self._differs(j, m, low, np.minimum(one[j], two[m])))
        return found

    def verify(self, model: int, below: Ints, length: Ints, end: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """A model's pass over the text before position `end`: its own up to `length`, then what the one below adds.

        Returns:
            The new length of its buffer, and whether that contradicts the buffer below.
        """
        differs = np.full(self.runs, self.length, np.int32)
        for m in range(model - 1, self.models) if model else ():
            if m != model:
                low = np.maximum(length, self._after(below, m))
                differs = np.minimum(differs, self._differs(model, m, low, below[m]))
        grown = np.minimum(np.minimum(differs, end) + 1, self.length)
        grown = np.where(end >= length, grown, length).astype(np.int32)
        return grown, differs < grown

    def _after(self, buffer: Ints, model: int) -> Ints | int:
        """From where a buffer holds words of this model alone."""
        return buffer[model + 1] if model + 1 < self.models else 0

    def _differs(self, j: int, m: int, low: Ints | int, high: Ints) -> Ints:
        """The first position from `low` on, and before `high`, at which the words of two models differ; T for none."""
        where = self._next[j, m][self._row, low]
        return np.where(where < high, where, self.length)


class _Pipe:
    """What a model has read, and what is at each of its stages, of B runs.

    Args:
        texts: of the runs.
        stages: of the model (N).
        looks_back: whether the text that it has read ahead of its own can turn out another: of a model between others,
            on several stages, when one above is ahead of it.
    """

    def __init__(self, texts: _Texts, stages: int, looks_back: bool) -> None:
        self.stages = stages
        self.looks_back = looks_back
        self.read = np.zeros(texts.runs, np.int32)
        """Up to where the first stage has read."""
        self.first = np.zeros((stages, texts.runs), np.int32)
        """`[N, B]`: from where each stage has read last, the first stage's first."""
        self.end = self.first
        """`[N, B]`: and up to where."""
        self.fed = np.zeros((texts.models, texts.runs), np.int32)
        """Where it looks back: the text that was read, up to `read`, as a buffer of the model below."""

    def send(self, first: Ints, end: Ints, going: NDArray[np.bool_]) -> Ints:
        """Move on and let the next rows in, where it is going; returns up to where those that leave have read."""
        self.first = np.where(going, np.concatenate((first[None], self.first[:-1])), self.first)
        self.end = np.where(going, np.concatenate((end[None], self.end[:-1])), self.end)
        self.read = np.where(going, end, self.read)
        return self.end[-1]

    def most(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds of the stage that takes longest, by the rows that it has."""
        rows = np.clip(self.end - self.first, 0, table.shape[1] - 1)
        return np.max(table[np.arange(len(table)), rows], axis=0)

    def cut(self, border: Ints) -> None:
        """Drop all from a position on."""
        self.read = np.minimum(self.read, border)
        self.end = np.minimum(self.end, border)


class _Hierarchies:
    """B hierarchies at work.

    Args:
        texts: that they decode.
        counts: passes of each model in a tick, the target's 1, each `[B]`.
        widths: most rows of a pass of each model, each `[B]`.
        stages: of each model.
        tables: seconds of a pass of each model by its rows, each `[B, rows]`.
    """

    def __init__(
        self,
        texts: _Texts,
        counts: Sequence[Ints],
        widths: Sequence[Ints],
        stages: Sequence[int],
        tables: Sequence[NDArray[np.float64]],
    ) -> None:
        runs, models = texts.runs, texts.models
        self._texts, self._counts, self._widths, self._tables = texts, counts, widths, tables
        self._top = models - 1
        self._buffers = np.ones((models, models, runs), np.int32)  # one token is given
        self._pipes = [
            _Pipe(texts, count, looks_back=0 < model < self._top and count > 1) for model, count in enumerate(stages)
        ]
        self._ticks, self._verifications, self._seconds = np.zeros((3, runs))
        self._rollbacks, self._undone = np.zeros((2, self._top, runs))
        self.live = np.ones(runs, bool)
        """Which have not reached their text's end."""

    def run(self) -> Run:
        """The sums so far."""
        tokens = self._buffers[self._top, self._top].astype(np.float64) - 1
        return Run(tokens, self._ticks, self._verifications, self._rollbacks, self._undone, self._seconds)

    def tick(self) -> None:
        """All models at once, from what the buffers held when the tick began; then rollback."""
        live, begun = self.live, self._buffers
        self._buffers = begun.copy()
        spent = [self._step(model, begun) for model in range(len(begun))]
        self._ticks += live
        self._seconds += np.where(live, np.max(spent, axis=0), 0)
        for model in reversed(range(self._top)):
            self._follow(model)
        self._buffers = np.where(live, self._buffers, begun)
        self.live = live & (self._buffers[self._top, self._top] < self._texts.length)

    def _step(self, model: int, begun: Ints) -> NDArray[np.float64]:
        """A model's passes of a tick; their seconds."""
        if model == 0 and self._pipes[0].stages == 1:
            return self._say()
        spent, contradicted = np.zeros(self._texts.runs), np.zeros(self._texts.runs, bool)
        below = begun[model - 1] if model else self._buffers[0]
        for turn in range(int(np.max(self._counts[model]))):
            going = self.live & (turn < self._counts[model])
            seconds, wrong = self._pass(model, below, going, contradicted)
            spent += np.where(going, seconds, 0)
            contradicted |= going & wrong
        return spent

    def _say(self) -> NDArray[np.float64]:
        """The passes of the smallest model on one stage: each says what follows the one before, so all at once."""
        pipe, table = self._pipes[0], self._tables[0]
        made = np.minimum(self._counts[0], self._texts.length - pipe.read)
        length, end = self._buffers[0, 0], pipe.read + np.where(self.live, made, 0)
        self._buffers[0, 0] = np.where(end >= length, np.minimum(end + 1, self._texts.length), length)
        pipe.read = end
        return made * table[:, min(1, table.shape[1] - 1)] + (self._counts[0] - made) * table[:, 0]

    def _pass(
        self, model: int, below: Ints, going: NDArray[np.bool_], contradicted: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """One pass where it is going; its seconds, and whether it contradicts the buffer below.

        Where that was contradicted before, in this tick, the model reads its own text alone.
        """
        pipe, length = self._pipes[model], self._buffers[model, model]
        reach = np.where(contradicted, length, np.maximum(length, below[max(model - 1, 0)]))
        start, end = pipe.read, np.minimum(pipe.read + self._widths[model], reach)
        if model == self._top:
            self._verifications += going & (end - start > 1)
        leaving = pipe.send(start, end, going)
        seconds = pipe.most(self._tables[model])
        if pipe.looks_back:
            pipe.fed = np.where(going, _text_read(self._buffers[model], below, model, contradicted), pipe.fed)
        grown, wrong = self._texts.verify(model, below, length, leaving)
        grown = np.where(going, grown, length)
        # What was sent beyond a wrong token is dropped.
        pipe.cut(np.where(going & wrong, grown - 1, self._texts.length))
        self._buffers[model, model] = grown
        return seconds, wrong

    def _follow(self, model: int) -> None:
        """Roll a model back to what the one above it holds, where that differs; else take over what is new."""
        mine, upper, pipe, T = self._buffers[model], self._buffers[model + 1], self._pipes[model], self._texts.length
        differs = self._texts.difference(mine, model, upper, model + 1)
        rolled = self.live & (differs < T)
        self._rollbacks[model] += rolled
        self._undone[model] += np.where(rolled, mine[model] - differs, 0)
        mine[model] = np.where(rolled, upper[model + 1], np.maximum(mine[model], upper[model + 1]))
        mine[model + 1 :] = upper[model + 1 :]
        pipe.cut(np.where(rolled, differs, T))
        if pipe.looks_back:
            fed = np.minimum(pipe.fed, pipe.read)
            pipe.cut(np.where(self.live, self._texts.difference(fed, model - 1, mine, model), T))


def _text_read(own: Ints, below: Ints, model: int, alone: NDArray[np.bool_]) -> Ints:
    """The text that a model reads, as a buffer of the model below: its own, then, if not alone, what that one adds."""
    text, length = own.copy(), own[model]
    further = np.where(alone, 0, below[model - 1 :])
    text[model - 1] = np.maximum(length, further[0])
    text[model:] = np.where(further[1:] > length, further[1:], own[model:])
    return text
