"""The early-exit head: the target's first layers draft for the rest of it (PPSD, arXiv 2509.19368).

PPSD's loop, of n stages, the first e of which are the exit path, and where each step of it is:

1. In a tick token y_t enters stage 1 while stage k runs the token that entered k - 1 ticks before it (`tick.send`).
2. The token that leaves stage e has its hidden row turned into a guess of the next one: the exit's rank offers the row,
   every device multiplies it with its slice of the vocabulary, and all settle on the same guess (`offer`, `share` and
   `settle` here, called by `drafting.draft`, `share_at_exit` and `draft_at_exit`). It is sent in the next tick: the
   chain of the paper is `schedules.levels` with levels of one node. So one token enters every e ticks.
3. The token that leaves stage n gives the target's choice z. If z is the token that was guessed after it, it is
   committed; otherwise what is in flight is dropped, and z is sent (`tick.walk`).

The head sits behind the last stage of the exit path, on that stage's rank, and turns the hidden rows of the nodes that
have just passed it into guesses. The exit path is the target's own first E layers with their own cache: a node is
computed once, as a guess's source and as the beginning of its verification. A head with a transformer block has one
more layer of cache, written as the nodes pass and filled with the prompt at prefill.

The product with the vocabulary, most of a head's weight, is not the exit stage's alone as in the paper: like the
target's LM head it is sharded over all devices (`vocabulary`), so that no stage is longer than the others for it. Where
it is the target's LM head (a tied or untrained head), rows that pass the exit and rows that leave the last stage go
through it in one product, so that it is read once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import struct

from pipedec_jax import vocabulary
from pipedec_jax.cache import LayerCache, Rows, at_least, empty_layers
from pipedec_jax.config import LlamaConfig
from pipedec_jax.drafters.base import Drafter, Proposals, View
from pipedec_jax.drafters.chances import LikelyPart, Noise, likely_part, most_likely_of
from pipedec_jax.model import llama
from pipedec_jax.model.exit_head import ExitHeadConfig, before_vocabulary
from pipedec_jax.model.parameters import Parameters
from pipedec_jax.tick_costs import over_live_rows


class ExitParams(struct.PyTreeNode):
    """The head's weights: the vocabulary's matrix sliced over the devices, the rest replicated."""

    layers: Parameters
    """All before its last norm (`model.exit_head.head_shapes`); empty without map and block."""
    final_norm: jax.Array
    """[R]"""
    head: jax.Array
    """[Vr, R]: this device's rows; the target's LM head where it is tied or untrained."""


ExitState = tuple[LayerCache, ...]
"""The block's cache; empty without a block."""


@dataclasses.dataclass(frozen=True)
class ExitDrafter(Drafter):
    """Proposes the `children` tokens that the target will most likely choose after each node that passed the exit."""

    head: ExitHeadConfig
    target: LlamaConfig
    children: int
    vocab_size: int
    """Ids that are tokens; padding rows beyond it are never proposed."""
    sharpness: float = 1.0
    """Factor on the head's logits before they are taken for the target's chances."""
    noise: Noise = "shared"

    @property
    def at_exit(self) -> bool:
        """Yes."""
        return True

    def new_state(self, slots: int, dtype: Any) -> ExitState:
        """An empty cache of one layer for a block; nothing for other heads."""
        if self.head.variant != "block":
            return ()
        return empty_layers(self.head.model(self.target), 1, slots, dtype)

    def prefill(self, params: ExitParams, state: ExitState, chunk: jax.Array, rows: Rows) -> ExitState:
        """Take the hidden rows of a chunk of the prompt into the block's cache."""
        return self._path(params, state, rows, chunk)[0]

    def offer(self, params: ExitParams, state: ExitState, view: View) -> tuple[ExitState, jax.Array]:
        """The rows that passed the exit as the head's vocabulary takes them, `[W, R]`; where there are none, zeros."""

        def run(state: ExitState, rows: tuple[jax.Array, jax.Array]) -> tuple[ExitState, jax.Array]:
            node_W, x_WD = rows
            state, x = self._path(params, state, *at_least(view.least_rows, view.rows(node_W), x_WD))
            return state, x[: node_W.shape[0]]

        return over_live_rows(view.sizes, view.live, run, state, (view.frontier, view.hidden))

    def head_rows(self, params: ExitParams, offer: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """All rows, where the vocabulary is the target's."""
        return (offer, params.final_norm) if self.head.shares_vocabulary else None

    def share(self, params: ExitParams, offer: jax.Array, view: View) -> LikelyPart:
        """The most likely tokens of this device's slice of the vocabulary."""

        def run(_: None, rows: tuple[jax.Array, jax.Array]) -> tuple[None, LikelyPart]:
            node_W, found = rows
            if view.logit is None:
                model = self.head.model(self.target)
                found = vocabulary.head_part(
                    model, params.final_norm, params.head, found, self.vocab_size, view.least_rows
                )
            return None, likely_part(found, view, node_W, self.children, self.vocab_size, self.sharpness, self.noise)

        given = offer if view.logit is None else view.logit
        return over_live_rows(view.sizes, view.live, run, None, (view.frontier, given))[1]

    def settle(self, offer: jax.Array, shares: LikelyPart, view: View) -> Proposals:
        """The most likely tokens of all slices."""
        return most_likely_of(shares, view, self.children, self.vocab_size, self.sharpness, self.noise)

    def _path(self, params: ExitParams, state: ExitState, rows: Rows, x: jax.Array) -> tuple[ExitState, jax.Array]:
        rope = llama.rope_tables(self.target, rows.position, x.dtype)
        attend = state[0].attend(rows) if state else None
        x, cache = before_vocabulary(self.head, self.target, params.layers, x, rope, attend)
        return (cache,) if state else (), x
