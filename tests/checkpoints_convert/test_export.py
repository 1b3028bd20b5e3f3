"""What was converted goes back bit for bit, as a directory that transformers loads."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.numpy import load_file

import pipedec_jax
from checkpoints_convert import convert, export, hugging_face_export, open_source
from checkpoints_convert.__main__ import main
from checkpoints_convert.source import same_bits
from tests.checkpoints_convert.sources import GEOMETRIES, edit_json, hugging_face_model, save


def tensors(directory):
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("shard_bytes", [2**30, 50_000])
@pytest.mark.parametrize(
    "name", ["LLaMA 2 70B: grouped queries", "LLaMA 3.2: tied, scaled RoPE", "Granite Code: biases"]
)
def test_convert_and_export_give_the_same_bits(name, shard_bytes, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr("checkpoints_convert.hugging_face_export.SHARD_BYTES", shard_bytes)
    source = save(hugging_face_model(GEOMETRIES[name]), tmp_path / "source", "bfloat16")
    back = export(convert(source, tmp_path / "converted"), tmp_path / "back")
    expected, found = tensors(source), tensors(back)
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], expected[name]) for name in expected)
    assert (len(list(back.glob("*.safetensors"))) > 1) == (shard_bytes < 2**30)
    assert (back / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert len({path.stat().st_mode for path in back.iterdir()}) == 1

    loaded, info = LlamaForCausalLM.from_pretrained(back, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values())
    original = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    with torch.no_grad():
        tokens = torch.arange(100)[None]
        assert torch.allclose(loaded.double()(tokens).logits, original.double()(tokens).logits, rtol=1e-9, atol=1e-9)
    assert open_source(back).config == open_source(source).config


def test_end_tokens_go_back(source, tmp_path):
    (source / "generation_config.json").unlink()
    back = export(convert(source, tmp_path / "converted"), tmp_path / "back")
    assert (open_source(back).bos_token_id, open_source(back).eos_token_ids) == (1, [2, 3])
    edit_json(source / "config.json", eos_token_id=7)
    back = export(convert(source, tmp_path / "other"), tmp_path / "again")
    assert json.loads((back / "config.json").read_text())["eos_token_id"] == 7


def test_a_damaged_checkpoint_is_not_exported(source, tmp_path, others):
    converted = convert(source, tmp_path / "converted")
    (chunk,) = (converted / "parameters" / "layers.1.down").glob("[0-9]*")
    chunk.write_bytes(b"\1" + chunk.read_bytes()[1:])
    with pytest.raises(ValueError, match="cannot read array 'layers/1/down'"):
        export(converted, tmp_path / "back")
    assert others() == ["converted"]


@pytest.mark.parametrize("spoil", ["differs from what was converted", "is missing"])
def test_small_files_are_compared_before_anything_is_written(spoil, source, tmp_path, others):
    converted = convert(source, tmp_path / "converted")
    file = converted / "tokenizer.json"
    if spoil == "is missing":
        file.unlink()
    else:
        file.write_text(file.read_text() + " ")
    message = f"file tokenizer.json of .*converted {spoil}; put the original back, or convert the source again"
    with pytest.raises(ValueError, match=message):
        export(converted, tmp_path / "back")
    with pytest.raises(ValueError, match=message):
        pipedec_jax.load(converted)
    assert others() == ["converted"]


def test_a_full_disk_is_told_before_anything_is_written(source, tmp_path, others, monkeypatch):
    converted = convert(source, tmp_path / "converted")
    monkeypatch.setattr(hugging_face_export.shutil, "disk_usage", lambda _: SimpleNamespace(free=99))
    with pytest.raises(OSError, match=r"the export needs 15\.33 KiB in .*, which has 99 B free; make room"):
        export(converted, tmp_path / "back")
    assert others() == ["converted"]


def test_what_killed_exports_left_is_removed_and_nothing_else(source, tmp_path, others):
    fcntl = pytest.importorskip("fcntl")
    converted = convert(source, tmp_path / "converted")
    left, running = tmp_path / ".back.4711.export", tmp_path / ".back.4712.export"
    # Another export's, a conversion's to back.4711, a link, somebody's file.
    foreign = [tmp_path / name for name in (".back.2.4711.export", ".back.4711.partial", ".back.x.export")]
    for place in (left, running, *foreign):
        place.mkdir()
        (place / "model.safetensors").write_bytes(bytes(99))
    (tmp_path / ".back.4713.export").symlink_to(converted)
    (tmp_path / ".back.4714.export").write_text("a file")
    kept = sorted({*others(), ".back.4713.export", ".back.4714.export", "back"} - {left.name})
    opened = os.open(running, os.O_RDONLY)
    fcntl.flock(opened, fcntl.LOCK_EX)
    export(converted, tmp_path / "back")
    os.close(opened)
    assert others() == kept
    assert all((place / "model.safetensors").is_file() for place in (running, *foreign))


def test_an_export_that_runs_is_not_taken_for_a_killed_one(source, tmp_path, monkeypatch):
    converted = convert(source, tmp_path / "converted")
    write = hugging_face_export._write_others

    def beside(*arguments):
        monkeypatch.setattr(hugging_face_export, "_write_others", write)
        monkeypatch.setattr(hugging_face_export.os, "getpid", lambda: 1)
        export(converted, tmp_path / "back")
        write(*arguments)

    monkeypatch.setattr(hugging_face_export, "_write_others", beside)
    with pytest.raises(OSError, match="not empty"):  # The other was quicker.
        export(converted, tmp_path / "back")
    assert open_source(tmp_path / "back").config == open_source(source).config


def test_an_object_store_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match="gs://a/b is not on this machine; export to a local directory"):
        export(convert(source, tmp_path / "converted"), "gs://a/b")


def test_command(source, tmp_path, capsys):
    convert(source, tmp_path / "converted")
    assert main(["export", str(tmp_path / "converted"), str(tmp_path / "back")]) == 0
    assert "exported" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "converted"), str(tmp_path / "back")]) == 2
    assert "back exists; choose another directory" in capsys.readouterr().err
