"""The draft model: a small LLaMA on a rank of its own that extends the frontier by one token a draft step.

Source: PipeDec (arXiv 2504.04104), where the draft model sits inside the pipeline. Its weights are replicated, as a
program under `shard_map` gives every rank arrays of the same shape. So is its head: several draft steps can then follow
each other beside the target's stages without an exchange between them.

Guesses are scored as what the *target* will choose, not as what the draft would. A target follows the draft's favourite
more often than the draft's own probability says, which `sharpness` corrects; and where the target draws with noise, the
draft knows that noise (it depends on seed and position alone) and adds it to its own logits.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from pipedec_jax.cache import LayerCache, Rows, empty_layers
from pipedec_jax.config import LlamaConfig
from pipedec_jax.drafters.base import Drafter, Proposals, View
from pipedec_jax.model import llama
from pipedec_jax.model.parameters import Parameters
from pipedec_jax.sampling import gumbel_noise, keep, scale
from pipedec_jax.tick_costs import over_live_rows
from pipedec_jax.tree import at

Noise = Literal["shared", "independent", "none"]
"""Under which noise the draft guesses a drawn token: the target's own, other noise of the same law, or none."""


class DraftParams(struct.PyTreeNode):
    """The draft model's weights, replicated."""

    layers: tuple[Parameters, ...]
    """All decoder layers."""
    final_norm: jax.Array
    """[Dd]"""
    embedding: jax.Array
    """[Vd, Dd]"""
    head: jax.Array
    """[Vd, Dd]; the embedding when tied."""


DraftState = tuple[LayerCache, ...]
"""The draft's cache, one entry per layer."""


@dataclasses.dataclass(frozen=True)
class ModelDrafter(Drafter):
    """Proposes the `children` tokens that the target will most likely choose after each frontier node."""

    config: LlamaConfig
    children: int
    vocab_size: int
    """Ids that are tokens; the draft's padding rows beyond it are never proposed."""
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

    def prefill(self, params: DraftParams, state: DraftState, token_W: jax.Array, rows: Rows) -> DraftState:
        """Fill the cache with a chunk of the prompt."""
        return self._layers(params, state, token_W, rows)[0]

    def propose(self, params: DraftParams, state: DraftState, view: View) -> tuple[DraftState, Proposals]:
        """One step of the draft over the frontier; nothing is computed where that is empty."""

        def run(state: DraftState, node_W: jax.Array) -> tuple[DraftState, Proposals]:
            state, x = self._layers(params, state, at(view.tree.token, node_W, 0), view.rows(node_W))
            logit_WV = llama.logits(self.config, params.final_norm, params.head, x)[:, : self.vocab_size]
            chance_WV = self._log_chances(logit_WV, view, at(view.tree.position, node_W, 0) + 1)
            log_prob, token = lax.top_k(chance_WV, self.children)
            return state, Proposals(token=token.astype(jnp.int32), log_prob=log_prob.astype(jnp.float32))

        return over_live_rows(view.sizes, view.frontier < view.tree.capacity, run, state, view.frontier)

    def _log_chances(self, logit_WV: jax.Array, view: View, position_W: jax.Array) -> jax.Array:
        """`[W, V]` log of the chance that the target chooses each token for these positions.

        A target that draws takes the highest `logit / T + noise`. The draft's logits differ from the target's by an
        error, which in these units is T times smaller; hence the factor T, which makes greedy the limit of small T.
        """
        if not view.mode.sampled or self.noise == "none":
            return jax.nn.log_softmax(self.sharpness * logit_WV, axis=-1)
        sampling = view.sampling
        if self.noise == "independent":
            sampling = sampling.replace(key=sampling.key ^ jnp.uint32(0x9E3779B9))
        scaled = scale(sampling, logit_WV)
        noise = gumbel_noise(sampling, position_W, self.vocab_size)
        drawn = scaled + noise.astype(scaled.dtype)
        if view.mode.filtered:
            drawn = jnp.where(keep(sampling, scaled), drawn, -jnp.inf)
        factor = self.sharpness * sampling.temperature.astype(drawn.dtype)
        return jax.nn.log_softmax(factor * drawn, axis=-1)

    def _layers(
        self, params: DraftParams, state: DraftState, token_W: jax.Array, rows: Rows
    ) -> tuple[DraftState, jax.Array]:
        x = params.embedding[token_W]
        rope = llama.rope_tables(self.config, rows.position, x.dtype)
        caches = []
        with jax.named_scope("draft"):
            for layer, cache in zip(params.layers, state, strict=True):
                x, cache = llama.forward_layer(self.config, layer, x, rope, cache.attend(rows))
                caches.append(cache)
        return tuple(caches), x
