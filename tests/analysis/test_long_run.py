"""A long run counts ticks and finds what differs."""

import jax
import jax.numpy as jnp
import pytest

from pipedec_jax.analysis.long_run import differing, long_run
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.settings import EngineSettings
from tests.random_pairs import FIVE, PAIRS, VOCAB, as_source, target_weights


def test_what_differs_is_counted_from_the_first_token_on():
    assert differing([1, 2, 3], [1, 2, 3]) == 0
    assert differing([1, 9, 3], [1, 2, 3]) == 2
    assert differing([1, 2], [1, 2, 3]) == 1


@pytest.mark.slow
def test_answers_fill_the_cache_and_are_plain_decodings():
    pair = PAIRS[FIVE][0]
    with jax.enable_x64(True):
        source = as_source(pair.target_config, target_weights(pair))
        both = {"dtype": jnp.dtype("float64"), "capacity": 200}
        settings = EngineSettings(method="best-first", stages=2, width=2, children=2, **both)
        engine = Engine(source, None, settings, vocab_size=VOCAB, drafter="ngram")
        plain = Engine(source, None, EngineSettings(method="pp", stages=1, **both), vocab_size=VOCAB)
        answers = list(long_run(engine, plain, ticks=400, temperature=0.8))
    assert sum(answer.ticks for answer in answers) >= 400 > sum(answer.ticks for answer in answers[:-1])
    assert all(answer.differing == 0 and answer.tokens > 100 for answer in answers)
