"""A context of 32,768 tokens: at sampled positions the pipeline goes on as the oracle does."""

import numpy as np
import pytest

from tests import oracle, random_pairs
from tests.exactness import PREFILL, Bench, Shape
from tests.oracle import GREEDY, Draw
from tests.random_pairs import VOCAB, Pair, hugging_face_config, target_weights

CONTEXT = 32768
AFTER = 8
"""Tokens decoded after each sampled position."""
POSITIONS = (500, 4090, 16384, CONTEXT - AFTER)
"""Across borders of what attention reads, and up to the end of the context."""
LONG = hugging_face_config(
    4,
    max_position_embeddings=CONTEXT,
    rope_theta=500000.0,
    rope_scaling={
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)


@pytest.mark.slow
def test_decoding_goes_on_as_the_oracle_does_up_to_32768_tokens(monkeypatch):
    monkeypatch.setitem(random_pairs.GEOMETRIES, "long", LONG)
    monkeypatch.setitem(random_pairs.DRAFT_ROWS, "long", VOCAB)
    monkeypatch.setitem(PREFILL, "long", 128)
    pair = Pair("long", seed=4, noise=0.05)
    text = np.random.default_rng(4).integers(VOCAB, size=CONTEXT).tolist()
    model = oracle.Llama(LONG, target_weights(pair), np.float64, CONTEXT)
    bench = Bench(Shape("best-first", 2, 4, 4, "long", steps=2), longest=CONTEXT)
    compared, hits = 0, 0
    for position in POSITIONS:
        for token in text[model.length : position]:
            logits = model.feed(token)
        for draw in (GREEDY, Draw(0.8, seed=position)):
            expected = [oracle.choose(logits[:VOCAB], draw, model.length)]
            while len(expected) < AFTER:
                after = model.feed(expected[-1].token)
                expected.append(oracle.choose(after[:VOCAB], draw, model.length))
            model.length = position  # the text goes on as it was; what was appended is written over
            progress = bench.decode(pair, text[:position], AFTER, draw)
            assert progress.tokens == [step.token for step in expected]
            np.testing.assert_allclose(progress.logprobs, [step.log_prob for step in expected], atol=2e-6)
            compared, hits = compared + AFTER, hits + sum(progress.hits)
    print(f"{compared} tokens at {len(POSITIONS)} positions up to {CONTEXT}, {hits} of them hits, none differs")
    assert hits > 0


def test_a_position_past_the_context_is_refused_before_decoding(monkeypatch):
    monkeypatch.setitem(random_pairs.GEOMETRIES, "long", LONG)
    monkeypatch.setitem(PREFILL, "long", 128)
    bench = Bench(Shape("pp", 1, 1, 1, "long"), longest=CONTEXT)
    with pytest.raises(ValueError, match="exceed the target's context of 32768 tokens"):
        bench.decode(Pair("long"), [1] * (CONTEXT - AFTER), AFTER + 1)
