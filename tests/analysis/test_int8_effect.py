"""Int8 against plain layers: the figures are of the logits given, and no float copy of the layers is made."""

import math

import numpy as np
import pytest

from pipedec_jax.analysis import int8_effect
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.parameters import layer_shapes
from pipedec_jax.model.random_source import RandomSource

CONFIG = LlamaConfig(
    vocab_size=97, width=64, feed_forward=128, layers=3, heads=4, kv_heads=2, head_size=16, context=256
)


@pytest.fixture(scope="module")
def source():
    return RandomSource(CONFIG, seed=3)


def test_logits_of_rounded_layers_are_near_and_not_the_same(source):
    prompts = [[1, 2, 3, 4], [5, 6]]
    expected = int8_effect.logits(source, prompts, "float32", 90)
    assert [found.shape for found in expected] == [(4, 90), (2, 90)]
    rounded = int8_effect.logits(int8_effect.int8_source(source), prompts, "float32", 90)
    difference = int8_effect.compare(rounded, expected)
    assert 0 < difference.typical < 0.05
    assert 0 < difference.divergence < 1e-3


def test_the_comparison_counts_every_position_of_every_prompt_once():
    theirs = [np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]])]
    ours = [theirs[0] + 7, np.log([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]) + 7]
    found = int8_effect.compare(ours, theirs)
    assert found.same_choice == pytest.approx(2 / 3)
    # One position of three, where (1/4, 1/2, 1/4) is taken for (1/2, 1/4, 1/4).
    assert found.divergence == pytest.approx(0.25 * np.log(2) / 3)
    assert int8_effect.compare(theirs, theirs) == int8_effect.LogitDifference(0, 0, 1, 0)


def test_the_decoding_loop_holds_no_float_copy_of_int8_layers(source):
    rounded = int8_effect.int8_source(source)
    speed = int8_effect.measure_speed(rounded, [[1, 2, 3]], "float32", 4, CONFIG.vocab_size)
    floats = 4 * sum(math.prod(shape) for shape in layer_shapes(CONFIG).values()) * CONFIG.layers
    assert speed.temporary_bytes < floats / 3
    assert speed.layer_bytes < floats / 3
    assert speed.tokens_per_s > 0
