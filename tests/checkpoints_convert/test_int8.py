"""Int8 as an option of conversion: the same bytes as when loading, resumable, verified, exported."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoints_convert import (
    conversion,
    convert,
    export,
    export_hugging_face,
    open_checkpoint,
    open_hugging_face,
    store,
)
from checkpoints_convert.__main__ import main
from checkpoints_convert.hugging_face import tensor_name
from checkpoints_convert.library import library
from checkpoints_convert.source import same_bits
from checkpoints_convert.verify import damage, differences
from pipedec_jax.model.int8 import DequantizedSource, Int8Source
from pipedec_jax.model.parameters import parameter_shapes
from tests.checkpoints_convert.sources import edit_json, stop_at, tiny_source
from tests.checkpoints_convert.stopping import Stopped, contents
from tests.checkpoints_convert.test_bad_input import edit_tensors


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that matrices have several."""
    monkeypatch.setattr(store, "CHUNK_BYTES", 100)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_conversion_stores_what_loading_makes(dtype, source, tmp_path, capsys):
    command = ["convert", str(source), str(tmp_path / "converted"), "--int8", "--dtype", dtype]
    assert main(command) == 0
    checkpoint, expected = open_checkpoint(tmp_path / "converted"), Int8Source(open_hugging_face(source))
    assert checkpoint.config == expected.config
    for path in parameter_shapes(checkpoint.config):
        wanted = expected.read(path)
        if wanted.dtype == np.float32 and not path.endswith("_scale"):
            wanted = wanted.astype(checkpoint.read(path).dtype)
        assert same_bits(checkpoint.read(path), wanted), path
        inner = tuple(slice(0, size // 2) for size in wanted.shape)
        assert same_bits(checkpoint.read(path, inner), np.ascontiguousarray(wanted[inner])), path
    assert checkpoint.read("layers/0/down").dtype == np.int8
    assert checkpoint.nbytes == sum(array.nbytes for array in checkpoint.manifest.arrays.values())
    assert list(damage(tmp_path / "converted")) == list(differences(source, tmp_path / "converted")) == []
    # Loading an int8 checkpoint with int8 changes nothing.
    assert same_bits(Int8Source(checkpoint).read("layers/1/up"), checkpoint.read("layers/1/up"))
    entries = {entry.name: entry for entry in library(tmp_path)}
    assert (entries["converted"].dtype, entries["converted"].state) == (f"int8, {dtype}", "complete")
    assert entries["converted"].parameters == entries["source"].parameters
    capsys.readouterr()
    assert main(["inspect", "--json", str(tmp_path / "converted")]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["int8"] is True


@pytest.mark.parametrize("count", [1, 4, 8])
def test_an_interrupted_conversion_goes_on_with_the_same_bytes(count, source, tmp_path, monkeypatch):
    expected = contents(convert(source, tmp_path / "whole", int8=True))
    with monkeypatch.context() as patch:
        # Counts the chunks that are not int8.
        stop_at(patch, count, Stopped)
        with pytest.raises(Stopped):
            convert(source, tmp_path / "converted", int8=True)
    assert contents(convert(source, tmp_path / "converted", int8=True)) == expected


def test_stopped_between_a_matrix_and_its_scales_it_goes_on_with_the_scales(source, tmp_path, monkeypatch):
    written, write = [], conversion.write_array

    def writing(parameters, path, *arguments):
        if path == "layers/0/up_scale" and path not in written:
            written.append(path)
            raise Stopped
        written.append(path)
        return write(parameters, path, *arguments)

    monkeypatch.setattr(conversion, "write_array", writing)
    with pytest.raises(Stopped):
        convert(source, tmp_path / "converted", int8=True)
    converted = convert(source, tmp_path / "converted", int8=True)
    assert written.count("layers/0/up") == 1, "the matrix was done"
    assert list(differences(source, converted)) == []


def test_verify_finds_another_weight(source, tmp_path):
    converted = convert(source, tmp_path / "converted", int8=True)
    tensor = np.asarray(open_hugging_face(source).weights.view("model.layers.0.mlp.up_proj.weight")).copy()
    tensor[3] *= 2
    edit_tensors(source, model__layers__0__mlp__up_proj__weight=tensor)
    # Its int8 values stay, its scale does not.
    assert list(differences(source, converted)) == ["array 'layers/0/up_scale' differs from the source"]


def test_export_multiplies_out(source, tmp_path):
    converted = convert(source, tmp_path / "converted", int8=True)
    back = open_hugging_face(export(converted, tmp_path / "back"))
    assert back.config == open_hugging_face(source).config
    expected = DequantizedSource(open_checkpoint(converted), np.float32)
    assert all(same_bits(back.read(path), expected.read(path)) for path in parameter_shapes(back.config))


def test_what_int8_cannot_hold_and_a_damaged_manifest_are_named(source, tmp_path, others):
    converted = convert(source, tmp_path / "converted", int8=True)
    values = json.loads((converted / "pipedec_jax.json").read_text())
    values["arrays"]["layers/0/up"]["dtype"] = "float32"
    edit_json(converted / "pipedec_jax.json", arrays=values["arrays"])
    with pytest.raises(ValueError, match="array 'layers/0/up' has dtype 'float32' and axis 1, not int8 and 1"):
        open_checkpoint(converted)
    edit_tensors(source, model__layers__0__mlp__up_proj__weight=np.full((20, 12), np.inf, np.float32))
    with pytest.raises(ValueError, match="'layers/0/up' has values that are not finite numbers, which int8 cannot"):
        convert(source, tmp_path / "other", int8=True)
    assert others() == ["converted"]


def test_int8_layers_are_exported_as_what_they_stand_for(tmp_path):
    source = tiny_source(tmp_path / "source", dtype="bfloat16")
    checkpoint = open_checkpoint(convert(source, tmp_path / "converted", int8=True))
    export_hugging_face(checkpoint.config, checkpoint.read_all(), tmp_path / "tree")
    export(tmp_path / "converted", tmp_path / "whole")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("tree", "whole"))
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        assert same_bits(found[tensor], value), tensor
    with pytest.raises(ValueError, match=r"no array of scales such as 'layers/0/query_scale'"):
        tensor_name("layers/0/query_scale")
