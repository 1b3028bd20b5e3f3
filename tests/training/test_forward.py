import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipedec_jax.config import LlamaConfig, YarnScaling
from pipedec_jax.model import llama
from pipedec_jax.model.parameters import flatten, initialize, nest, parameter_shapes
from pipedec_jax.training.attention import causal_attention
from pipedec_jax.training.forward import forward
from pipedec_jax.training.generate import generate, score

CONFIG = LlamaConfig(
    vocab_size=96, width=32, feed_forward=48, layers=3, heads=4, kv_heads=2, head_size=8, context=64
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    # Four times the usual weights, so that attention is far from uniform.
    return jax.jit(lambda key: jax.tree.map(lambda x: 4 * x, initialize(CONFIG, key)))(jax.random.key(0))


@pytest.fixture(scope="module")
def token_BT():
    return jax.random.randint(jax.random.key(1), (2, 16), 0, CONFIG.vocab_size, dtype=jnp.int32)


@pytest.mark.parametrize("size", [1.0, 300.0])
@pytest.mark.parametrize("block", [4, 6, 128])
def test_blocks_of_causal_attention_equal_masked_attention(block, size):
    """Also where scores reach hundreds, as those of trained models do, and in the gradients."""
    query, key, value = (
        jax.random.normal(jax.random.key(number), (2, 16, heads, 8)) for number, heads in enumerate((4, 2, 2))
    )
    query = size * query
    mask = jnp.tril(jnp.ones((16, 16), bool))

    def masked(query, key, value):
        # The model keeps keys with positions last and values with heads first.
        return llama.attention(query, jnp.moveaxis(key, -3, -1), jnp.swapaxes(value, -3, -2), mask)

    def gradients(attend):
        return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), argnums=(0, 1, 2)))(query, key, value)

    expected = jax.jit(masked)(query, key, value)
    found = jax.jit(causal_attention, static_argnums=3)(query, key, value, block)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    for one, two in zip(gradients(lambda *x: causal_attention(*x, block)), gradients(masked), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4 * size)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, rope_scaling=YarnScaling(4.0, 8, attention_factor=1.5)),
        dataclasses.replace(CONFIG, attention_bias=True, feed_forward_bias=True),
    ],
    ids=["plain", "yarn", "biases"],
)
def test_logits_and_gradients_equal_those_of_the_model(config, params, token_BT):
    noise, flat = jax.random.key(2), dict(flatten(params))
    shapes = parameter_shapes(config)
    params = nest({path: flat[path] if path in flat else jax.random.normal(noise, shapes[path]) for path in shapes})

    def total(logits):
        return jnp.sum(jnp.sin(logits))

    expected, slope = jax.jit(jax.value_and_grad(lambda tree: total(llama.forward(config, tree, token_BT))))(params)
    found, fast_slope = jax.jit(jax.value_and_grad(lambda tree: total(forward(config, tree, token_BT, 4))))(params)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, atol=1e-4 * float(jnp.abs(two).max())), fast_slope, slope
    )


def test_generated_text_and_choices_equal_those_of_the_model_without_a_cache(params, token_BT):
    temperature = jnp.asarray([0.0, 1.0], jnp.float32)
    token, choice, log_prob = generate(CONFIG, params, token_BT, 10, temperature, 4, jax.random.key(3))
    expected = np.asarray(jnp.argmax(jax.jit(llama.forward, static_argnums=0)(CONFIG, params, token), axis=-1))
    np.testing.assert_array_equal(token[:, :16], token_BT)
    np.testing.assert_array_equal(token[0, 16:], expected[0, 15:-1])
    assert (np.asarray(token[1, 16:]) != expected[1, 15:-1]).any()
    again, again_log_prob = score(CONFIG, params, token[:, :-1], 4)
    assert (np.asarray(choice) == np.asarray(again)).mean() > 0.98
    np.testing.assert_allclose(log_prob.astype(jnp.float32), again_log_prob.astype(jnp.float32), atol=0.02)
