"""A destination in an object store, by the `gs://` code of Orbax's path library; a local directory is the store."""

import json

import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

import pipedec_jax
from checkpoints_convert import convert, export, is_converted, open_checkpoint, store
from checkpoints_convert.__main__ import main
from checkpoints_convert.paths import is_cloud, key_value_store
from checkpoints_convert.source import same_bits
from checkpoints_convert.verify import damage, differences
from tests.checkpoints_convert.sources import stop_at
from tests.checkpoints_convert.stopping import Stopped, contents

PLACE = "gs://bucket/library/model"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Where `gs://bucket` is."""
    root = tmp_path / "store"
    root.mkdir()
    files = DirFileSystem(str(root), LocalFileSystem(auto_mkdir=True))
    monkeypatch.setattr(backend._FileSystemSpecBackend, "fs", lambda *_: files)
    # TensorStore has code of its own for the cloud.
    monkeypatch.setattr(
        store,
        "key_value_store",
        lambda place: (
            {"driver": "file", "path": f"{root / str(place)}/"} if is_cloud(place) else key_value_store(place)
        ),
    )
    return root / "gs:" / "bucket"


def test_conversion_and_all_that_reads_it(source, tmp_path, bucket, capsys):
    expected = contents(convert(source, tmp_path / "local"))
    assert main(["convert", str(source), PLACE]) == 0
    assert contents(bucket / "library" / "model") == expected
    assert [path.name for path in (bucket / "library").iterdir()] == ["model"]
    assert is_converted(PLACE)
    assert list(damage(PLACE)) == list(differences(source, PLACE)) == []
    assert main(["verify", PLACE]) == main(["verify", "--no-logits", str(source), PLACE]) == 0
    capsys.readouterr()
    assert main(["inspect", "--json", PLACE]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "converted"
    back = export(PLACE, tmp_path / "back")
    assert contents(back)["model.safetensors"] == contents(source)["model.safetensors"]
    assert main(["convert", str(source), PLACE]) == 0  # it is done
    assert main(["convert", str(source), PLACE, "--dtype", "bfloat16"]) == 2
    assert f"{PLACE} exists; pass --overwrite" in capsys.readouterr().err
    assert main(["convert", str(source), PLACE, "--overwrite", "--dtype", "bfloat16"]) == 0
    assert open_checkpoint(PLACE).dtype == "bfloat16"


@pytest.mark.parametrize("count", [1, 12])
def test_goes_on_after_a_stop_and_nothing_loads_before(count, source, tmp_path, bucket, monkeypatch, capsys):
    expected = contents(convert(source, tmp_path / "local"))
    with monkeypatch.context() as patch:
        stop_at(patch, count, Stopped)
        with pytest.raises(Stopped):
            convert(source, PLACE)
    with pytest.raises(FileNotFoundError, match="is not complete: its conversion was interrupted"):
        pipedec_jax.load(PLACE)
    assert main(["convert", str(source), PLACE]) == 0
    assert contents(bucket / "library" / "model") == expected
    assert [path.name for path in (bucket / "library").iterdir()] == ["model"]


def test_what_an_error_leaves_is_removed(source, tmp_path, bucket, monkeypatch):
    stop_at(monkeypatch, 12, ValueError("bad"))
    with pytest.raises(ValueError, match="bad"):
        convert(source, PLACE)
    assert contents(bucket) == {}


def test_damage_is_found_when_loading(source, bucket):
    convert(source, PLACE)
    model = pipedec_jax.load(PLACE)
    expected = convert(source, bucket / "local")
    assert same_bits(model.source.read("layers/1/up"), open_checkpoint(expected).read("layers/1/up"))
    assert model.tokenizer.vocabulary == pipedec_jax.load(expected).tokenizer.vocabulary
    chunk = bucket / "library" / "model" / "parameters" / "layers.1.up" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    with pytest.raises(
        ValueError, match=r"cannot read array 'layers/1/up' of gs://bucket.* does not have the checksum"
    ):
        model.source.read("layers/1/up")
    tokenizer = bucket / "library" / "model" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    with pytest.raises(
        ValueError, match=r"file tokenizer\.json of gs://bucket/library/model differs from what was conv"
    ):
        pipedec_jax.load(PLACE)


@pytest.mark.parametrize("command", [["convert", "SRC", PLACE], ["inspect", PLACE], ["verify", PLACE]])
def test_what_an_object_store_refuses_is_one_line(command, source, monkeypatch, capsys):
    class RefusedError(Exception):
        pass

    def refuse(*_):
        raise RefusedError("no credentials were found")

    monkeypatch.setattr(backend._FileSystemSpecBackend, "fs", refuse)
    assert main([str(source) if word == "SRC" else word for word in command]) == 2
    assert capsys.readouterr().err == "error: RefusedError: no credentials were found\n"
