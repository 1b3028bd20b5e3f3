"""A pipeline without its target: the same schedules, tree and drafter over a text that is known, on one device.

The answer is known beforehand (plain decoding gives it), so the target's verdicts are too, and its layers need not be
computed. Everything else of a tick is the engine's own code, so ticks, hits and misses are those of the engine, at a
small part of its cost and for any number of stages on any machine. They are *simulated* ticks; no clock is involved.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pipedec_jax import tree
from pipedec_jax.analysis.exit_path import exit_path
from pipedec_jax.cache import chunk_rows
from pipedec_jax.config import LlamaConfig
from pipedec_jax.decoding.decoder import Decoder
from pipedec_jax.drafters.base import Drafter
from pipedec_jax.exchange import gather_over_devices
from pipedec_jax.model.exit_head import ExitHead
from pipedec_jax.model.parameters import ParameterSource
from pipedec_jax.pipeline import placement
from pipedec_jax.pipeline.drafting import draft_at_exit, draft_here, exit_view
from pipedec_jax.pipeline.engine import make_request
from pipedec_jax.pipeline.fit import cache_slots, check_fit
from pipedec_jax.pipeline.methods import make_drafter, make_schedule, make_split
from pipedec_jax.pipeline.placement import SAME
from pipedec_jax.pipeline.prefill import RequestArrays, begin
from pipedec_jax.pipeline.progress import Progress, read_progress
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.pipeline.split import StageSplit
from pipedec_jax.pipeline.stage import Target
from pipedec_jax.pipeline.state import Shared, System
from pipedec_jax.pipeline.tick import record, send, walk
from pipedec_jax.sampling import GREEDY, Sampling


class Simulator:
    """Counts the ticks of a method over known answers.

    Args:
        target: the target's geometry; with an exit head its weights, of which the exit path's layers are computed.
        draft: the draft model's weights; `None` for PP or with another drafter.
        settings: method and sizes.
        vocab_size: ids that are tokens.
        drafter: who guesses: one of `DRAFTERS`, or a drafter of one's own.
        drafter_params: the parameters of a drafter of one's own.
        exit_head: that drafts after the target's first `settings.exit_layer` layers.

    Raises:
        ValueError: when settings and models do not fit together.
    """

    def __init__(
        self,
        target: LlamaConfig | ParameterSource,
        draft: ParameterSource | None,
        settings: EngineSettings,
        *,
        vocab_size: int,
        drafter: Drafter | str = "model",
        drafter_params: Any = None,
        exit_head: ExitHead | None = None,
    ) -> None:
        config = draft.config if draft else None
        geometry = target if isinstance(target, LlamaConfig) else target.config
        head = exit_head.config if exit_head else None
        check_fit(settings, geometry, config, vocab_size, drafter, head)
        self.settings = settings
        self.with_settings = functools.partial(
            Simulator,
            target,
            draft,
            vocab_size=vocab_size,
            drafter=drafter,
            drafter_params=drafter_params,
            exit_head=exit_head,
        )
        """Makes a simulator of other settings with the same models."""
        self._target = Target(config=geometry, split=make_split(settings, geometry, head), vocab_size=vocab_size)
        self._drafter = make_drafter(settings, config, drafter, vocab_size, geometry, head)
        self._schedule = make_schedule(settings)
        self._mesh = placement.make_mesh(1)
        self._params = drafter_params
        if exit_head is not None:
            if isinstance(target, LlamaConfig):
                raise ValueError("an exit head guesses from the target's hidden rows: give the target's weights")
            params = placement.place_exit_head(self._mesh, exit_head, target, settings.dtype)
            self._drafter, self._params = exit_path(
                self._mesh, self._drafter, params, target, exit_head.config.exit_layer, settings.dtype
            )
        elif draft is not None and settings.method != "pp":
            self._params = placement.place_draft(self._mesh, draft, settings.dtype)
        self._programs: dict[Any, Any] = {}

    @property
    def guesses(self) -> int:
        """Guesses that the drafter makes for each node (K)."""
        return self._drafter.children

    @property
    def split(self) -> StageSplit:
        """Layers of the target by stage, and the stages of the exit path."""
        return self._target.split

    @classmethod
    def of(cls, decoder: Decoder) -> Simulator:
        """A simulator of what this decoder does, with its draft and settings."""
        return cls(
            decoder.target.source if decoder.exit_head is not None else decoder.target.config,
            decoder.draft.source if decoder.draft is not None else None,
            decoder.settings,
            vocab_size=decoder.target.vocab_size,
            drafter=decoder.drafter,
            exit_head=decoder.exit_head,
        )

    def run(
        self,
        prompt: Sequence[int],
        answer: Sequence[int],
        *,
        sampling: Sampling = GREEDY,
        drafter_params: Any = None,
    ) -> Progress:
        """Ticks and hits of this answer to this prompt, as the engine would have them; log-probabilities are zeros.

        Raises:
            ValueError: when there is no prompt or no answer.
        """
        return read_progress(self._simulate(prompt, answer, sampling, drafter_params)[0], len(prompt))

    def rows(self, prompt: Sequence[int], answer: Sequence[int], *, sampling: Sampling = GREEDY) -> np.ndarray:
        """`[ticks, N]`: living rows at every stage, for each tick of this answer.

        Raises:
            ValueError: as `run` does.
        """
        drafting = self.settings.draft_length * self.split.exit
        most = (len(answer) + 1) * (self.settings.stages + 1 + drafting)
        shared, rows = self._simulate(prompt, answer, sampling, None, most)
        return np.asarray(rows)[: int(shared.tick)]

    def _simulate(
        self, prompt: Sequence[int], answer: Sequence[int], sampling: Sampling, drafter_params: Any, most_ticks: int = 1
    ) -> tuple[Shared, jax.Array]:
        if not len(prompt) or not len(answer):
            raise ValueError("a prompt and its answer are needed, of at least one token each")
        if drafter_params is not None:
            self._params = drafter_params
        capacity = cache_slots(self.settings, len(prompt) + len(answer))
        request = make_request(prompt, len(answer), capacity, sampling)
        known = np.zeros(capacity, np.int32)
        known[: len(prompt) + len(answer)] = [*prompt, *answer]
        return self._program(sampling, capacity, most_ticks)(self._params, request, known)

    def _program(self, sampling: Sampling, capacity: int, most_ticks: int) -> Any:
        key = sampling.mode, capacity, most_ticks
        if key not in self._programs:
            system = System(
                target=self._target,
                drafter=self._drafter,
                schedule=self._schedule,
                sampling=sampling.mode,
                draft_steps=self.settings.steps,
                costs=self.settings.costs,
            )
            run = functools.partial(simulate, system, self.settings, most_ticks)
            spread = jax.shard_map(run, mesh=self._mesh, in_specs=(SAME, SAME, SAME), out_specs=SAME, check_vma=False)
            self._programs[key] = jax.jit(spread)
        return self._programs[key]


def simulate(
    system: System, settings: EngineSettings, most_ticks: int, params: Any, request: RequestArrays, known_S: jax.Array
) -> tuple[Shared, jax.Array]:
    """All ticks of one request whose text, prompt and answer, is known, and the rows at every stage in the first ticks.

    Those are `[most_ticks, N]` int32. Runs under a `shard_map` of one device.
    """
    state = prefill_drafter(system, settings, params, request)

    def more(carry: tuple[Shared, Any, jax.Array]) -> jax.Array:
        return ~carry[0].text.done

    def step(carry: tuple[Shared, Any, jax.Array]) -> tuple[Shared, Any, jax.Array]:
        shared, state, rows = carry
        shared = send(system, shared)
        here = jnp.sum(shared.pipe < shared.tree.capacity, axis=1, dtype=jnp.int32)
        rows = rows.at[shared.tick - 1].set(here, mode="drop")
        if system.exit:
            state, offer = system.drafter.offer(params, state, exit_view(system, shared))
            share = system.drafter.share(params, offer, exit_view(system, shared))
            nodes, steps = draft_at_exit(system, shared, offer, gather_over_devices(share))
        else:
            state, nodes, steps = draft_here(system, params, state, shared)
        leaving = shared.pipe[-1]
        # Off the text the target would choose something else; the root never gets there.
        choice = tree.at(known_S, tree.at(shared.tree.position, leaving, 0) + 1, 0)
        shared = record(system, shared, nodes, steps, choice, jnp.zeros(choice.shape, jnp.float32))
        return walk(system.schedule, shared), state, rows

    rows = jnp.zeros((most_ticks, system.stages), jnp.int32)
    shared, _, rows = lax.while_loop(more, step, (begin(system, request, jnp.zeros((), jnp.int32)), state, rows))
    return shared, rows


def prefill_drafter(system: System, settings: EngineSettings, params: Any, request: RequestArrays) -> Any:
    """The drafter's state after the prompt, all but its last token."""
    slots = request.prompt.shape[0]
    width = min(settings.prefill_width, slots)
    length = request.length - 1
    token_S = jnp.pad(request.prompt, (0, width))
    state = system.drafter.new_state(slots, settings.dtype)

    def step(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        start, state = carry
        token = lax.dynamic_slice_in_dim(token_S, start, width)
        return start + width, system.drafter.prefill(params, state, token, chunk_rows(start, width, length, slots))

    if not system.drafts_alone:
        return state
    return lax.while_loop(lambda carry: carry[0] < length, step, (jnp.zeros((), jnp.int32), state))[1]
