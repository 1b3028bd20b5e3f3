"""The exit path on one device, for the simulator: the target's first layers and the drafter behind them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh

from pipedec_jax.cache import Rows
from pipedec_jax.config import LlamaConfig
from pipedec_jax.drafters.base import Drafter, Proposals, View
from pipedec_jax.drafters.model import DraftParams, DraftState, ModelDrafter
from pipedec_jax.model.parameters import ParameterSource, Part
from pipedec_jax.pipeline import placement
from pipedec_jax.tree import at


class PathParams(struct.PyTreeNode):
    """Both parts' weights."""

    layers: DraftParams
    """Of a model that ends at the exit."""
    drafter: Any
    """The drafter's at the exit."""


class PathState(struct.PyTreeNode):
    """Both parts' caches."""

    layers: DraftState
    drafter: Any


@dataclasses.dataclass(frozen=True)
class FirstLayers:
    """A source of the weights of a model's first layers."""

    source: ParameterSource
    layers: int

    @property
    def config(self) -> LlamaConfig:
        """The geometry of the model that they are."""
        return dataclasses.replace(self.source.config, layers=self.layers)

    def read(self, path: str, part: Part | None = None) -> np.ndarray:
        """One array, or a part of it."""
        return self.source.read(path, part)


@dataclasses.dataclass(frozen=True)
class ExitPath(Drafter):
    """Proposes what a drafter at the exit does, given the hidden rows that it computes itself.

    A node passes all layers of the path in the tick in which it would leave its last stage: as the pipe is first in,
    first out, the caches are then as they would be.
    """

    drafter: Drafter
    path: ModelDrafter
    children: int = dataclasses.field(init=False)
    """The drafter's."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "children", self.drafter.children)

    @property
    def at_exit(self) -> bool:
        """Yes."""
        return True

    def new_state(self, slots: int, dtype: Any) -> PathState:
        """Empty caches."""
        return PathState(layers=self.path.new_state(slots, dtype), drafter=self.drafter.new_state(slots, dtype))

    def prefill(self, params: PathParams, state: PathState, chunk: jax.Array, rows: Rows) -> PathState:
        """Take a chunk's tokens, not their hidden rows, into both caches."""
        layers, hidden = self.path.run_layers(params.layers, state.layers, chunk, rows)
        return PathState(layers=layers, drafter=self.drafter.prefill(params.drafter, state.drafter, hidden, rows))

    def offer(self, params: PathParams, state: PathState, view: View) -> tuple[PathState, Any]:
        """The drafter's, for the nodes that leave the exit path."""
        token = at(view.tree.token, view.frontier, 0)
        layers, hidden = self.path.run_layers(params.layers, state.layers, token, view.rows())
        drafter, offer = self.drafter.offer(params.drafter, state.drafter, view.replace(hidden=hidden))
        return PathState(layers=layers, drafter=drafter), offer

    def share(self, params: PathParams, offer: Any, view: View) -> Any:
        """The drafter's."""
        return self.drafter.share(params.drafter, offer, view)

    def settle(self, offer: Any, shares: Any, view: View) -> Proposals:
        """The drafter's."""
        return self.drafter.settle(offer, shares, view)


def exit_path(
    mesh: Mesh, drafter: Drafter, drafter_params: Any, target: ParameterSource, exit_layer: int, dtype: Any
) -> tuple[ExitPath, PathParams]:
    """The path before a drafter at the exit, and the weights of both."""
    source = FirstLayers(target, exit_layer)
    path = ModelDrafter(config=source.config, children=drafter.children, vocab_size=source.config.vocab_size)
    params = PathParams(layers=placement.place_draft(mesh, source, dtype), drafter=drafter_params)
    return ExitPath(drafter, path), params
