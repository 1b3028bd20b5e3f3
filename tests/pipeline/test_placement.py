"""What each device gets of a matrix over the vocabulary, and what is decided by what devices are."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from pipedec_jax.pipeline import placement
from pipedec_jax.pipeline.placement import bytes_per_device, least_rows, make_mesh, place_rows, replicate, row_sizes


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
    assert len({shard.data.shape for shard in found.addressable_shards}) == 1
    rows = np.asarray(found)
    np.testing.assert_array_equal(rows[:vocab_size], whole)
    np.testing.assert_array_equal(rows[vocab_size:], 0)
    assert sum(asked) == vocab_size, "each row is read once"
    assert max(asked) <= max(1, block // (6 * 4))


def test_an_array_that_two_parts_share_is_counted_once():
    mesh = make_mesh(2)
    one, two = (replicate(mesh, np.zeros(size, np.float32)) for size in (3, 5))
    assert bytes_per_device({"embedding": one, "head": one, "norm": two}) == dict.fromkeys(jax.devices()[:2], 4 * 8)


def test_rows_are_padded_and_programs_doubled_where_the_platform_gains_by_it():
    assert [least_rows(mesh_of(platform)) for platform in ("cpu", "gpu", "tpu")] == [1, 2, 2]
    assert [row_sizes(mesh_of("cpu"), width) for width in (1, 2, 8)] == [(1,), (1, 2), (1, 8)]
    assert [row_sizes(mesh_of(platform), 8) for platform in ("gpu", "tpu")] == [(8,), (8,)]
