"""The Flax module is the pure functions under a familiar name."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints_convert
import pipedec_jax
from pipedec_jax import Llama
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.int8 import Int8Source
from pipedec_jax.model.llama import forward
from pipedec_jax.model.parameters import MemorySource, flatten, initialize, parameter_shapes, read_tree

CONFIG = LlamaConfig(vocab_size=31, width=16, feed_forward=24, layers=2, heads=2, kv_heads=1, head_size=8, context=32)


def test_module_has_the_converted_checkpoints_parameter_tree():
    variables = Llama(CONFIG).init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
    shapes = {path: leaf.shape for path, leaf in flatten(variables["params"])}
    assert shapes == parameter_shapes(CONFIG)


def test_parts_of_a_random_tree_are_those_of_the_whole():
    whole = initialize(CONFIG, jax.random.key(1))
    for name, part in whole.items():
        alone = initialize(CONFIG, jax.random.key(1), only=name)
        assert alone.keys() == {name}
        assert jax.tree.all(jax.tree.map(jnp.array_equal, alone[name], part))


def test_module_computes_what_the_pure_function_computes():
    token_BT = jnp.asarray([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], jnp.int32)
    params = initialize(CONFIG, jax.random.key(1))
    logits = Llama(CONFIG).apply({"params": params}, token_BT)
    assert logits.shape == (2, 5, 31)
    assert jnp.array_equal(logits, forward(CONFIG, params, token_BT))


def test_a_checkpoint_is_applied_as_it_is_read(family):
    checkpoint = checkpoints_convert.open_any(family["draft"])
    token_BT = jnp.asarray([[3, 1, 4, 1, 5]], jnp.int32)
    params = checkpoint.read_all()
    logits = Llama(checkpoint.config).apply({"params": params}, token_BT)
    assert logits.shape == (1, 5, checkpoint.config.vocab_size)
    assert jnp.array_equal(logits, forward(checkpoint.config, jax.tree.map(jnp.asarray, params), token_BT))


def test_a_checkpoint_is_applied_in_a_compiled_function_too(family):
    """Its arrays are NumPy's, which traced tokens cannot index."""
    checkpoint = checkpoints_convert.open_any(family["draft"])
    module, params = Llama(checkpoint.config), checkpoint.read_all()
    token_BT = jnp.asarray([[3, 1, 4, 1, 5]], jnp.int32)
    compiled = jax.jit(lambda token_BT: module.apply({"params": params}, token_BT))(token_BT)
    np.testing.assert_allclose(compiled, module.apply({"params": params}, token_BT), rtol=1e-5, atol=1e-5)


def test_a_tree_that_was_trained_further_is_decoded_with(family):
    """As README says: the module's gradients, a model over the tree in memory, and the same through a directory."""
    checkpoint, published = checkpoints_convert.open_any(family["draft"]), pipedec_jax.load(family["draft"])
    config, module = checkpoint.config, Llama(checkpoint.config)
    tree = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), checkpoint.read_all())
    token_BT = jnp.asarray([[3, 1, 4, 1, 5]], jnp.int32)

    def loss(tree):
        return -jnp.mean(jax.nn.log_softmax(module.apply({"params": tree}, token_BT))[..., 7])

    tree = jax.tree.map(lambda array, slope: array - slope, tree, jax.grad(loss)(tree))
    model = pipedec_jax.Model.from_tree(config, tree, published.tokenizer)
    assert model.dtype == "float32"
    found = pipedec_jax.Decoder(model, method="pp", stages=1, dtype="float32").generate(
        [3, 1, 4, 1, 5], max_new_tokens=1
    )
    logits = module.apply({"params": tree}, token_BT)
    assert found.token_ids == [int(jnp.argmax(logits[0, -1, : model.vocab_size]))] == [7]


def test_a_tree_that_is_none_of_the_models_is_refused(family):
    published = pipedec_jax.load(family["draft"])
    with pytest.raises(ValueError, match="the parameter tree lacks"):
        pipedec_jax.Model.from_tree(published.config, {}, published.tokenizer)


def test_a_parameter_of_another_shape_is_refused():
    params = initialize(CONFIG, jax.random.key(1)) | {"final_norm": jnp.ones(3)}
    with pytest.raises(flax.errors.ScopeParamShapeError, match="final_norm"):
        Llama(CONFIG).apply({"params": params}, jnp.zeros((1, 3), jnp.int32))


@pytest.mark.parametrize("tokens", [[[1, 2]], np.zeros((1, 3)), np.zeros((1, 0), np.int32), np.array(3)])
def test_tokens_that_are_none_are_refused(tokens):
    with pytest.raises(ValueError, match=r"Llama takes an array of whole token ids \[B, T\], not "):
        Llama(CONFIG).init(jax.random.key(0), tokens)


def test_a_model_of_int8_layers_is_applied_too():
    source = Int8Source(MemorySource(CONFIG, initialize(CONFIG, jax.random.key(1))))
    params = read_tree(source)
    token_BT = jnp.asarray([[3, 1, 4, 1, 5]], jnp.int32)
    logits = Llama(source.config).apply({"params": params}, token_BT)
    assert jnp.array_equal(logits, forward(source.config, params, token_BT))
    with pytest.raises(ValueError, match="made from plain weights"):
        Llama(source.config).init(jax.random.key(0), token_BT)
