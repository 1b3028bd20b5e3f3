"""What each device gets of a matrix over the vocabulary, and what is decided by what devices are."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.exit_head import ExitHead, ExitHeadConfig, head_shapes
from pipedec_jax.model.int8 import Int8Source
from pipedec_jax.model.parameters import MemorySource, initialize, nest
from pipedec_jax.pipeline import placement
from pipedec_jax.pipeline.placement import (
    bytes_per_device,
    least_rows,
    make_mesh,
    place_draft,
    place_exit_head,
    place_rows,
    place_target,
    replicate,
    row_sizes,
)
from pipedec_jax.pipeline.split import split_layers

CONFIG = LlamaConfig(vocab_size=31, width=16, feed_forward=24, layers=2, heads=2, kv_heads=1, head_size=8, context=32)


def mesh_of(platform: str) -> Any:
    """What is asked of a mesh of such devices."""
    return SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))


@pytest.mark.parametrize("block", [1, 100, 2**20])
@pytest.mark.parametrize(("ranks", "parts", "vocab_size"), [(3, 1, 50), (2, 2, 50), (8, 1, 9), (1, 1, 50)])
def test_slices_of_the_vocabulary_put_together_are_the_matrix_and_zeros(monkeypatch, block, ranks, parts, vocab_size):
    whole = np.arange(1.0, vocab_size * 6 + 1).reshape(vocab_size, 6)
    asked = []

    def read(rows):
        assert 0 <= rows.start < rows.stop <= vocab_size
        asked.append(rows.stop - rows.start)
        return whole[rows]

    monkeypatch.setattr(placement, "BLOCK_BYTES", block)
    monkeypatch.setattr(placement, "_aligned", lambda shape, dtype: np.full(shape, np.nan, dtype))
    found = place_rows(make_mesh(ranks, parts=parts), vocab_size, 6, np.float32, read)
    assert {shard.data.shape for shard in found.addressable_shards} == {(-(-vocab_size // (ranks * parts)), 6)}
    rows = np.asarray(found)
    np.testing.assert_array_equal(rows[:vocab_size], whole)
    np.testing.assert_array_equal(rows[vocab_size:], 0)
    assert sum(asked) == vocab_size, "each row is read once"
    assert max(asked) <= max(1, block // (6 * 4))


def test_parts_of_a_stage_follow_each_other_and_all_must_be_there():
    devices = jax.devices()
    assert make_mesh(3, devices, parts=2).devices.tolist() == [devices[:2], devices[2:4], devices[4:6]]
    with pytest.raises(ValueError, match=rf"this method needs {len(devices) + 1} devices .* there are {len(devices)}"):
        make_mesh(len(devices) + 1, devices)
    with pytest.raises(ValueError, match=r"this method needs 4 devices .* there are 3"):
        make_mesh(2, devices[:3], parts=2)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_an_int8_draft_stays_int8(dtype):
    source = Int8Source(MemorySource(CONFIG, initialize(CONFIG, jax.random.key(0))))
    (layer, *_) = place_draft(make_mesh(2), source, dtype).layers
    kinds = {name: array.dtype for name, array in layer.items()}
    assert {kinds[name] for name in ("query_key_value", "output", "gate_up", "down")} == {np.dtype(np.int8)}
    assert {kind for name, kind in kinds.items() if name.endswith("_scale")} == {np.dtype(np.float32)}
    assert {kind for name, kind in kinds.items() if name.endswith("_norm")} == {np.dtype(dtype)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("placed", [False, True])
def test_an_exit_head_has_its_own_arrays_and_else_the_targets(tied, placed):
    config, mesh = dataclasses.replace(CONFIG, tied_embeddings=tied), make_mesh(2)
    source = MemorySource(config, jax.tree.map(np.asarray, initialize(config, jax.random.key(0))))
    target = place_target(mesh, source, split_layers(2, 2), np.float32) if placed else None
    head = source.read("embedding") if tied else source.read("head").T
    plain = place_exit_head(mesh, ExitHead(ExitHeadConfig(1, "target"), {}), source, np.float32, target)
    np.testing.assert_array_equal(plain.final_norm, source.read("final_norm"))
    np.testing.assert_array_equal(plain.head[: CONFIG.vocab_size], head)
    assert plain.layers == {}
    own_config = ExitHeadConfig(1, "norm-linear")
    own = nest({path: np.full(shape, 2.0) for path, shape in head_shapes(own_config, config).items()})
    placed_own = place_exit_head(mesh, ExitHead(own_config, own), source, np.float32, target)
    np.testing.assert_array_equal(placed_own.final_norm, own["final_norm"])
    np.testing.assert_array_equal(placed_own.head[: CONFIG.vocab_size], own["head"].T)
    assert placed_own.layers == {}


def test_an_array_that_two_parts_share_is_counted_once():
    mesh = make_mesh(2)
    one, two = (replicate(mesh, np.zeros(size, np.float32)) for size in (3, 5))
    assert bytes_per_device({"embedding": one, "head": one, "norm": two}) == dict.fromkeys(jax.devices()[:2], 4 * 8)


def test_rows_are_padded_and_programs_doubled_where_the_platform_gains_by_it():
    assert [least_rows(mesh_of(platform)) for platform in ("cpu", "gpu", "tpu")] == [1, 2, 2]
    assert [row_sizes(mesh_of("cpu"), width) for width in (1, 2, 8)] == [(1,), (1, 2), (1, 8)]
    assert [row_sizes(mesh_of(platform), 8) for platform in ("gpu", "tpu")] == [(8,), (8,)]
