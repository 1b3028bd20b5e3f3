"""The draft model: a small LLaMA on a rank of its own that extends the frontier by one token a draft step.

Source: PipeDec (arXiv 2504.04104), where the draft model sits inside the pipeline. Its weights are replicated, as a
program under `shard_map` gives every rank arrays of the same shape. So is its head: several draft steps can then follow
each other beside the target's stages without an exchange between them.

Guesses are scored as what the *target* will choose (`chances`), not as what the draft would.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pipedec_jax.cache import LayerCache, Rows, at_least, empty_layers, over_layers
from pipedec_jax.config import LlamaConfig
from pipedec_jax.drafters.base import Drafter, Proposals, View
from pipedec_jax.drafters.chances import Noise, most_likely
from pipedec_jax.model import llama
from pipedec_jax.model.held import HeldModel
from pipedec_jax.tick_costs import over_live_rows
from pipedec_jax.tree import at


class DraftParams(HeldModel):
    """The draft model's weights, all of them, replicated."""


DraftState = tuple[LayerCache, ...]
"""The draft's cache, one entry per layer."""


@dataclasses.dataclass(frozen=True)
class ModelDrafter(Drafter):
    """Proposes the `children` tokens that the target will most likely choose after each frontier node."""

    config: LlamaConfig
    children: int
    vocab_size: int
    """Ids that are tokens. The draft's padding rows beyond it are never proposed, nor are those that it lacks."""
    sharpness: float = 1.0
    """Factor on the draft's logits before they are taken for the target's chances."""
    noise: Noise = "shared"

    @property
    def ranks(self) -> int:
        """One rank, behind the target's stages."""
        return 1

    def new_state(self, slots: int, dtype: Any) -> DraftState:
        """An empty cache."""
        return empty_layers(self.config, self.config.layers, slots, dtype)

    def prefill(self, params: DraftParams, state: DraftState, chunk: jax.Array, rows: Rows) -> DraftState:
        """Fill the cache with a chunk of the prompt."""
        return self.run_layers(params, state, chunk, rows)[0]

    def propose(self, params: DraftParams, state: DraftState, view: View) -> tuple[DraftState, Proposals]:
        """One step of the draft over the frontier; nothing is computed where that is empty."""

        def run(state: DraftState, node_W: jax.Array) -> tuple[DraftState, Proposals]:
            W = node_W.shape[0]
            rows, token = at_least(view.least_rows, view.rows(node_W), at(view.tree.token, node_W, 0))
            state, x = self.run_layers(params, state, token, rows)
            logit_WV = llama.logits(self.config, params.final_norm, params.output, x)[:W, : self.vocab_size]
            missing = self.vocab_size - logit_WV.shape[1]
            logit_WV = jnp.pad(logit_WV, ((0, 0), (0, missing)), constant_values=-jnp.inf)
            return state, most_likely(logit_WV, view, node_W, self.children, self.sharpness, self.noise)

        return over_live_rows(view.sizes, view.live, run, state, view.frontier)

    def run_layers(
        self, params: DraftParams, state: DraftState, token_W: jax.Array, rows: Rows
    ) -> tuple[DraftState, jax.Array]:
        """The new cache, and the hidden rows `[W, D]` of these tokens after all layers."""
        x = params.embedding.at[token_W].get(mode="clip")  # of a token that the draft lacks, anything
        rope = llama.rope_tables(self.config, rows.position, x.dtype)

        def step(index: int, cache: LayerCache, rows: Rows, x: jax.Array) -> tuple[LayerCache, jax.Array]:
            x, cache = llama.forward_layer(self.config, params.layers[index], x, rope, cache.attend(rows))
            return cache, x

        with jax.named_scope("draft"):
            return over_layers(state, rows, step, x)
