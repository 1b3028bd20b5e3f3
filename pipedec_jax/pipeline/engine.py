"""The engine: compiles a method's prefill and loop of ticks for a mesh, and runs them for one prompt after another."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pipedec_jax.cache import for_platform
from pipedec_jax.drafters.base import Drafter, new_state_of
from pipedec_jax.exchange import vary
from pipedec_jax.model.exit_head import ExitHead
from pipedec_jax.model.parameters import ParameterSource
from pipedec_jax.pipeline import placement
from pipedec_jax.pipeline.compiler_options import compiler_options
from pipedec_jax.pipeline.fit import cache_slots, check_fit, check_request
from pipedec_jax.pipeline.methods import make_drafter, make_schedule, make_split
from pipedec_jax.pipeline.placement import OWN, SAME
from pipedec_jax.pipeline.prefill import RequestArrays, prefill
from pipedec_jax.pipeline.progress import NOTHING, Progress, check_sound, read_progress
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.pipeline.stage import Target, TargetParams
from pipedec_jax.pipeline.state import Local, Shared, System, Weights
from pipedec_jax.pipeline.tick import run_ticks
from pipedec_jax.recording.history import Answer, Layout, Recording, read_history
from pipedec_jax.recording.tape import TAPE_TICKS, Frame, record_ticks
from pipedec_jax.sampling import GREEDY, Sampling, SamplingMode

END_TOKENS = 16
"""Places for end tokens in a compiled program; it has more of them, in steps of as many, where they do not suffice."""


def make_request(
    prompt: Sequence[int], max_new_tokens: int, capacity: int, sampling: Sampling, end_tokens: Sequence[int] = ()
) -> RequestArrays:
    """A request for a cache of so many slots. NumPy arrays, the same in every process: they enter it replicated."""
    ends = np.asarray(end_tokens if len(end_tokens) else [-1], np.int32)
    fields: dict[str, Any] = {
        "prompt": np.pad(np.asarray(prompt, np.int32), (0, capacity - len(prompt))),
        "length": np.int32(len(prompt)),
        "limit": np.int32(len(prompt) + max_new_tokens),
        "end_token": np.pad(ends, (0, -len(ends) % END_TOKENS), constant_values=-1),
        "sampling": jax.tree.map(np.asarray, sampling.arrays()),
    }
    return RequestArrays(**fields)


INTERRUPTED = (
    "this answer cannot go on: it was interrupted while the devices worked on it; begin a new one (generate() or "
    "stream() of a decoder, start() of an engine), and see partial() of the stream for what there is of this one"
)
"""Of what a run has taken and not given back, such as caches, nothing can be used."""


@dataclasses.dataclass(frozen=True)
class Programs:
    """Compiled for one capacity and sampling mode."""

    prefill: jax.stages.Compiled
    """`prefill.prefill`."""
    run: jax.stages.Compiled
    """`tick.run_ticks`, the loop of ticks."""


class Engine:
    """Decodes prompts one after another with one method on one mesh.

    Args:
        target: the target model's weights.
        draft: the draft model's weights; `None` for PP or with another drafter.
        settings: method and sizes.
        vocab_size: ids that are tokens; rows of either model beyond it are padding and never chosen.
        devices: devices to use, the first stage's first; all of `jax.devices()` by default.
        drafter: who guesses: one of `DRAFTERS`, or a drafter of one's own.
        drafter_params: the parameters of a drafter of one's own, replicated; may be replaced at every `start`.
        exit_head: that drafts after the target's first `settings.exit_layer` layers.
        target_params: the target's weights as another engine has placed them (`weights.target`), for the same split,
            dtype and devices; they are shared. By default they are read from `target`.
        wait: what a stage's rows pass after its layers where a heavier stage is emulated (`analysis.emulation`).

    Raises:
        ValueError: when settings, models and devices do not fit together.
    """

    def __init__(
        self,
        target: ParameterSource,
        draft: ParameterSource | None,
        settings: EngineSettings,
        *,
        vocab_size: int,
        devices: Sequence[jax.Device] | None = None,
        drafter: Drafter | str = "model",
        drafter_params: Any = None,
        exit_head: ExitHead | None = None,
        target_params: TargetParams | None = None,
        wait: Callable[[jax.Array], jax.Array] | None = None,
    ) -> None:
        head = exit_head.config if exit_head else None
        check_fit(settings, target.config, draft.config if draft else None, vocab_size, drafter, head)
        split = make_split(settings, target.config, head)
        self.settings = settings
        self._drafter = make_drafter(
            settings, draft.config if draft else None, drafter, vocab_size, target.config, head
        )
        self._schedule = make_schedule(settings)
        self._wait = wait
        ranks = settings.stages + self._drafter.ranks + settings.idle_ranks
        self.mesh: Mesh = placement.make_mesh(ranks, devices, settings.tensor_parallel)
        self.target = Target(
            target.config,
            split,
            vocab_size,
            parts=settings.tensor_parallel,
            least_rows=placement.least_rows(self.mesh),
        )
        self.preparing: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        """Entered around compiling and making caches: several processes wait there until all are through."""
        self.compile_seconds = 0.0
        self._programs: dict[Any, Programs] = {}
        self._prefills: dict[Any, Any] = {}
        self._makers: dict[int, tuple[Callable[[], Any], Callable[[], Any]]] = {}
        self._local: tuple[int, Local] | None = None
        self._shared: Shared | None = None
        self._run: Any = None
        self._start_length = 0
        self._progress = NOTHING
        self._frames: list[Frame] = []
        if target_params is None:
            target_params = placement.place_target(self.mesh, target, split, settings.dtype)
        if exit_head is not None:
            params = placement.place_exit_head(self.mesh, exit_head, target, settings.dtype, target_params)
        elif draft is not None and settings.method != "pp":
            params = placement.place_draft(self.mesh, draft, settings.dtype)
        else:
            params = self._replicate(drafter_params)
        self.weights = Weights(target=target_params, drafter=params)

    @property
    def devices(self) -> int:
        """Devices in use: stages, the drafter's rank, idle ranks, each of as many as a stage is split over."""
        return self.mesh.size

    def capacity_for(self, length: int) -> int:
        """Cache slots (S) for prompt and answer of this length together, the tree in flight included."""
        return cache_slots(self.settings, length)

    def start(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        end_tokens: Sequence[int] = (),
        drafter_params: Any = None,
    ) -> None:
        """Prefill a prompt, compiling first when this capacity and sampling mode are new.

        Raises:
            ValueError: as `check_request` does.
        """
        prompt = check_request(self.settings, self.target.config, self.target.vocab_size, prompt, max_new_tokens)
        capacity = self.capacity_for(len(prompt) + max_new_tokens)
        if drafter_params is not None:
            self.weights = self.weights.replace(drafter=self._replicate(drafter_params))
        request = make_request(prompt, max_new_tokens, capacity, sampling, end_tokens)
        local = self._take_local(capacity)
        programs = self._compile(sampling.mode, request, local)
        shared, local = programs.prefill(self.weights, request, local)
        self._shared, self._local, self._run = shared, (capacity, local), programs.run
        self._start_length = len(prompt)
        self._progress = NOTHING
        self._frames = []

    def programs(self, length: int, mode: SamplingMode = GREEDY.mode) -> Programs:
        """What decodes prompt and answer of this length together, compiled if it is not yet; decodes nothing.

        On devices that are only described (see `placement.only_described`) there is nothing else to do.
        """
        capacity = self.capacity_for(length)
        request = make_request([0], 1, capacity, GREEDY)
        return self._compile(mode, request, self.new_local(capacity))

    def system(self, mode: SamplingMode = GREEDY.mode) -> System:
        """The decoding method as `tick` takes it, for this way of drawing tokens."""
        return System(
            target=self.target,
            drafter=self._drafter,
            schedule=self._schedule,
            sampling=mode,
            draft_steps=self.settings.steps,
            costs=self.settings.costs,
            wait=self._wait,
        )

    def run(self, new_tokens: int) -> Progress:
        """Tick on the devices until `new_tokens` more tokens are committed or the answer is complete.

        Raises:
            NotFiniteError: when fewer tokens can be had, because the target gives NaN or infinity. It has
                what was committed before; the engine can go on to another prompt.
            RuntimeError: when called before `start` or after an interrupt inside `run`, or when the pipe makes no
                progress (a bug).
        """
        if self._shared is None or self._local is None:
            raise RuntimeError("call start() before run()" if self._run is None else INTERRUPTED)
        (capacity, local), shared = self._local, self._shared
        self._local = self._shared = None  # donated: not to be used again, also when interrupted
        # A token takes at most one walk through all stages (EESD's after a chain through the exit path); more ticks
        # than that would be a lost row.
        drafting = self.settings.draft_length * self.target.split.exit
        max_ticks = (new_tokens + 1) * (self.settings.stages + 1 + drafting)
        run = self._run_recorded if self.settings.record else self._run
        shared, local = run(self.weights, shared, local, np.int32(new_tokens), np.int32(max_ticks))
        self._shared, self._local = shared, (capacity, local)
        before, self._progress = self._progress, read_progress(shared, self._start_length, self._progress)
        progress, made = self._progress, len(self._progress.tokens) - len(before.tokens)
        if made < new_tokens and not progress.done:
            check_sound(shared, self.target, progress)
            raise RuntimeError(
                f"the pipe made no progress: {made} of {new_tokens} tokens in {max_ticks} ticks; please report this"
            )
        return progress

    def recording(self, text: Callable[[int], str] = str) -> Recording:
        """What has happened since `start`, told with what `text` makes of a token.

        Raises:
            RuntimeError: before `start`.
            ValueError: where the settings do not ask for it.
        """
        if not self.settings.record:
            raise ValueError("nothing is recorded: give record=True")
        if self._shared is None:
            raise RuntimeError("there is no answer yet, or it was interrupted while the devices worked on it")
        progress = self._progress
        layout = Layout(
            method=self.settings.name,
            stages=self.settings.stages,
            width=self._schedule.width,
            drafter=self._drafter.ranks > 0,
            exit=self.target.split.exit,
        )
        answer = Answer(progress.tokens, progress.ticks, progress.delays)
        return read_history(self._frames, layout, answer, text)

    def _run_recorded(
        self, weights: Weights, shared: Shared, local: Local, new_tokens: np.int32, max_ticks: np.int32
    ) -> tuple[Shared, Local]:
        """As the loop of ticks, tape by tape."""
        goal, rest = int(shared.text.length) + int(new_tokens), int(max_ticks)
        made = TAPE_TICKS
        while made == TAPE_TICKS and rest:
            ask = np.int32(goal - int(shared.text.length)), np.int32(min(TAPE_TICKS, rest))
            (shared, tape), local = self._run(weights, shared, local, *ask)
            found = jax.device_get(tape)
            made = int(np.count_nonzero(found.tick))
            self._frames += [jax.tree.map(lambda leaf, place=place: leaf[place], found) for place in range(made)]
            rest -= made
        return shared, local

    def bytes_per_device(self) -> list[dict[str, int | str]]:
        """What the weights and caches take on each device this process can address, in bytes, in rank order."""
        parts = {
            "target layers": self.weights.target.layers,
            "embedding and head": (self.weights.target.embedding, self.weights.target.head),
            "draft layers": getattr(self.weights.drafter, "layers", ()),
            # A tied exit head's vocabulary is the target's own.
            "draft embedding and head": tuple(
                matrix
                for name in ("embedding", "head")
                if (matrix := getattr(self.weights.drafter, name, ())) is not self.weights.target.output
            ),
            "target cache": self._local[1].cache if self._local else (),
            "draft cache": self._local[1].drafter if self._local else (),
        }
        sizes = {name: placement.bytes_per_device(tree) for name, tree in parts.items()}
        return [
            {"device": str(device), **{name: size.get(device, 0) for name, size in sizes.items()}}
            for device in self.mesh.devices.flat
            if device.process_index == jax.process_index()
        ]

    def _replicate(self, tree: Any) -> Any:
        return jax.tree.map(functools.partial(placement.replicate, self.mesh), tree)

    def _take_local(self, capacity: int) -> Local:
        """The devices' own state; the caches of the last prompt serve again (what is stale in them is masked)."""
        held, self._local, self._shared = self._local, None, None
        if held is not None and held[0] == capacity:
            return held[1]
        del held  # frees the caches of another capacity before new ones are made
        begun = time.perf_counter()
        with self.preparing(), jax.set_mesh(self.mesh):  # a caller may be within another
            local = jax.block_until_ready(self.new_local(capacity))
        self.compile_seconds += time.perf_counter() - begun
        return local

    def new_local(self, capacity: int) -> Local:
        """Fresh caches and activations for this many cache slots."""
        config, dtype = self.target.config, self.settings.dtype
        if capacity not in self._makers:
            # Kept, so it must not hold the engine: weights would then wait for the garbage collector.
            drafter, platform = self._drafter, placement.platform(self.mesh)
            new_state = jax.shard_map(
                lambda: vary(for_platform(new_state_of(drafter, capacity, dtype), platform)),
                mesh=self.mesh,
                in_specs=(),
                out_specs=OWN,
            )
            self._makers[capacity] = (
                placement.cache_maker(self.mesh, config, self.target.split.longest, capacity, dtype),
                placement.maker(self.mesh, new_state),
            )
        make_cache, make_state = self._makers[capacity]
        return Local(
            x=placement.zeros(self.mesh, (self._schedule.width, config.width), dtype),
            cache=make_cache(),
            drafter=make_state(),
        )

    def _compile(self, mode: SamplingMode, request: RequestArrays, local: Local) -> Programs:
        """The programs for these shapes and this sampling mode, compiled when they are new."""
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves((self.weights, request, local)))
        if (shapes, mode) not in self._programs:
            begun = time.perf_counter()
            with self.preparing(), jax.set_mesh(self.mesh):
                self._compile_new(shapes, mode, request, local)
            self.compile_seconds += time.perf_counter() - begun
        return self._programs[shapes, mode]

    def _compile_new(self, shapes: Any, mode: SamplingMode, request: RequestArrays, local: Local) -> None:
        system = self.system(mode)
        width = min(self.settings.prefill_width, request.prompt.shape[0])
        own = jax.tree.map(lambda leaf: leaf.sharding.spec, self.weights)
        options = compiler_options(self.mesh, self.weights)

        def lowered(function: Any, specs: tuple[Any, ...], *arguments: Any) -> Any:
            # The devices' own state is donated: caches are updated in place.
            donated = tuple(i + 1 for i, spec in enumerate(specs) if spec is OWN)
            spread = jax.shard_map(function, mesh=self.mesh, in_specs=(own, *specs), out_specs=(SAME, OWN))
            program = jax.jit(spread, donate_argnums=donated, compiler_options=options)
            return program.lower(self.weights, *arguments)

        wanted = []
        if shapes in self._prefills:  # the sampling mode is nothing to it
            shared = self._prefills[shapes][1]
        else:
            wanted = [lowered(functools.partial(prefill, system, width), (SAME, OWN), request, local)]
            shared = wanted[0].out_info[0]
        count = np.int32(0)
        ticks = functools.partial(record_ticks if self.settings.record else run_ticks, system)
        wanted.append(lowered(ticks, (SAME, OWN, SAME, SAME), shared, local, count, count))
        # Side by side: much of the compiler works on one core.
        with ThreadPoolExecutor(len(wanted)) as threads:
            *first, loop = threads.map(jax.stages.Lowered.compile, wanted)
        if first:
            self._prefills[shapes] = first[0], shared
        self._programs[shapes, mode] = Programs(prefill=self._prefills[shapes][0], run=loop)
