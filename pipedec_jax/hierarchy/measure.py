"""What a hierarchy's choice rests on: passes timed as loops of them really run, plain decoding's own loop, and words.

A pass is timed among as many as fit in one program, with as many rows as it is said to read; plain decoding's own loop,
on the same device and with the same capacity, is the baseline of every ratio. What a step's dispatch adds, and what
stages add, is measured as well. Each model is measured alone: on devices of their own they do not slow each other down.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from pipedec_jax.clock import decode
from pipedec_jax.hierarchy.buffers import FIGURES
from pipedec_jax.hierarchy.program import ModelProgram
from pipedec_jax.model.parameters import ParameterSource
from pipedec_jax.pipeline import placement
from pipedec_jax.pipeline.engine import Engine, RequestArrays, make_request
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.pipeline.split import split_layers
from pipedec_jax.sampling import GREEDY

WIDTHS = (1, 2, 4, 16)
"""Rows that are timed; others are interpolated."""
REPEATS = 5
"""Of which the least time counts, of passes and of plain decoding alike."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is decoded, greedily, to measure."""

    prompts: Sequence[Sequence[int]]
    """Token ids."""
    vocab_size: int
    """Ids that are tokens."""
    dtype: Any
    """Of weights, activations and caches."""
    new_tokens: int = 96
    """Of each text."""
    widths: Sequence[int] = WIDTHS
    """Rows that are timed."""

    @property
    def capacity(self) -> int:
        """Places of the caches."""
        return 1 << (max(map(len, self.prompts)) + self.new_tokens + max(self.widths) - 1).bit_length()

    @property
    def requests(self) -> list[RequestArrays]:
        """Of every prompt."""
        capacity = self.capacity
        return [make_request(prompt, capacity - len(prompt), capacity, GREEDY) for prompt in self.prompts]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of some models, the smallest first."""

    seconds: tuple[Mapping[int, float], ...]
    """Of a pass of each model, by the rows that are computed."""
    words: np.ndarray
    """`[k + 1, T]`: what each model says at each position of the target's texts, one after another; the target's row is
    the texts. The first token is given."""
    plain: float
    """Seconds a token of plain decoding by the target alone, on one device."""
    exchange: tuple[Mapping[int, float], ...] = ()
    """Of each model, seconds that a tick of so many of its stages takes beside its part of the pass. What was not
    measured, and one stage, count as nothing."""
    dispatch: float = 0.0
    """Seconds that a program of a single pass takes beside the pass."""
    one_row: bool = True
    """Whether a pass that reads one row computes no more (`placement.row_sizes`)."""
    layers: tuple[int, ...] = ()
    """Of each model."""
    shared: float = 0.0
    """Seconds that a tick takes to bring every model's buffer to all processes; nothing where there is one."""

    @property
    def added(self) -> float:
        """Seconds that a tick takes beside its passes: their dispatch, and bringing buffers to other processes."""
        return self.dispatch + self.shared

    def pass_seconds(self, model: int, rows: int) -> float:
        """Of a pass that computes this many rows: interpolated, and beyond the widest as its last step goes on."""
        known = self.seconds[model]
        widths = sorted(known)
        if len(widths) > 1 and rows > widths[-1]:
            a, b = widths[-2:]
            return known[b] + (known[b] - known[a]) / (b - a) * (rows - b)
        return float(np.interp(rows, widths, [known[width] for width in widths]))

    def costs(self, model: int, width: int, stages: int = 1) -> list[float]:
        """Seconds of a pass that reads 0, 1, ... `width` rows, of a program that reads at most so many.

        With stages, of a tick: the longest stage's part, and what the exchange adds.
        """
        wide = self.pass_seconds(model, width)
        one = self.pass_seconds(model, 1) if self.one_row else wide
        part = split_layers(self.layers[model], stages).longest / self.layers[model] if stages > 1 else 1.0
        added = self.exchange[model].get(stages, 0.0) if self.exchange else 0.0
        return [added, part * one + added, *[part * wide + added] * (width - 1)]

    def counts(self, model: int, alone: bool = False) -> list[int]:
        """Numbers of stages over one, rising, whose exchange was measured, and which make a pass of the model quicker.

        With `alone`, a token of it: nothing else is in its pipe, so that it takes a pass of every stage.
        """
        known = sorted(self.exchange[model]) if self.exchange else []

        def quicker(count: int, width: int) -> bool:
            passes = count if alone else 1
            return passes * self.costs(model, width, count)[-1] < self.pass_seconds(model, width)

        widths = (1,) if alone else sorted(self.seconds[model])
        return [count for count in known if any(quicker(count, width) for width in widths)]

    def agreement(self, model: int) -> float:
        """Share of the text's tokens that a model says as the target does."""
        return float(np.mean(self.words[model, 1:] == self.words[-1, 1:]))


