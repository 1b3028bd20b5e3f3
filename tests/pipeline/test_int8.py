"""The pipe with int8 layers: the tokens of one device, and of plain decoding with the dequantized weights."""

import jax
import numpy as np
import pytest

from pipedec_jax.model.int8 import Int8Source
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.settings import EngineSettings
from tests import oracle, random_pairs
from tests.model.test_int8 import PAIR, SOURCE, dequantized_oracle

NEW = 40


@pytest.fixture(scope="module")
def engines():
    draft = random_pairs.as_source(PAIR.draft_config, random_pairs.draft_weights(PAIR))
    target = Int8Source(SOURCE)
    sizes = {"dtype": np.dtype(np.float64), "prefill_width": 16, "capacity": 256}
    with jax.enable_x64(True):
        one = Engine(target, None, EngineSettings(method="pp", stages=1, **sizes), vocab_size=random_pairs.VOCAB)
        settings = EngineSettings(method="pipedec", stages=3, width=4, children=4, **sizes)
        # The draft's layers are int8 as well.
        yield one, Engine(target, Int8Source(draft), settings, vocab_size=random_pairs.VOCAB)


@pytest.mark.parametrize(("length", "seed"), [(1, 0), (23, 1), (40, 2)])
def test_three_stages_give_the_tokens_of_one_and_of_the_dequantized_weights_in_numpy(length, seed, engines, x64):
    prompt = random_pairs.prompt_of(length, seed)
    found = []
    for engine in engines:
        engine.start(prompt, max_new_tokens=NEW)
        found.append(engine.run(NEW))
    model = dequantized_oracle(Int8Source(SOURCE))
    steps = oracle.decode(model, prompt, NEW, oracle.GREEDY, vocab_size=random_pairs.VOCAB)
    expected = [step.token for step in steps]
    assert found[0].tokens == expected
    assert found[1].tokens == expected
    assert np.allclose(found[0].logprobs, found[1].logprobs, atol=2e-6)
    assert 0.1 < np.mean(found[1].hits) < 1


def test_each_rank_holds_its_layers_in_int8(engines):
    for engine in engines:
        for layer in engine.weights.target.layers:
            assert layer["query_key_value"].dtype == layer["down"].dtype == np.int8
            assert layer["query_key_value_scale"].dtype == np.float32
            assert layer["attention_norm"].dtype == np.float64
    config = SOURCE.config
    matrices = 2 * config.width * (config.heads + config.kv_heads) * config.head_size
    matrices += 3 * config.width * config.feed_forward
    channels = (config.heads + 2 * config.kv_heads) * config.head_size + 2 * config.feed_forward + 2 * config.width
    layer = matrices + 4 * channels + 2 * 8 * config.width
    assert [row["target layers"] for row in engines[1].bytes_per_device()] == [2 * layer] * 4
