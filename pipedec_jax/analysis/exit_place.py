"""Where an exit head's vocabulary stands: on the exit's stage, as in the paper, or over all. Modeled, and measured."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Literal

import jax
import numpy as np

from pipedec_jax.cache import Rows
from pipedec_jax.clock import medians_in_turn
from pipedec_jax.config import LlamaConfig
from pipedec_jax.drafters.base import Drafter, Proposals, View
from pipedec_jax.drafters.chances import most_likely
from pipedec_jax.drafters.exit import ExitDrafter, ExitParams, ExitState
from pipedec_jax.model import llama
from pipedec_jax.model.exit_head import ExitHead, ExitHeadConfig, step_weights
from pipedec_jax.model.parameters import ParameterSource
from pipedec_jax.modeled.closed_forms import ppsd_ticks_per_token
from pipedec_jax.modeled.cost import Costs, byte_costs
from pipedec_jax.modeled.exit_cost import cycle, exit_tick_costs
from pipedec_jax.pipeline import placement
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.pipeline.split import LIKELY_RATE, split_at_exit
from pipedec_jax.tick_costs import over_live_rows

Place = Literal["exit", "sharded"]


@dataclasses.dataclass(frozen=True)
class ModeledExit:
    """What PPSD's chain costs with the vocabulary in one place, in bytes of weights that the slowest stage reads."""

    exit_stages: int
    """Stages of the exit path (e), chosen for that place."""
    tick: float
    token: float
    """With `LIKELY_RATE` of the guesses accepted."""


def modeled_exit(target: LlamaConfig, head: ExitHeadConfig, stages: int, item_bytes: int) -> dict[Place, ModeledExit]:
    """Both ways to place the vocabulary of an exit head, each with the split of layers that is best for it.

    Raises:
        ValueError: when the layers cannot be split so.
    """
    costs = byte_costs(target, None, item_bytes, head)
    weights = item_bytes * sum(step_weights(head, target).values())
    whole = dataclasses.replace(costs, exit_head=float(weights), exit_vocabulary=0.0)
    charged: dict[Place, Costs] = {"exit": whole, "sharded": costs}
    found: dict[Place, ModeledExit] = {}
    for place, costs in charged.items():
        weight = cycle(costs, split_at_exit(target.layers, stages, head.exit_layer)).head
        split = split_at_exit(target.layers, stages, head.exit_layer, weight)
        parts = exit_tick_costs(costs, split, 1)
        tick = parts.stage.at(1) + parts.slices(1, 1)
        ticks = float(ppsd_ticks_per_token(LIKELY_RATE, split.exit, stages))
        found[place] = ModeledExit(split.exit, tick, tick * ticks)
    return found


@dataclasses.dataclass(frozen=True)
class WholeExitDrafter(Drafter):
    """An exit head that is whole on the exit's stage, its vocabulary too: that is `[V, R]` in the parameters."""

    sharded: ExitDrafter
    """The head otherwise."""
    children: int = dataclasses.field(init=False)
    """The head's."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "children", self.sharded.children)

    @property
    def at_exit(self) -> bool:
        """Yes."""
        return True

    def new_state(self, slots: int, dtype: Any) -> ExitState:
        """The head's."""
        return self.sharded.new_state(slots, dtype)

    def prefill(self, params: ExitParams, state: ExitState, chunk: jax.Array, rows: Rows) -> ExitState:
        """The head's."""
        return self.sharded.prefill(params, state, chunk, rows)

    def propose(self, params: ExitParams, state: ExitState, view: View) -> tuple[ExitState, Proposals]:
        """The head's guesses."""
        own = self.sharded

        def run(state: ExitState, rows: tuple[jax.Array, jax.Array]) -> tuple[ExitState, Proposals]:
            seen = view.replace(frontier=rows[0], hidden=rows[1], sizes=(rows[0].shape[0],))
            state, x_WR = own.offer(params, state, seen)
            logit_WV = llama.logits(own.head.model(own.target), params.final_norm, params.head, x_WR)
            logit_WV = logit_WV[:, : own.vocab_size]
            return state, most_likely(logit_WV, view, rows[0], own.children, own.sharpness, own.noise)

        return over_live_rows(view.sizes, view.live, run, state, (view.frontier, view.hidden))


def measure_exit_places(
    source: ParameterSource, head: ExitHead, stages: int, width: int, *, tokens: int = 60, repeats: int = 5
) -> dict[Place, float]:
    """Seconds of a tick of PPSD with the vocabulary in each place, float32: medians, in turn (A B A B).

    Raises:
        ValueError: when there are fewer devices than stages, or the two places take other ticks.
    """
    target = source.config
    settings = EngineSettings(
        method="ppsd", stages=stages, width=width, children=width, exit_layer=head.config.exit_layer
    )
    sharded = Engine(source, None, settings, vocab_size=target.vocab_size, exit_head=head)
    mesh, own = sharded.mesh, sharded.weights.drafter
    # The slices one after the other are the whole matrix, and some padding.
    whole = placement.replicate(mesh, np.asarray(own.head)[: target.vocab_size])
    drafter = WholeExitDrafter(ExitDrafter(head.config, target, width, target.vocab_size))
    engines: dict[Place, Engine] = {
        "exit": Engine(
            source,
            None,
            settings,
            vocab_size=target.vocab_size,
            drafter=drafter,
            drafter_params=own.replace(head=whole),
        ),
        "sharded": sharded,
    }

    def run(place: Place) -> tuple[float, list[int]]:
        engine = engines[place]
        engine.start([1, 2, 3], max_new_tokens=tokens)
        jax.block_until_ready(engine.weights)
        begun = time.perf_counter()
        progress = engine.run(tokens)
        return (time.perf_counter() - begun) / progress.ticks[-1], progress.ticks

    ticks = {place: run(place)[1] for place in engines}  # compiles and warms up
    if ticks["exit"] != ticks["sharded"]:
        raise ValueError(f"the two places take other ticks: {ticks}")
    return medians_in_turn(lambda place: run(place)[0], engines, repeats)
