"""The replay drafter's hit rates, and the formula of a filled pipe in whole numbers."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from pipedec_jax.drafters.replay import Replay, ReplayDrafter
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.settings import EngineSettings
from tests import oracle
from tests.exactness import check_state, check_ticks
from tests.random_pairs import CONTEXT, VOCAB, as_source, hugging_face_config

NEW, PROMPT = 81, (3, 1, 4)
CONFIG = hugging_face_config(
    14, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1, head_dim=4
)
WIDTHS = {4: (1, 1), 8: (8, 2), 14: (5, 3)}
"""Width and children per stage count: the formula does not depend on them."""


@functools.cache
def weights() -> dict[str, np.ndarray]:
    """A target as small as 14 stages allow."""
    random = np.random.default_rng(0)
    found = {"model.embed_tokens.weight": random.normal(size=(VOCAB, 8)), "model.norm.weight": np.ones(8)}
    found["lm_head.weight"] = random.normal(size=(VOCAB, 8))
    shapes = {
        "self_attn.q_proj": (8, 8),
        "self_attn.k_proj": (4, 8),
        "self_attn.v_proj": (4, 8),
        "self_attn.o_proj": (8, 8),
        "mlp.gate_proj": (8, 8),
        "mlp.up_proj": (8, 8),
        "mlp.down_proj": (8, 8),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        for name, shape in shapes.items():
            found[f"model.layers.{layer}.{name}.weight"] = 0.3 * random.normal(size=shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{name}.weight"] = np.ones(8)
    return found


@functools.cache
def text() -> list[int]:
    """The prompt and what plain decoding makes of it."""
    model = oracle.Llama(CONFIG, weights(), np.float64, CONTEXT)
    return [*PROMPT, *(step.token for step in oracle.decode(model, PROMPT, NEW, vocab_size=VOCAB))]


def replay(rate: float) -> Replay:
    """Guesses that are right at exactly this share of the tokens after which hits are counted: all but the last."""
    misses = round((1 - rate) * (NEW - 1))
    token, place = np.zeros((2, CONTEXT), np.int32)
    token[: len(text())] = text()
    wrong = np.random.default_rng(misses).choice(NEW - 1, size=misses, replace=False)
    place[len(PROMPT) + wrong] = 99
    return Replay(token=token, place=place)


@functools.cache
def engine(stages: int) -> Engine:
    """One program per stage count."""
    width, children = WIDTHS[stages]
    return Engine(
        as_source(CONFIG, weights()),
        None,
        EngineSettings(method="pipedec", stages=stages, width=width, children=children),
        vocab_size=VOCAB,
        drafter=ReplayDrafter(children=children, vocab_size=VOCAB),
        drafter_params=replay(1),
    )


@pytest.mark.parametrize("rate", [0, 0.5, 0.8, 0.9, 0.95, 1])
@pytest.mark.parametrize("stages", WIDTHS)
def test_ticks_are_stages_plus_hits_plus_stages_times_misses(stages: int, rate: float) -> None:
    decoder = engine(stages)
    decoder.start(PROMPT, max_new_tokens=NEW, drafter_params=replay(rate))
    progress = decoder.run(NEW)
    check_state(decoder)
    check_ticks(progress, stages)
    assert progress.tokens == text()[len(PROMPT) :]
    hits = sum(progress.hits[:-1])
    misses = NEW - 1 - hits
    assert hits == round(rate * (NEW - 1))
    assert max(progress.delays) <= 1, "a late hit"
    assert progress.ticks[-1] == stages + hits + stages * misses


def test_a_replay_needs_no_rank_of_its_own() -> None:
    assert engine(4).devices == 4
    assert jax.device_count() >= 4
