"""The draft model: a small LLaMA on a rank of its own that extends the tree's frontier by one level a tick.

Source: PipeDec (arXiv 2504.04104), where the draft model sits inside the pipeline. Its layers are replicated (a
program under `shard_map` gives every rank arrays of the same shape); its embedding and head are sharded like the
target's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from pipedec_jax import vocabulary
from pipedec_jax.cache import LayerCache, Rows
from pipedec_jax.config import LlamaConfig
from pipedec_jax.drafters.base import Drafter, Proposals, View
from pipedec_jax.exchange import AXIS, vary
from pipedec_jax.model import llama
from pipedec_jax.model.parameters import Parameters
from pipedec_jax.tree import at


class DraftParams(struct.PyTreeNode):
    """The draft model's weights as one rank holds them."""

    layers: tuple[Parameters, ...]
    """All decoder layers (replicated)."""
    final_norm: jax.Array
    """[Dd] (replicated)."""
    embedding: jax.Array
    """[Vr, Dd]: this rank's rows."""
    head: jax.Array
    """[Vr, Dd]: this rank's rows; the embedding's when tied."""


DraftState = tuple[LayerCache, ...]
"""The draft's cache, one entry per layer; used on its own rank."""


@dataclasses.dataclass(frozen=True)
class ModelDrafter(Drafter):
    """Proposes the `children` most likely tokens after each frontier node."""

    config: LlamaConfig
    children: int
    vocab_size: int
    """Ids that are tokens; the draft's padding rows beyond it are never proposed."""

    @property
    def ranks(self) -> int:
        """One rank, behind the target's stages."""
        return 1

    def enter(self, params: DraftParams, view: View) -> jax.Array:
        """This rank's part of the frontier's embeddings, `[W, Dd]`."""
        return vocabulary.embed_part(params.embedding, at(view.tree.token, view.frontier, 0))

    def compute(
        self, params: DraftParams, state: DraftState, view: View, entered: jax.Array, first_rank: int
    ) -> tuple[DraftState, jax.Array]:
        """Run the layers over the frontier on the draft's rank; elsewhere, and when it is empty, do nothing."""
        busy = jnp.any(view.frontier < view.tree.capacity)
        return self._layers(params, state, view.rows, entered, busy, first_rank)

    def score(self, params: DraftParams, summed: jax.Array) -> vocabulary.CandidatePart:
        """The best tokens of this rank's slice of the vocabulary."""
        logit = vocabulary.head_part(self.config, params.final_norm, params.head, summed, self.vocab_size)
        return vocabulary.candidate_part(logit, self.children)

    def propose(self, params: DraftParams, view: View, gathered: vocabulary.CandidatePart) -> Proposals:
        """The best tokens of the whole vocabulary."""
        token, log_prob = vocabulary.candidates(gathered, self.children)
        return Proposals(parent=view.frontier, token=token, log_prob=log_prob.astype(jnp.float32))

    def prefill_enter(self, params: DraftParams, token_W: jax.Array) -> jax.Array:
        """This rank's part of a chunk's embeddings."""
        return vocabulary.embed_part(params.embedding, token_W)

    def prefill(
        self,
        params: DraftParams,
        state: DraftState,
        rows: Rows,
        entered: jax.Array,
        active: jax.Array,
        first_rank: int,
    ) -> DraftState:
        """Fill the draft's cache with a chunk of the prompt."""
        return self._layers(params, state, lambda: rows, entered, active, first_rank)[0]

    def _layers(
        self,
        params: DraftParams,
        state: DraftState,
        make_rows: Callable[[], Rows],
        x: jax.Array,
        active: jax.Array,
        first_rank: int,
    ) -> tuple[DraftState, jax.Array]:
        def run(state: DraftState, x: jax.Array) -> tuple[DraftState, jax.Array]:
            rows = make_rows()
            rope = llama.rope_tables(self.config, rows.position, x.dtype)
            caches = []
            for layer, cache in zip(params.layers, state, strict=True):
                x, cache = llama.forward_layer(self.config, layer, x, rope, cache.attend(rows))
                caches.append(cache)
            return tuple(caches), x

        def rest(state: DraftState, x: jax.Array) -> tuple[DraftState, jax.Array]:
            return state, jnp.zeros_like(x)

        mine = (lax.axis_index(AXIS) == first_rank) & active
        with jax.named_scope("draft"):
            return lax.cond(mine, run, rest, state, vary(x))
