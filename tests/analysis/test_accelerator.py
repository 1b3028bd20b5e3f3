"""One device's decoding is measured on the engine's own ticks, and a profile adds up; no time is asserted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipedec_jax.analysis import accelerator
from pipedec_jax.analysis.profile import add_up, profile_host
from pipedec_jax.model import random_source
from pipedec_jax.model.int8 import Int8Source
from pipedec_jax.model.parameters import parameter_shapes
from pipedec_jax.pipeline.settings import EngineSettings
from tests.analysis.test_tick_cost import CONFIG


@pytest.fixture
def source(monkeypatch):
    monkeypatch.setattr(random_source, "POOL", 1009)
    return random_source.RandomSource(CONFIG)


def test_bandwidths_are_those_of_the_bytes_moved():
    found = accelerator.measure_bandwidth(array_bytes=4096, passes=2, repeats=1)
    assert found.copy > 0
    assert found.read > 0


def test_a_setting_is_measured_with_its_rows_and_the_bytes_of_layers_and_head(source):
    settings = [EngineSettings(stages=1, width=3, children=3, prefill_width=8, dtype="float32")]
    seen = []
    found = list(
        accelerator.measure_decoding(
            source, settings, tokens=8, repeats=1, around=lambda one, decode: seen.append((one.width, decode()))
        )
    )
    assert [one.width for one in found] == [width for width, _ in seen] == [3]
    shapes = parameter_shapes(CONFIG)
    read = 4 * sum(int(np.prod(shape)) for path, shape in shapes.items() if path != "embedding")
    for one in found:
        assert one.weight_bytes == read
        assert one.tokens_per_tick == 1  # one stage, one level a tick
        assert one.bytes_per_s == read / one.tick_s
        assert one.fixed_s == one.tick_s - one.compute_s


def test_random_weights_have_every_shape_and_parts_are_parts_of_the_whole(source):
    for path, shape in parameter_shapes(CONFIG).items():
        whole = source.read(path)
        assert whole.shape == shape
        assert np.array_equal(source.read(path, (slice(1, 3),)), whole[1:3])
    assert not np.array_equal(source.read("layers/0/query"), source.read("layers/1/query"))
    assert 0.015 < source.read("embedding").astype(np.float32).std() < 0.025


def test_a_matrix_larger_than_the_noise_repeats_it(source):
    config = dataclasses.replace(CONFIG, vocab_size=1009)
    flat = random_source.RandomSource(config).read("embedding").ravel()
    assert flat.size == 16 * 1009
    assert np.array_equal(flat[:1009], flat[-1009:])


def test_random_weights_can_be_rounded_to_int8_but_not_made_so(source):
    assert Int8Source(source).read("layers/0/query").dtype == np.int8
    with pytest.raises(ValueError, match="without int8"):
        random_source.RandomSource(dataclasses.replace(CONFIG, int8=True))


def test_a_profile_counts_what_overlaps_once():
    found = add_up([("a", 10, 5), ("b", 12, 6), ("a", 30, 10)])
    assert found.kernels == 3
    assert found.span == pytest.approx(30e-9)
    assert found.busy == pytest.approx(18e-9)
    assert list(found.by_name) == ["a", "b"]
    assert found.by_name["a"] == (2, pytest.approx(15e-9))


def test_operations_on_the_host_are_added_up_without_their_numbers():
    matrices = [jnp.ones((64, 64), jnp.float32, device=jax.devices("cpu")[0]) for _ in range(2)]
    run = jax.jit(lambda one, two: jnp.sin(one @ two) @ two)
    jax.block_until_ready(run(*matrices))
    found = profile_host(lambda: run(*matrices))
    assert found
    assert not any(name.startswith("$") or name[-1].isdigit() for name in found)
    times = [seconds for _, seconds in found.values()]
    assert times == sorted(times, reverse=True)
