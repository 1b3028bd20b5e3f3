"""The hierarchy's engine: k + 1 programs, and how they keep time.

Lockstep: in every tick each model starts from the buffers that all had published in the tick before, and makes as many
passes as were chosen to fit beside the slowest. Speculative: the draft's passes and the target's verification take
turns, each waiting for the other. The programs depend on each other by their buffers alone, so the host dispatches
ticks, or rounds, ahead and waits only to see whether enough is there. The free-running form is
`pipedec_jax.hierarchy.free`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pipedec_jax.hierarchy.buffers import FIGURES
from pipedec_jax.hierarchy.exchange import TOLD, BufferExchange, Told, pack_told, told, unpack_told
from pipedec_jax.hierarchy.free import run_free
from pipedec_jax.hierarchy.program import KnownModel, ModelProgram, Programs, Source
from pipedec_jax.hierarchy.settings import HierarchySettings, check_models
from pipedec_jax.pipeline.engine import INTERRUPTED, make_request
from pipedec_jax.pipeline.fit import cache_slots, check_request
from pipedec_jax.pipeline.progress import Progress, not_finite_error
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.recording.passes import PassRecording, read_passes
from pipedec_jax.sampling import GREEDY, Sampling, SamplingMode

LOOK_AHEAD = 2
"""Ticks, or rounds, that the host dispatches beyond the one that it waits for: enough to hide its own time."""

Delay = Callable[[int], float]
"""Seconds to wait before the next step of a model, by its index: to see what a slow or jittery one does."""


@dataclasses.dataclass(frozen=True)
class ModelFigures:
    """What one model did in an answer."""

    passes: int
    read: int
    """Tokens that it read in all passes; over passes, how wide a pass was on average."""
    rollbacks: int
    """Times its buffer was rolled back."""
    undone: int
    """Tokens it lost to that."""


class HierarchyEngine:
    """Decodes prompts one after another with a hierarchy of models.

    Args:
        sources: the models' weights, the smallest's first and the target's last; known words in place of any but the
            target.
        settings: method, form and sizes.
        vocab_size: ids that are tokens, of all models.
        devices: the smallest model's first; all of `jax.devices()` by default.
        delay: see `Delay`; for measurements.
        record: whether to keep what every model has published, for `recording`.

    Raises:
        ValueError: when settings, models and devices do not fit together.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        settings: HierarchySettings,
        *,
        vocab_size: int,
        devices: Sequence[jax.Device] | None = None,
        delay: Delay | None = None,
        record: bool = False,
    ) -> None:
        known = [isinstance(source, KnownModel) for source in sources]
        if known and known[-1]:
            raise ValueError("the target must be a model, not known words")
        configs = [None if isinstance(source, KnownModel) else source.config for source in sources]
        check_models(settings, configs, vocab_size)
        devices = jax.devices() if devices is None else list(devices)
        if len(devices) < sum(settings.stages):
            raise ValueError(
                f"{sum(settings.stages)} devices are needed (stages of all models) but there are {len(devices)}"
            )
        self.settings = settings
        self.vocab_size = vocab_size
        self.delay = delay
        target = configs[-1]
        assert target is not None
        self._target = target
        self._plain = EngineSettings(method="pp", stages=settings.stages[-1], capacity=settings.capacity)
        self.models: list[ModelProgram] = []
        first = 0
        for source, stages, width in zip(sources, settings.stages, settings.widths, strict=True):
            self.models.append(
                ModelProgram(
                    source,
                    stages=stages,
                    width=width,
                    devices=devices[first : first + stages],
                    dtype=settings.dtype,
                    vocab_size=vocab_size,
                    prefill_width=settings.prefill_width,
                )
            )
            first += stages
        self._exchange = BufferExchange([model.mesh for model in self.models])
        if self._exchange.needed and settings.form == "free":
            raise ValueError("form free is for one process: several take the same steps, so use form lockstep")
        if self._exchange.needed and record:
            raise ValueError("record is for one process: leave it out where models are spread over several")
        self.preparing: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        """Entered around compiling and making caches: several processes wait there until all are through."""
        self.compile_seconds = 0.0
        """Seconds spent on compiling and on making caches."""
        self._published: list[jax.Array] = []
        self._recorded: list[tuple[int, jax.Array]] | None = [] if record else None
        self._prompt_length = 0
        self._limit = 0
        self._ends: frozenset[int] = frozenset()

    def start(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        end_tokens: Sequence[int] = (),
        drafter_params: object = None,
    ) -> None:
        """Prefill a prompt in all models, compiling first when this capacity and sampling mode are new.

        Raises:
            ValueError: as `check_request` does, and for `drafter_params`.
        """
        if drafter_params is not None:
            raise ValueError("a hierarchy takes no drafter_params")
        prompt = check_request(self._plain, self._target, self.vocab_size, prompt, max_new_tokens)
        capacity = self.capacity_for(len(prompt) + max_new_tokens)
        request = make_request(prompt, max_new_tokens, capacity, sampling, end_tokens)
        self._published = []  # models interrupted while they prefill are not of one prompt
        top = len(self.models) - 1
        with self.preparing():
            for index, model in enumerate(self.models):
                model.make_ready(request, sampling.mode, below=index > 0, above=top - index)
        self._published = self._share([model.prefill() for model in self.models], capacity)
        if self._recorded is not None:
            self._recorded = list(enumerate(self._published))
        self.compile_seconds = sum(model.compile_seconds for model in self.models)
        self._prompt_length, self._limit = len(prompt), len(prompt) + max_new_tokens
        self._ends = frozenset(end_tokens)

    def capacity_for(self, length: int) -> int:
        """Places of each buffer and cache for prompt and answer of this length together."""
        return cache_slots(self._plain, length)

    def programs(self, length: int, index: int, mode: SamplingMode = GREEDY.mode) -> Programs:
        """What decodes prompt and answer of this length together, of one model by its index; decodes nothing.

        On devices that are only described (see `placement.only_described`) there is nothing else to do.
        """
        request, above = make_request([0], 1, self.capacity_for(length), GREEDY), len(self.models) - 1 - index
        return self.models[index].programs(request, mode, below=index > 0, above=above)

    def run(self, new_tokens: int) -> Progress:
        """Decode until at least `new_tokens` more tokens are there or the answer is complete.

        Raises:
            NotFiniteError: when fewer tokens can be had, because the target gives NaN or infinity. What the smaller
                models give is only guesses.
            RuntimeError: when called before `start`, or after an interrupt in it or inside a model's step.
        """
        if not self._published:
            raise RuntimeError("call start() before run()")
        if any(model.lost for model in self.models):
            raise RuntimeError(INTERRUPTED)
        goal = self._length(self._published[-1]) + new_tokens
        if self.settings.method == "speculative":
            self._run_ahead(goal, self._round, most=1)
        elif self.settings.form == "free":
            self._published = run_free(self, self._published, goal)
        else:
            self._run_ahead(goal, self._tick, most=self.settings.stages[-1])
        progress = self._progress()
        if self._prompt_length + len(progress.tokens) < min(goal, self._limit) and not progress.done:
            self._check_sound(progress)
        return progress

    def figures(self) -> list[ModelFigures]:
        """What each model did since `start`."""
        states = [self._told(index) for index in range(len(self.models))]
        return [ModelFigures(state.passes, state.read, state.rollbacks, state.undone) for state in states]

    def recording(self, names: Sequence[str] | None = None, text: Callable[[int], str] = str) -> PassRecording:
        """What every model did since `start`, step by step.

        Args:
            names: of the models, the smallest first; by default their numbers.
            text: of a token.

        Raises:
            RuntimeError: before `start`.
            ValueError: where it was not asked for.
        """
        if self._recorded is None:
            raise ValueError("nothing is recorded: give record=True")
        if not self._recorded:
            raise RuntimeError("call start() first")
        names = [f"model {index}" for index in range(len(self.models))] if names is None else names
        published = [(index, np.asarray(packed)) for index, packed in self._recorded]
        return read_passes(published, self.settings.method, self.settings.form, names, self._prompt_length, text)

    def bytes_per_device(self) -> list[dict[str, int | str]]:
        """What weights and caches take on each device this process can address, in bytes, in rank order."""
        rows = []
        for index, model in enumerate(self.models):
            parts = model.bytes_per_device()
            for device in model.mesh.devices.flat:
                if device.process_index == jax.process_index():
                    sizes = {f"model {index} {name}": found.get(device, 0) for name, found in parts.items()}
                    rows.append({"device": str(device), **sizes})
        return rows

    def enough(self, packed: jax.Array, goal: int) -> bool:
        """Whether the target's buffer holds so many tokens, or a complete answer, or can never; waits for it."""
        host = np.asarray(packed)
        if host[FIGURES.index("stuck")]:
            return True
        length = int(host[0])
        last = int(host[len(FIGURES) + length - 1])
        return length >= min(goal, self._limit) or (length > self._prompt_length and last in self._ends)

    def step(self, index: int, published: Sequence[jax.Array], passes: int) -> Any:
        """Dispatch a step of one model that sees these buffers; returns what it publishes, `None` if it is not here."""
        model = self.models[index]
        if not model.here:
            return None
        below = model.put(published[index - 1]) if index else None
        above = [model.put(packed) for packed in published[index + 1 :]]
        packed = model.step(below, above, passes, self.settings.most_ahead)
        if self._recorded is not None and packed is not None:
            self._recorded.append((index, packed))
        return packed

    def _length(self, packed: jax.Array) -> int:
        return int(np.asarray(packed)[0])

    def _run_ahead(self, goal: int, turn: Callable[[], list[jax.Array]], most: int) -> None:
        """Make turns until the target holds enough; a token takes `most` of them at most.

        Some are dispatched before the host waits for the one in front, but none that the missing tokens cannot need.
        """
        seen, waiting = self._published[-1], collections.deque[jax.Array]()
        while not self.enough(seen, goal):
            missing = min(goal, self._limit) - self._length(seen)
            while len(waiting) < min(1 + LOOK_AHEAD, most * missing):
                self._published = turn()
                waiting.append(self._published[-1])
            seen = waiting.popleft()

    def _tick(self) -> list[jax.Array]:
        """One step of every model, all from the same buffers; a delayed one is dispatched when its delay is over."""
        passes = (*self.settings.passes, 1)
        waits = [0.0 if self.delay is None else self.delay(index) for index in range(len(passes))]
        if any(waits):
            jax.block_until_ready(self._published)
        begun, stepped = time.perf_counter(), list(self._published)
        for index in sorted(range(len(passes)), key=lambda index: waits[index]):
            if waits[index]:
                time.sleep(max(0.0, begun + waits[index] - time.perf_counter()))
            stepped[index] = self.step(index, self._published, passes[index])
        return self._share(stepped)

    def _round(self) -> list[jax.Array]:
        """Of speculative: the draft's passes, then the target's verification of what they gave."""
        draft_stages, stages = self.settings.stages
        (lookahead,) = self.settings.passes
        found = list(self._published)
        # A pass more, to read the target's own token after a lookahead that was right throughout.
        for index, passes in enumerate(((lookahead + 1) * draft_stages, stages)):
            stepped: list[Any] = [None, None]
            stepped[index] = self.step(index, found, passes)
            found[index] = self._share(stepped)[index]
        return found

    def _share(self, published: Sequence[Any], capacity: int | None = None) -> list[jax.Array]:
        """What the models have published, for the devices of all; as it is where they belong to one process."""
        if not self._exchange.needed:
            return list(published)
        length = len(FIGURES) + capacity if capacity else self._published[0].shape[0]
        return self._exchange.share(published, length)

    def _told(self, index: int) -> Told:
        """What the host wants to know of a model; waits for its devices."""
        model = self.models[index]
        found = told(model.state) if model.here else None
        if not self._exchange.needed:
            assert found is not None
            return found
        length = len(TOLD) + 4 * (self._published[0].shape[0] - len(FIGURES))
        packed: list[Any] = [None] * len(self.models)
        packed[index] = None if found is None else pack_told(found)
        return unpack_told(np.asarray(self._exchange.share(packed, length)[index]))

    def _check_sound(self, progress: Progress) -> None:
        model = self.models[-1]
        state = self._told(-1)
        place, entered = state.stuck, state.stuck_pass
        assert model.target is not None  # the constructor has checked
        if place:
            # A row is at one stage a pass; the last one and the logits share theirs.
            raise not_finite_error(model.target, place, entered + place - 1 if entered else 0, progress)

    def _progress(self) -> Progress:
        state = self._told(-1)
        length = state.length
        new = slice(self._prompt_length, length)
        tokens = state.token[new].tolist()
        return Progress(
            tokens=tokens,
            ticks=state.tick[new].tolist(),
            costs=(self.settings.tick_cost * state.tick[new].astype(float)).tolist(),
            delays=state.delay[new].tolist(),
            logprobs=state.log_prob[new].tolist(),
            nodes=state.read,
            done=length >= self._limit or (bool(tokens) and tokens[-1] in self._ends),
        )
