"""A model of a hierarchy on its own devices: weights, caches and compiled programs.

Every model is a program of its own, on a mesh of its own stages. So no device holds a weight of another model, and the
programs of different models can run at any pace (one program for all would hold every model's arrays on every rank).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pipedec_jax.drafters.base import NoDrafter
from pipedec_jax.hierarchy import pipe as pipes
from pipedec_jax.hierarchy.buffers import FIGURES
from pipedec_jax.hierarchy.exchange import is_here, put
from pipedec_jax.hierarchy.pipe import Pipe, State
from pipedec_jax.model.parameters import ParameterSource
from pipedec_jax.pipeline import placement
from pipedec_jax.pipeline.compiler_options import compiler_options
from pipedec_jax.pipeline.placement import OWN, SAME
from pipedec_jax.pipeline.prefill import RequestArrays, prefill
from pipedec_jax.pipeline.split import split_layers
from pipedec_jax.pipeline.stage import Target
from pipedec_jax.pipeline.state import Local, System, Weights
from pipedec_jax.sampling import SamplingMode
from pipedec_jax.schedules.plain import PlainSchedule


@dataclasses.dataclass(frozen=True)
class KnownModel:
    """In place of a model, its words: it says `words[p]` at every position p, whatever stands before.

    It checks the formulas at any acceptance, and costs nothing.
    """

    words: np.ndarray
    """[T] int32 by absolute position."""


Source = ParameterSource | KnownModel


@dataclasses.dataclass(frozen=True)
class Programs:
    """Compiled for one capacity, sampling mode and place in the hierarchy."""

    prefill: jax.stages.Compiled
    """`prefill.prefill`."""
    step: jax.stages.Compiled
    """`pipe.step`, a loop of passes."""


class ModelProgram:
    """One model's share of the engine.

    Args:
        source: the weights, or known words.
        stages: of this model (N).
        width: most tokens that one of its passes reads (W).
        devices: as many as stages.
        dtype: of weights, activations and caches.
        vocab_size: ids that are tokens.
        prefill_width: prompt tokens per prefill chunk.
    """

    def __init__(
        self,
        source: Source,
        *,
        stages: int,
        width: int,
        devices: Sequence[jax.Device],
        dtype: Any,
        vocab_size: int,
        prefill_width: int,
    ) -> None:
        self.mesh: Mesh = placement.make_mesh(stages, devices)
        self.width, self.dtype, self.prefill_width = width, dtype, prefill_width
        self.sizes = placement.row_sizes(self.mesh, width)
        self.target: Target | None = None
        self.here = is_here(self.mesh)
        """Whether this process has devices of it. If not, it knows the geometry alone, and runs nothing."""
        self.place_weights(source, vocab_size)
        self.compile_seconds = 0.0
        self._programs: dict[Any, Programs] = {}
        self._makers: dict[int, Any] = {}
        self._prefills: dict[Any, Any] = {}
        self._local: tuple[int, Local] | None = None
        self._request: RequestArrays | None = None
        self._ready: Any = None
        self._step: Any = None
        self._state: State | None = None

    def place_weights(self, source: Source, vocab_size: int) -> None:
        """Put weights on the devices, those of another model of the same geometry as well."""
        if isinstance(source, KnownModel):
            self._words = np.asarray(source.words, np.int32)
            self.weights: Any = ()
            return
        split = split_layers(source.config.layers, self.mesh.size)
        self.target = Target(source.config, split, vocab_size, least_rows=placement.least_rows(self.mesh))
        self.weights = placement.place_target(self.mesh, source, split, self.dtype) if self.here else ()

    def set_width(self, width: int) -> None:
        """Read at most so many tokens in a pass from the next start on; each width is a program of its own."""
        if width != self.width:
            self.width, self.sizes, self._local = width, placement.row_sizes(self.mesh, width), None

    @property
    def stages(self) -> int:
        """Stages (N)."""
        return self.mesh.size

    @property
    def state(self) -> State:
        """The pipe's state after the steps so far."""
        assert self._state is not None  # start
        return self._state

    def put(self, packed: jax.Array) -> jax.Array:
        """A published buffer, on this model's devices; does not wait."""
        return put(self.mesh, packed)

    def start(self, request: RequestArrays, mode: SamplingMode, below: bool, above: int) -> jax.Array | None:
        """Make ready for a prompt, then prefill it; returns the buffer to publish, `None` where it is not here."""
        self.make_ready(request, mode, below, above)
        return self.prefill()

    def make_ready(self, request: RequestArrays, mode: SamplingMode, below: bool, above: int) -> None:
        """Make caches and compile, when needed.

        Args:
            request: what to decode.
            mode: how.
            below: whether there is a smaller model.
            above: number of larger models.
        """
        if not self.here:
            return
        capacity = request.prompt.shape[0]
        request = jax.tree.map(functools.partial(placement.replicate, self.mesh), request)
        if self.target is None:
            words = np.zeros(capacity, np.int32)
            words[: len(self._words)] = self._words[:capacity]
            self.weights = placement.replicate(self.mesh, words)
        held, self._local = self._local, None
        begun, compiled = time.perf_counter(), len(self._programs)
        local = held[1] if held is not None and held[0] == capacity else None
        del held
        fresh = local is None
        with jax.set_mesh(self.mesh):  # a caller may be within another
            if local is None:
                local = jax.block_until_ready(self.new_local(capacity))
            programs = self._compile(request, local, mode, below, above)
        if fresh or len(self._programs) > compiled:
            self.compile_seconds += time.perf_counter() - begun
        self._local, self._request, self._ready = (capacity, local), request, programs

    def prefill(self) -> jax.Array | None:
        """Prefill the prompt that it was made ready for; returns the buffer to publish, `None` where it is not here."""
        if not self.here:
            return None
        assert self._local is not None  # make_ready
        (capacity, local), self._local = self._local, None  # donated
        (self._state, packed), local = self._ready.prefill(self.weights, self._request, local)
        self._local, self._step = (capacity, local), self._ready.step
        return packed

    def step(self, below: jax.Array | None, above: Sequence[jax.Array], passes: int, lead: int) -> jax.Array | None:
        """Make up to so many passes while less than `lead` tokens ahead of the target; does not wait.

        Returns:
            The buffer to publish, `None` where the model is not here.
        """
        if not self.here:
            return None
        assert self._local is not None  # start
        capacity, local = self._local
        self._local = None  # donated
        control = np.asarray((passes, lead), np.int32)
        (self._state, packed), local = self._step(
            self.weights, self._request, self._state, local, below, tuple(above), control
        )
        self._local = (capacity, local)
        return packed

    @property
    def lost(self) -> bool:
        """Whether an interrupt inside a step has left it without its caches, until it is made ready again."""
        return self.here and self._local is None

    def bytes_per_device(self) -> dict[str, dict[jax.Device, int]]:
        """Bytes of weights and of the cache on each of its devices."""
        cache = self._local[1].cache if self._local else ()
        weights = self.weights if self.target is not None else ()
        return {"weights": placement.bytes_per_device(weights), "cache": placement.bytes_per_device(cache)}

    def programs(self, request: RequestArrays, mode: SamplingMode, below: bool, above: int) -> Programs:
        """What `make_ready` compiles, and no more: there is nothing else to do on devices that are only described."""
        request = jax.tree.map(functools.partial(placement.replicate, self.mesh), request)
        return self._compile(request, self.new_local(request.prompt.shape[0]), mode, below, above)

    def new_local(self, capacity: int) -> Local:
        """Fresh caches and activations for this many places."""
        if self.target is None:
            return Local(x=placement.zeros(self.mesh, (1, 1), np.float32), cache=(), drafter=())
        config, split = self.target.config, self.target.split
        if capacity not in self._makers:
            self._makers[capacity] = placement.cache_maker(self.mesh, config, split.longest, capacity, self.dtype)
        return Local(
            x=placement.zeros(self.mesh, (self.width, config.width), self.dtype),
            cache=self._makers[capacity](),
            drafter=(),
        )

    def _compile(self, request: RequestArrays, local: Local, mode: SamplingMode, below: bool, above: int) -> Programs:
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves((self.weights, request, local)))
        key = (shapes, mode, below, above)
        if key in self._programs:
            return self._programs[key]
        own = jax.tree.map(lambda leaf: leaf.sharding.spec, self.weights)
        options = compiler_options(self.mesh, self.weights)

        def spread(function: Any, specs: tuple[Any, ...], donated: int) -> Any:
            mapped = jax.shard_map(function, mesh=self.mesh, in_specs=(own, *specs), out_specs=((SAME, SAME), OWN))
            return jax.jit(mapped, donate_argnums=donated, compiler_options=options)

        if shapes not in self._prefills:  # the sampling mode is nothing to it
            begin = spread(self._begin, (SAME, OWN), 2).lower(self.weights, request, local)
            self._prefills[shapes] = begin.compile(), begin.out_info[0][0]
        begin, state = self._prefills[shapes]
        length = len(FIGURES) + request.prompt.shape[0]
        seen = jax.ShapeDtypeStruct((length,), jnp.int32, sharding=NamedSharding(self.mesh, SAME))
        step = functools.partial(pipes.step, self._pipe(mode))
        stepped = spread(step, (SAME, SAME, OWN, SAME, SAME, SAME), 3).lower(
            self.weights, request, state, local, seen if below else None, (seen,) * above, np.zeros(2, np.int32)
        )
        self._programs[key] = Programs(prefill=begin, step=stepped.compile())
        return self._programs[key]

    def _pipe(self, mode: SamplingMode) -> Pipe:
        return Pipe(self.width, self.target, mode, self.sizes, self.stages)

    def _begin(self, weights: Any, request: RequestArrays, local: Local) -> tuple[tuple[State, jax.Array], Local]:
        """Prefill, under `shard_map`."""
        mode, spoiled = SamplingMode(), None
        if self.target is not None:
            # The schedule and the drafter are nothing to prefill here.
            system = System(target=self.target, drafter=NoDrafter(), schedule=PlainSchedule(), sampling=mode)
            width = min(self.prefill_width, request.prompt.shape[0])
            shared, local = prefill(system, width, Weights(target=weights, drafter=None), request, local)
            spoiled = shared.spoiled
        state = pipes.begin(self._pipe(mode), request, spoiled)
        return (state, pipes.publish(state)), local
