"""A part of an array is read alone, wherever it is cut, from a converted checkpoint and from its source."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints_convert import convert, open_checkpoint, open_hugging_face, store
from checkpoints_convert.safetensors_reader import SafetensorsDirectory
from checkpoints_convert.source import same_bits
from pipedec_jax.model.held import held_names
from pipedec_jax.model.parameters import flatten, parameter_shapes
from pipedec_jax.pipeline.placement import make_mesh, place_target
from pipedec_jax.pipeline.split import StageSplit
from tests.checkpoints_convert.sources import TINY, tiny_source, tiny_tree

ARRAYS = dict(flatten(tiny_tree()))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parts")
    source = tiny_source(directory / "source")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK_BYTES", 200)
        converted = convert(source, directory / "converted")
    return open_checkpoint(converted), open_hugging_face(source)


@settings(max_examples=60)
@given(data=st.data())
def test_any_part_is_what_slicing_gives(data, checkpoints):
    path = data.draw(st.sampled_from(list(parameter_shapes(TINY))))
    ends = [sorted(data.draw(st.tuples(*[st.integers(0, size + 2)] * 2))) for size in ARRAYS[path].shape]
    part = tuple(slice(*pair) for pair in ends)
    for checkpoint in checkpoints:
        assert same_bits(checkpoint.read(path, part), np.ascontiguousarray(ARRAYS[path][part]))


def test_parts_must_fit_the_array(checkpoints):
    for part in ((slice(0, 2),), (slice(0, 4, 2), slice(None))):
        with pytest.raises(ValueError, match=r"a part of an array of shape \(29, 12\) takes 2 slices of step 1"):
            checkpoints[0].read("embedding", part)


def test_only_chunks_that_a_part_touches_are_read(checkpoints, monkeypatch):
    converted, _ = checkpoints
    stored = converted.manifest.arrays["head"]
    assert stored.chunks == 8
    seen, checksum = [], store._checksum
    monkeypatch.setattr(store, "_checksum", lambda elements: seen.append(elements.nbytes) or checksum(elements))
    converted.read("head", (slice(None), slice(5, 9)))
    assert sum(seen) == 2 * 12 * 4 * 4


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("which", [0, 1])
def test_devices_get_their_stage_and_their_rows(which, ranks, checkpoints, monkeypatch):
    asked, read = [], type(checkpoints[which]).read

    def recording(self, path, part=None):
        asked.append((path, part))
        return read(self, path, part)

    monkeypatch.setattr(type(checkpoints[which]), "read", recording)
    params = place_target(make_mesh(ranks), checkpoints[which], StageSplit((1, 1)), np.float32)
    rows = -(-29 // ranks)
    for name, whole_VD in (("embedding", ARRAYS["embedding"]), ("head", ARRAYS["head"].T)):
        shards = sorted(getattr(params, name).addressable_shards, key=lambda shard: shard.index[0].start or 0)
        for rank, shard in enumerate(shards):
            expected = np.zeros((shard.data.shape[0], 12), np.float32)
            part = whole_VD[rank * len(expected) : (rank + 1) * len(expected)]
            expected[: len(part)] = part
            assert len(expected) >= rows
            assert np.array_equal(shard.data, expected)
    for name, stored in held_names(checkpoints[which].config).items():
        shards = sorted(params.layers[0][name].addressable_shards, key=lambda shard: shard.index[0].start or 0)
        for stage in range(2):
            data = shards[stage].data
            flat = [ARRAYS[f"layers/{stage}/{one}"].reshape(*data.shape[:-1], -1) for one in stored]
            assert np.array_equal(data, np.concatenate(flat, axis=-1))
    # No layer is read twice, and of embedding and head every row once.
    layers = [path for path, _ in asked if path.startswith("layers/")]
    assert sorted(layers) == sorted(path for path in ARRAYS if path.startswith("layers/"))
    read_rows = sum(part[0].stop - part[0].start for path, part in asked if path == "embedding")
    assert read_rows == 29
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


def test_sources_map_one_tensor_at_a_time(checkpoints, monkeypatch):
    seen, view = [], SafetensorsDirectory.view
    monkeypatch.setattr(SafetensorsDirectory, "view", lambda self, name: seen.append(name) or view(self, name))
    checkpoints[1].read("layers/1/gate", (slice(None), slice(3, 4)))
    assert seen == ["model.layers.1.mlp.gate_proj.weight"]
