"""Layers as devices hold them: which arrays lie side by side, and that a layer computes the same in either form."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model import llama
from pipedec_jax.model.held import held_names, held_shapes, hold
from pipedec_jax.model.int8 import Int8Source
from pipedec_jax.model.parameters import MemorySource, initialize, layer_shapes

CONFIG = LlamaConfig(vocab_size=80, width=24, feed_forward=50, layers=1, heads=4, kv_heads=2, head_size=6, context=64)


def test_matrices_that_multiply_the_same_rows_are_one():
    shapes = held_shapes(CONFIG)
    assert list(shapes.items()) == [
        ("attention_norm", (24,)),
        ("query_key_value", (24, 48)),
        ("output", (24, 24)),
        ("feed_forward_norm", (24,)),
        ("gate_up", (24, 100)),
        ("down", (50, 24)),
    ]
    int8 = dataclasses.replace(CONFIG, int8=True)
    scales = {name: shape for name, shape in held_shapes(int8).items() if name not in shapes}
    assert scales == {
        "query_key_value_scale": (48,),
        "output_scale": (24,),
        "gate_up_scale": (100,),
        "down_scale": (24,),
    }
    assert held_names(int8)["query_key_value_scale"] == ["query_scale", "key_scale", "value_scale"]
    assert sorted(itertools.chain(*held_names(int8).values())) == sorted(layer_shapes(int8))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_held_layer_computes_what_the_stored_one_does(int8, bias):
    config = dataclasses.replace(CONFIG, attention_bias=bias, feed_forward_bias=bias)
    tree = jax.tree.map(lambda x: x + 0.1, initialize(config, jax.random.key(0)))  # no bias is 0
    source = MemorySource(config, tree)
    source = Int8Source(source) if int8 else source
    stored = {name: source.read(f"layers/0/{name}") for name in layer_shapes(source.config)}
    held = hold(source.config, stored)
    assert {name: array.shape for name, array in held.items()} == held_shapes(source.config)
    x = jax.random.normal(jax.random.key(1), (5, CONFIG.width))
    rope = llama.rope_tables(CONFIG, jnp.arange(5), jnp.float32)
    seen = []

    def attend(query, key, value):
        seen.append((query, key, value))
        return llama.attention(query, jnp.moveaxis(key, 0, 2), jnp.swapaxes(value, 0, 1), jnp.tri(5, dtype=bool)), None

    expected, _ = llama.forward_layer(source.config, stored, x, rope, attend)
    found, _ = llama.forward_layer(source.config, held, x, rope, attend)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)
    for one, other in zip(*seen, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6)