def measure(
    sources: Sequence[ParameterSource],
    workload: Workload,
    *,
    devices: Sequence[jax.Device],
    stages: Sequence[Sequence[int]] = (),
    ticks: Sequence[Mapping[int, float]] | None = None,
) -> Measured:
    """Time passes of each model alone, and see what they say along the target's texts after some prompts.

    Args:
        sources: the models' weights, the smallest first, the target last.
        workload: what is decoded.
        devices: one for each model, the target's last, and as many as the most stages.
        stages: of each model, numbers of stages whose exchange is timed; by default none.
        ticks: what `staged_ticks` gave of them, where that was measured before.
    """
    target, widths = len(sources) - 1, workload.widths
    own = devices[target : target + 1]
    staged = 0 if ticks is not None else sum(count > 1 for counts in stages for count in counts)
    total = 1 + 2 + target * len(widths) + staged
    with tqdm(total=total, desc="measuring the models", postfix="plain decoding", disable=None) as bar:
        plain, texts = _plain(sources[-1], workload, own)
        packed = [
            _packed(prompt, text, workload.capacity) for prompt, text in zip(workload.prompts, texts, strict=True)
        ]
        bar.update()
        alone = []
        for index, source in enumerate(sources):
            program = _program(source, devices[index : index + 1], workload)
            # A pass of one row is one of a program that can read more, but of the smallest model, which never does.
            tried = sorted(widths) if index else (1, max(widths))
            name = f"model {index + 1} of {len(sources)}"
            alone.append(_alone(program, workload, packed, tried, smaller=index < target, bar=bar, name=name))
        if ticks is None:
            bar.set_postfix_str("stages")
            ticks = staged_ticks(sources, workload, stages, lambda count: devices[:count], done=bar.update)
    # One token is in flight, so each tick one stage works, and all of them in turn.
    exchange = [
        {count: max(0.0, tick - one.seconds[1] / count) for count, tick in found.items()}
        for found, one in zip(ticks, alone, strict=True)
    ]
    said = [one.said for one in alone[:-1]] + [[text[len(FIGURES) :] for text in packed]]
    words = np.stack([_spans(one, workload) for one in said]).astype(np.int32)
    words[:, 0] = words[-1, 0]
    return Measured(
        seconds=tuple(one.seconds for one in alone),
        words=words,
        plain=plain,
        exchange=tuple(exchange),
        dispatch=alone[-1].dispatch,
        one_row=1 in placement.row_sizes(placement.make_mesh(1, own), max(widths)),
        layers=tuple(source.config.layers for source in sources),
    )


