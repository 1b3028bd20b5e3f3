"""Int8 layers: how weights are rounded, and that the model computes what its dequantized weights say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints_convert.hugging_face import tensor_name, to_hugging_face
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model import int8, llama
from pipedec_jax.model.int8 import DequantizedSource, Int8Source, channel_scales, dequantize, quantize
from pipedec_jax.model.parameters import initialize, input_axes, nest, parameter_count, parameter_shapes
from pipedec_jax.modeled.cost import layer_bytes
from tests import oracle, random_pairs

PAIR = random_pairs.PAIRS[random_pairs.FIVE][0]
SOURCE = random_pairs.as_source(PAIR.target_config, random_pairs.target_weights(PAIR))
CONFIG = SOURCE.config


@given(st.data())
def test_weights_are_rounded_to_the_nearest_step_of_their_channel(data):
    name = data.draw(st.sampled_from(["query", "output", "down"]))
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2 if name == "down" else 3, max_size=3)))
    shape = shape[:2] if name == "down" else shape
    noise = np.random.default_rng(data.draw(st.integers(0, 99)))
    weight = (noise.normal(size=shape) * 10.0 ** noise.integers(-6, 6, shape[input_axes(name) :])).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "BLOCK_BYTES", data.draw(st.sampled_from([1, 40, 2**20])))
        scale = channel_scales(weight, name)
        quantized = quantize(weight, scale)
    assert (quantized.dtype, quantized.shape, scale.dtype) == (np.int8, shape, np.float32)
    inputs = tuple(range(input_axes(name)))
    assert np.array_equal(np.abs(quantized).max(axis=inputs), np.full(scale.shape, 127))
    error = np.abs(dequantize(quantized, scale, np.float64) - weight)
    assert np.all(error <= np.broadcast_to(scale, shape) * (0.5 + 1e-6))


def test_a_channel_of_zeros_stays_zero_and_what_is_not_finite_is_refused():
    weight = np.asarray([[0.0, 1e-37, 1.0], [0.0, 0.0, -2.0]], np.float32)
    scale = channel_scales(weight, "gate")
    assert quantize(weight, scale).tolist() == [[0, 0, 64], [0, 0, -127]]
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="'layers/0/gate' has values that are not finite numbers, which int8"):
            channel_scales(np.asarray([[1.0], [value]]), "layers/0/gate")


@given(st.data())
def test_a_part_of_an_int8_array_is_what_slicing_gives(data):
    source = Int8Source(SOURCE)
    path = data.draw(st.sampled_from(list(parameter_shapes(source.config))))
    whole = source.read(path)
    ends = [sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2))) for size in whole.shape]
    part = tuple(slice(*pair) for pair in ends)
    fresh = Int8Source(SOURCE) if data.draw(st.booleans()) else source
    assert np.array_equal(fresh.read(path, part), whole[part])
    plain = DequantizedSource(source, np.float32)
    if not path.endswith("_scale"):
        assert np.array_equal(plain.read(path, part), plain.read(path)[part])
    assert np.array_equal(Int8Source(source).read(path, part), whole[part]), "int8 already: passed on"


def dequantized_oracle(source) -> oracle.Llama:
    """The oracle over NumPy's products of the int8 values and their scales, in float64."""
    weights = {}
    plain = DequantizedSource(source, np.float64)
    for path in parameter_shapes(CONFIG):
        weights[tensor_name(path)] = np.asarray(to_hugging_face(path, np.asarray(plain.read(path), np.float64)))
    return oracle.Llama(PAIR.target_config, weights, np.float64, random_pairs.CONTEXT)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_logits_are_those_of_the_dequantized_weights_in_numpy(dtype, x64):
    source = Int8Source(SOURCE)
    prompt = random_pairs.prompt_of(40, 0)
    model = dequantized_oracle(source)
    expected = np.stack([model.feed(token) for token in prompt])
    tree = nest({path: source.read(path) for path in parameter_shapes(source.config)})
    tree = jax.tree.map(lambda x: jnp.asarray(x, x.dtype if x.dtype in (np.int8, np.float32) else dtype), tree)
    found = np.asarray(jax.jit(lambda tree, x: llama.forward(source.config, tree, x))(tree, jnp.asarray([prompt])))[0]
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < {"float64": 1e-13, "bfloat16": 0.2}[dtype]
    # The rounding itself is seen: the plain model is further away.
    plain = random_pairs.oracle_model(PAIR, "float64")
    plain.reset()
    original = np.stack([plain.feed(token) for token in prompt])
    assert np.abs(original - expected).max() / np.abs(expected).max() > 1e-3


def test_sizes_count_what_is_held():
    config = dataclasses.replace(CONFIG, int8=True)
    assert parameter_count(config) == parameter_count(CONFIG)
    D, F, Q, G = config.width, config.feed_forward, config.heads, config.kv_heads
    channels = (Q + 2 * G) * config.head_size + 2 * F + 2 * D
    assert layer_bytes(config, 2) == (layer_bytes(CONFIG, 2) - 2 * 2 * D) // 2 + 2 * 2 * D + 4 * channels
    assert LlamaConfig.from_dict(config.to_dict()) == config
    assert "int8" not in CONFIG.to_dict()
    with pytest.raises(ValueError, match="int8 must be true or false, not 1"):
        dataclasses.replace(CONFIG, int8=1)
    with pytest.raises(ValueError, match="initialize it without int8"):
        initialize(config, jax.random.key(0))
