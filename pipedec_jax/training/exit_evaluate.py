"""How often exit heads guess the target's next token: the measure of `training.evaluate`, for many heads at once."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.exit_head import ExitHeadConfig
from pipedec_jax.model.parameters import Parameters
from pipedec_jax.training.evaluate import TOPS, EvaluationConfig, count_agreement, draw_prompts, greedy_texts
from pipedec_jax.training.exits import Heads, head_logits
from pipedec_jax.training.forward import hidden_after


@functools.partial(jax.jit, static_argnums=(0, 1))
def _best(
    heads: tuple[ExitHeadConfig, ...], target: LlamaConfig, params: Heads, own: Parameters, token_BT: jax.Array
) -> dict[str, jax.Array]:
    """Every head's best tokens `[B, T, max(TOPS)]` after every position."""
    B, T = token_BT.shape
    rows = hidden_after(target, own, token_BT, {head.exit_layer for head in heads})
    found = {}
    for head in heads:
        logits = head_logits(head, target, params[head.name], own, rows[head.exit_layer], (B, T))
        found[head.name] = lax.top_k(logits, max(TOPS))[1].reshape(B, T, -1)
    return found


def target_texts(
    target: LlamaConfig, own: Parameters, documents: Sequence[np.ndarray], begin: int | None, settings: EvaluationConfig
) -> np.ndarray:
    """`[prompts, prompt + new]`: prompts drawn from held-out documents, and the target's greedy text after them.

    Raises:
        ValueError: when no document is longer than a prompt.
    """
    check_documents(documents, settings)
    prompts = draw_prompts(documents, begin, settings)
    return greedy_texts((target, own), prompts, settings.new, min(settings.batch, len(prompts)))


def check_documents(documents: Sequence[np.ndarray], settings: EvaluationConfig) -> None:
    """Raise `ValueError` when no document is longer than a prompt."""
    if not any(len(document) > settings.prompt + 1 for document in documents):
        raise ValueError(f"no held-out file has more than {settings.prompt + 1} tokens; name longer ones (--held-out)")


def exit_agreement(
    heads: Sequence[ExitHeadConfig],
    target: LlamaConfig,
    params: Heads,
    own: Parameters,
    texts: np.ndarray,
    prompt: int,
    ends: Sequence[int],
    batch: int = 16,
) -> dict[str, dict[str, float]]:
    """For every head, the share of the target's own tokens among its best 1, 2, 4 and 8.

    Args:
        heads: Trained ones, and untrained ones (`target`) with no arrays in `params`.
        target: The target's geometry.
        params: The heads' arrays, float32.
        own: The target's parameters, float32.
        texts: As `target_texts` gives them.
        prompt: Tokens of a prompt.
        ends: Tokens that end a text; what stands after the first is not counted.
        batch: Texts at a time; those that do not fill a batch are left out.
    """
    trees = {head.name: jax.tree.map(jnp.asarray, params.get(head.name, {})) for head in heads}
    parts = [
        jax.device_get(_best(tuple(heads), target, trees, own, texts[at : at + batch]))
        for at in range(0, len(texts) - batch + 1, batch)
    ]
    return {
        head.name: count_agreement(np.concatenate([part[head.name] for part in parts]), texts, prompt, ends)
        for head in heads
    }