def staged_ticks(
    sources: Sequence[ParameterSource],
    workload: Workload,
    stages: Sequence[Sequence[int]],
    devices: Callable[[int], Sequence[jax.Device]],
    *,
    done: Callable[[], object] = lambda: None,
) -> list[dict[int, float]]:
    """Seconds of a tick of each model's pipe, one token being in flight, by its number of stages, of those over one.

    All processes that have some of the devices must call it alike; each gets its own times.

    Args:
        sources: as for `measure`.
        workload: as for `measure`.
        stages: as for `measure`.
        devices: that so many stages are on.
        done: called after each number of stages.

    Returns:
        Of each model; nothing of stages none of which are this process's.
    """
    request, capacity = workload.requests[0], workload.capacity
    found: list[dict[int, float]] = [{} for _ in sources]
    for index, counts in enumerate(stages):
        for count in (count for count in counts if count > 1):
            passes = count * (workload.new_tokens // 2)
            program = _program(sources[index], devices(count), workload)
            if program.here:
                run = _one_row(program, request, index < len(sources) - 1, passes, capacity)
                found[index][count] = _seconds(run, passes)
            done()
    return found


@dataclasses.dataclass(frozen=True)
class _Alone:
    """What was measured of one model."""

    seconds: dict[int, float]
    """Of a pass, by its rows."""
    dispatch: float
    """Of a program of a single pass, beside the pass; measured of the target."""
    said: list[np.ndarray]
    """Of a smaller model: what it says at each position of every text."""


def _alone(
    program: ModelProgram,
    workload: Workload,
    packed: Sequence[np.ndarray],
    widths: Sequence[int],
    *,
    smaller: bool,
    bar: tqdm,
    name: str,
) -> _Alone:
    """Time a model's passes, and see what it says.

    Args:
        program: of the model.
        workload: what is decoded.
        packed: prompts with the target's texts, as published buffers.
        widths: rows, rising.
        smaller: whether it is not the target.
        bar: told of every width.
        name: of the model, in the bar.
    """
    requests, capacity, tokens = workload.requests, workload.capacity, workload.new_tokens
    times: dict[int, float] = {}
    dispatch = 0.0
    for width in widths:
        bar.set_postfix_str(f"{name}, {width} row{'s' if width > 1 else ''}")
        program.set_width(width)
        if not times:
            times[1] = _seconds(_one_row(program, requests[0], smaller, tokens, capacity), tokens)
            if not smaller:
                steps = _seconds(_steps(program, requests[0], tokens // 2, capacity), tokens // 2)
                dispatch = max(0.0, steps - times[1])
        if width > 1:
            passes = max(1, tokens // width)
            times[width] = _seconds(_wide(program, requests[0], packed[0], smaller, passes, capacity), passes)
        bar.update()
    said = []
    for request, text in zip(requests, packed, strict=True) if smaller else ():
        _wide(program, request, text, True, -(-tokens // program.width) + 1, capacity)()
        said.append(np.asarray(program.state.said))
    return _Alone(times, dispatch, said)


def _program(source: ParameterSource, devices: Sequence[jax.Device], workload: Workload) -> ModelProgram:
    """A model on a stage for each device."""
    return ModelProgram(
        source,
        stages=len(devices),
        width=1,
        devices=devices,
        dtype=workload.dtype,
        vocab_size=workload.vocab_size,
        prefill_width=128,
    )


def _plain(source: ParameterSource, workload: Workload, devices: Sequence[jax.Device]) -> tuple[float, list[list[int]]]:
    """Seconds a token of plain decoding, and its answers."""
    settings = EngineSettings(method="pp", stages=1, dtype=workload.dtype, capacity=workload.capacity)
    engine = Engine(source, None, settings, vocab_size=workload.vocab_size, devices=devices)
    tokens = workload.new_tokens
    texts = [list(decode(engine, prompt, None, tokens)[0].tokens) for prompt in workload.prompts]
    times = [decode(engine, workload.prompts[0], None, tokens)[1] for _ in range(REPEATS)]
    return min(times) / (tokens - 1), texts


def _packed(prompt: Sequence[int], text: Sequence[int], capacity: int) -> np.ndarray:
    """A published buffer that holds prompt and text."""
    packed = np.zeros(len(FIGURES) + capacity, np.int32)
    packed[0] = len(prompt) + len(text)
    packed[len(FIGURES) : len(FIGURES) + packed[0]] = [*prompt, *text]
    return packed


def _one_row(
    program: ModelProgram, request: RequestArrays, smaller: bool, passes: int, capacity: int
) -> Callable[[], float]:
    """Passes that each read the model's own last token, in one program."""

    def run() -> float:
        first = program.start(request, GREEDY.mode, below=False, above=int(smaller))
        assert first is not None  # the devices are this process's
        # Its own first buffer in place of the target's: nothing is rolled back by it.
        return _timed(program, None, [program.put(first)] if smaller else [], passes, capacity)

    return run


def _wide(
    program: ModelProgram, request: RequestArrays, text: np.ndarray, smaller: bool, passes: int, capacity: int
) -> Callable[[], float]:
    """Passes that read a text, each as many rows as the program can: one from above, of the target one from below."""

    def run() -> float:
        program.start(request, GREEDY.mode, below=not smaller, above=int(smaller))
        seen = program.put(jax.device_put(text, program.mesh.devices.flat[0]))
        return _timed(program, None if smaller else seen, [seen] if smaller else [], passes, capacity)

    return run


def _steps(program: ModelProgram, request: RequestArrays, steps: int, capacity: int) -> Callable[[], float]:
    """Programs of one pass, one after another."""

    def run() -> float:
        jax.block_until_ready(program.start(request, GREEDY.mode, below=False, above=0))
        begun = time.perf_counter()
        for _ in range(steps):
            program.step(None, [], 1, capacity)
        jax.block_until_ready(program.state)
        return time.perf_counter() - begun

    return run


def _timed(
    program: ModelProgram, below: jax.Array | None, above: Sequence[jax.Array], passes: int, capacity: int
) -> float:
    jax.block_until_ready((program.state, below, above))
    begun = time.perf_counter()
    jax.block_until_ready(program.step(below, above, passes, capacity))
    return time.perf_counter() - begun


def _seconds(run: Callable[[], float], passes: int) -> float:
    """Least seconds of a pass over some runs; the first one warms up."""
    return min([run() for _ in range(REPEATS + 1)][1:]) / passes


def _spans(said: Sequence[np.ndarray], workload: Workload) -> np.ndarray:
    """What was said of the texts, one after another.

    What was said of each text's first token does not count; of the first text the token before is given.
    """
    lengths = [len(prompt) for prompt in workload.prompts]
    spans = [slice(length, length + workload.new_tokens) for length in lengths]
    spans[0] = slice(lengths[0] - 1, spans[0].stop)
    return np.concatenate([one[span] for one, span in zip(said, spans, strict=True)])
