"""`list` shows what is in a library, and what is not whole."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from checkpoints_convert import convert, export_hugging_face
from checkpoints_convert.__main__ import main
from checkpoints_convert.library import family, library
from pipedec_jax.config import LinearScaling, Llama3Scaling, LlamaConfig, YarnScaling
from tests.checkpoints_convert.sources import TINY, stop_at, tiny_tree
from tests.conftest import write_byte_level


class Stopped(BaseException):
    pass


@pytest.fixture
def directory(tmp_path, byte_level_dir, monkeypatch):
    root = tmp_path / "library"
    for name, layers in (("large", 3), ("middle", 2), ("small", 1), ("other", 1)):
        config = dataclasses.replace(TINY, layers=layers, vocab_size=416)
        source = tmp_path / "sources" / name
        export_hugging_face(config, tiny_tree(config), source, "bfloat16" if name == "small" else None)
        if name == "other":
            write_byte_level(source, extra=("<|extra|>",))
        else:
            shutil.copytree(byte_level_dir, source, dirs_exist_ok=True)
        convert(source, root / name)
    shutil.copytree(tmp_path / "sources" / "middle", root / "published")
    with monkeypatch.context() as patch:
        stop_at(patch, 3, Stopped)
        with pytest.raises(Stopped):
            convert(source, root / "stopped")
    (root / "notes").mkdir()
    (root / "file.txt").touch()
    return root


def test_list_shows_everything_at_a_glance(directory, capsys):
    shutil.copytree(directory / "large", directory / "cut")
    (chunk,) = (directory / "cut" / "parameters" / "layers.2.gate").glob("[0-9]*")
    chunk.write_bytes(chunk.read_bytes()[:-1])
    shutil.copytree(directory / "large", directory / "bare")
    (directory / "bare" / "pipedec_jax.json").unlink()
    shutil.copytree(directory / "large", directory / "broken")
    (directory / "broken" / "pipedec_jax.json").write_text("{")
    shutil.copytree(directory / "large", directory / "lacking")
    shutil.rmtree(directory / "lacking" / "parameters" / "head")

    assert main(["list", "--json", str(directory)]) == 0
    found = {entry.pop("name"): entry for entry in json.loads(capsys.readouterr().out)}
    assert {name: entry["state"].split(":")[0] for name, entry in found.items()} == {
        "large": "complete", "middle": "complete", "small": "complete", "other": "complete", "published": "source",
        "stopped": "incomplete", "cut": "incomplete", "bare": "incomplete", "lacking": "incomplete",
        "broken": "unreadable",
    }  # fmt: skip
    assert found["cut"]["state"] == "incomplete: chunk 0 of 1 of array 'layers/2/gate' is missing or cut short"
    assert found["lacking"]["state"] == "incomplete: file parameters/head/.zarray is missing or cut short"
    assert found["large"]["drafts"] == ["middle", "published", "small"]
    assert found["middle"]["drafts"] == ["small"]
    assert found["small"]["drafts"] == found["other"]["drafts"] == found["cut"]["drafts"] == []
    assert found["small"]["dtype"] == "bfloat16"
    assert found["small"]["bytes"] == 2 * found["small"]["parameters"] > 0

    assert main(["list", str(directory)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["name"].split() == ["name", "family", "parameters", "dtype", "size", "state", "drafts"]
    assert lines["large"].endswith("middle, published, small")
    assert lines["small"].split()[1:] == ["LLaMA", "11.6K", "bfloat16", "22.66", "KiB", "complete"]


def test_a_directory_that_is_not_there(tmp_path, capsys):
    assert main(["list", str(tmp_path / "nowhere")]) == 2
    assert "is not a directory" in capsys.readouterr().err
    assert library(tmp_path) == []
    with pytest.raises(ValueError, match="gs://a/b is not on this machine"):
        library("gs://a/b")


def test_a_directory_that_may_not_be_read_hides_no_other(source, tmp_path, monkeypatch):
    for name in ("locked", "open"):
        shutil.copytree(source, tmp_path / "library" / name)
    is_file = Path.is_file

    def refused(path, *arguments, **keywords):  # a mode of the file system would not stop root
        if path.parent.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "is_file", refused)
    found = {entry.name: entry.state for entry in library(tmp_path / "library")}
    assert found["open"] == "source"
    assert found["locked"].startswith("unreadable: ")
    assert "Permission denied" in found["locked"]


def test_an_empty_library_and_a_checkpoint_itself_are_said_to_be_so(source, tmp_path, capsys):
    convert(source, tmp_path / "odd\nname\x1b[2J")
    (tmp_path / "empty").mkdir()
    assert main(["list", str(tmp_path / "empty")]) == main(["list", str(source)]) == main(["list", str(tmp_path)]) == 0
    empty, itself, heading, *lines = capsys.readouterr().out.splitlines()
    assert empty == f"{tmp_path / 'empty'} holds no checkpoints"
    assert itself == f"{source} holds no checkpoints (it is one itself: see `inspect`)"
    assert [line.split()[0] for line in (heading, *lines)] == ["name", "odd?name?[2J", "source"]


@pytest.mark.parametrize(
    ("expected", "settings"),
    [
        ("Mistral", {"vocab_size": 32000, "heads": 32, "kv_heads": 8, "context": 4096}),
        ("Mistral", {"vocab_size": 131072, "heads": 32, "kv_heads": 8, "rope_theta": 1e6}),
        ("Qwen2", {"vocab_size": 151936, "rope_theta": 1e6, "attention_bias": True}),
        ("LLaMA 1", {"vocab_size": 32000, "norm_eps": 1e-6, "context": 2048}),
        ("LLaMA 1", {"vocab_size": 32000, "norm_eps": 1e-6, "context": 4096}),
        ("LLaMA 1", {"vocab_size": 32000, "context": 2048}),
        ("LLaMA 2", {"vocab_size": 32000, "context": 4096}),
        ("LLaMA", {"vocab_size": 32000, "context": 4096, "rope_scaling": LinearScaling(4.0)}),
        ("Code Llama", {"vocab_size": 32016, "rope_theta": 1e6, "context": 16384}),
        ("LLaMA 3", {"vocab_size": 128256, "rope_theta": 5e5, "context": 8192}),
        ("LLaMA 3.1", {"vocab_size": 128256, "rope_theta": 5e5, "rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 8192)}),
        ("LLaMA 3.2", {"vocab_size": 128256, "rope_theta": 5e5, "rope_scaling": Llama3Scaling(32.0, 1.0, 4.0, 8192)}),
        ("LLaMA", {"vocab_size": 400}),
        ("LLaMA", {"vocab_size": 128256, "rope_theta": 5e5, "rope_scaling": YarnScaling(32.0, 8192, 1.3)}),
    ],
)
def test_families_are_told_by_geometry(expected, settings):
    shape = {"width": 64, "feed_forward": 64, "layers": 1, "heads": 1, "kv_heads": 1, "head_size": 64, "context": 99}
    assert family(LlamaConfig(**(shape | settings))) == expected
