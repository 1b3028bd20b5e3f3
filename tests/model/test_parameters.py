"""The parameter tree: random weights, how arrays lie on devices, and trees that do not fit a geometry."""

import dataclasses

import flax
import jax
import numpy as np
import pytest

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.parameters import (
    MemorySource,
    flatten,
    initialize,
    nest,
    parameter_shapes,
)

CONFIG = LlamaConfig(vocab_size=80, width=24, feed_forward=48, layers=8, heads=4, kv_heads=2, head_size=6, context=64)


def test_random_weights_have_the_stated_spread_and_no_two_arrays_are_alike():
    config = dataclasses.replace(CONFIG, layers=2, attention_bias=True, feed_forward_bias=True)
    flat = {path: np.asarray(array) for path, array in flatten(initialize(config, jax.random.key(0)))}
    assert {path: array.shape for path, array in flat.items()} == parameter_shapes(config)
    for path, array in flat.items():
        if array.ndim == 1 or path.endswith("_bias"):
            assert np.all(array == (0 if path.endswith("_bias") else 1)), path
        else:
            # Two sums a layer: what each adds shrinks with the root of their number.
            expected = 0.02 / 2 if path.endswith(("output", "down")) else 0.02
            assert array.std() == pytest.approx(expected, rel=0.2), path
    firsts = [array.reshape(-1)[:4].tolist() for array in flat.values() if array.ndim > 1 and array.any()]
    assert len(np.unique(np.abs(firsts) / np.linalg.norm(firsts, axis=1, keepdims=True), axis=0)) == len(firsts)


def test_a_tree_that_does_not_fit_the_geometry_is_refused():
    arrays = {path: np.arange(np.prod(shape)).reshape(shape) for path, shape in parameter_shapes(CONFIG).items()}
    source = MemorySource(CONFIG, nest(arrays))
    part = (slice(1, 3), slice(2, 3), slice(0, 6))
    np.testing.assert_array_equal(source.read("layers/3/query", part), arrays["layers/3/query"][1:3, 2:3])
    np.testing.assert_array_equal(source.read("layers/3/query"), arrays["layers/3/query"])
    for changes, message in (
        ({"layers/8/up": arrays["layers/7/up"]}, r"unknown arrays \['layers/8/up'\]"),
        ({"layers/7/up": arrays["layers/7/up"].T}, r"'layers/7/up' has shape \(48, 24\), .* asks for \(24, 48\)"),
    ):
        with pytest.raises(ValueError, match=message):
            MemorySource(CONFIG, nest(arrays | changes))
    with pytest.raises(ValueError, match=r"lacks 'embedding': give what is under 'params'"):
        MemorySource(CONFIG, {"params": nest(arrays)})
    del arrays["layers/7/up"]
    with pytest.raises(ValueError, match="lacks 'layers/7/up'"):
        MemorySource(CONFIG, nest(arrays))


def test_a_frozen_tree_serves_too():
    tree = initialize(CONFIG, jax.random.key(0))
    source = MemorySource(CONFIG, flax.core.freeze(tree))
    np.testing.assert_array_equal(source.read("layers/1/up"), tree["layers"]["1"]["up"])
