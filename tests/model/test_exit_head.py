import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipedec_jax.config import LlamaConfig, check_exit
from pipedec_jax.model import llama
from pipedec_jax.model.exit_head import ExitHeadConfig, head_shapes, initialize_head, step_weights
from pipedec_jax.model.parameters import flatten, nest, parameter_shapes
from pipedec_jax.training.exits import head_logits
from pipedec_jax.training.forward import hidden_after
from tests.whole_exit import exit_logits

TARGET = LlamaConfig(vocab_size=64, width=16, feed_forward=24, layers=4, heads=4, kv_heads=2, head_size=8, context=64)
HEADS = [
    ExitHeadConfig(2, "target"),
    ExitHeadConfig(2, "norm-linear"),
    ExitHeadConfig(2, "norm-linear", tied=True),
    ExitHeadConfig(2, "block"),
    ExitHeadConfig(2, "block", width=8, feed_forward=12),
]
B, T = 2, 16


@pytest.fixture(scope="module")
def own():
    noise = np.random.default_rng(0)
    shapes = parameter_shapes(TARGET)
    return nest({path: jnp.asarray(noise.normal(0, 0.1, shape), jnp.float32) for path, shape in shapes.items()})


@pytest.fixture(scope="module")
def token_BT():
    return np.random.default_rng(1).integers(0, TARGET.vocab_size, (B, T)).astype(np.int32)


def make(head, own):
    """The head's first arrays, moved a little so that norms and identity maps count."""
    noise = np.random.default_rng(2)
    params = initialize_head(head, TARGET, own, seed=0)
    return jax.tree.map(lambda x: x + jnp.asarray(noise.normal(0, 0.2, x.shape), x.dtype), params)


def test_the_untrained_head_gives_the_logits_of_the_model_cut_off_at_the_exit(own, token_BT):
    head = ExitHeadConfig(3, "target")
    shallow = own | {"layers": {str(index): own["layers"][str(index)] for index in range(3)}}
    model = LlamaConfig(**(TARGET.to_dict() | {"layers": 3}))
    expected = jax.jit(llama.forward, static_argnums=0)(model, shallow, token_BT)
    found, cache = jax.jit(lambda: exit_logits(head, TARGET, {}, own, token_BT))()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert cache is None


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.name)
def test_training_computes_the_logits_of_the_engine(head, own, token_BT):
    params = make(head, own)
    expected, cache = jax.jit(lambda: exit_logits(head, TARGET, params, own, token_BT))()

    def fast():
        rows = hidden_after(TARGET, own, token_BT, [head.exit_layer])[head.exit_layer]
        return head_logits(head, TARGET, params, own, rows, (B, T))

    np.testing.assert_allclose(np.reshape(jax.jit(fast)(), expected.shape), expected, atol=2e-4)
    assert (cache is not None) == (head.variant == "block")
    if cache is not None:  # One more layer of the target's cache.
        assert [part.shape for part in cache] == [(B, T, TARGET.kv_heads, TARGET.head_size)] * 2


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.name)
def test_a_new_head_has_the_stated_arrays_and_weights(head, own):
    params = initialize_head(head, TARGET, own, seed=0)
    shapes = {path: value.shape for path, value in flatten(params)}
    assert shapes == head_shapes(head, TARGET)
    # Without a map a tied norm-linear head could learn a norm's weights alone.
    assert ("map" in shapes) == (head.width is not None or (head.tied and head.variant == "norm-linear"))
    counted = step_weights(head, TARGET)
    own_head = "head" in params
    expected = sum(value.size for value in jax.tree.leaves(params)) + (0 if own_head else 16 * 64)
    if head.variant == "target":
        expected += 16  # The target's own final norm.
    assert counted["path"] + counted["vocabulary"] == expected


def test_random_weights_of_heads_depend_on_seed_and_name(own):
    def first(exit_layer, seed):
        head = ExitHeadConfig(exit_layer, "block", width=8)
        return np.asarray(initialize_head(head, TARGET, own, seed)["layers"]["0"]["up"])

    np.testing.assert_array_equal(first(1, 0), first(1, 0))
    assert not np.array_equal(first(1, 0), first(2, 0)), "heads of one run do not begin alike"
    assert not np.array_equal(first(1, 0), first(1, 1))


def test_the_untrained_head_reads_a_norm_and_the_vocabulary():
    assert step_weights(ExitHeadConfig(2, "target"), TARGET) == {"path": 16, "vocabulary": 16 * 64}
    assert step_weights(ExitHeadConfig(2, "norm-linear"), TARGET) == {"path": 16, "vocabulary": 16 * 64}


def test_a_new_tied_head_begins_as_the_untrained_one(own, token_BT):
    head = ExitHeadConfig(2, "norm-linear", tied=True)
    params = initialize_head(head, TARGET, own, seed=0)
    params["final_norm"] = jnp.ones(16)  # The map's norm has the final norm's weights already.
    plain = {"final_norm": jnp.ones(16)} | {name: own[name] for name in ("embedding", "head", "layers")}
    params["map_norm"] = jnp.ones(16)
    found, _ = jax.jit(lambda: exit_logits(head, TARGET, params, own, token_BT))()
    expected, _ = jax.jit(lambda: exit_logits(ExitHeadConfig(2, "target"), TARGET, {}, plain, token_BT))()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"exit_layer": 0}, "positive whole number"),
        ({"exit_layer": 2, "variant": "mlp"}, "choose one of target, norm-linear, block"),
        ({"exit_layer": 2, "width": -4}, "width"),
        ({"exit_layer": 2, "variant": "target", "tied": True}, "untrained"),
        ({"exit_layer": 2, "feed_forward": 8}, "leave it out"),
        ({"exit_layer": 2, "tied": True, "width": 8}, "leave width out"),
        ({"exit_layer": 2, "widht": 8}, "did you mean 'width'"),
    ],
)
def test_a_head_that_cannot_be_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ExitHeadConfig.from_dict(values)


def test_an_exit_outside_the_target_is_refused():
    with pytest.raises(ValueError, match="choose 1 to 3"):
        ExitHeadConfig(4).check(TARGET)


def test_an_exit_has_layers_on_both_sides():
    check_exit(1, 2)
    for exit_layer, layers, choice in (
        (0, 4, "choose 1 to 3"),
        (4, 4, "choose 1 to 3"),
        (1, 1, "of one layer has no exit"),
    ):
        with pytest.raises(ValueError, match=f"exit layer {exit_layer} lies not inside .* {choice}"):
            check_exit(exit_layer, layers)
