"""Files that are read whole are bounded: a hostile size is an error before memory is taken."""

import os
import struct
import zipfile

import pytest

import pipedec_jax
from checkpoints_convert import convert, open_any, open_checkpoint
from checkpoints_convert.library import library
from checkpoints_convert.verify import damage
from pipedec_jax import small_files
from tests.checkpoints_convert.meta_files import save_as_meta
from tests.checkpoints_convert.sources import COMMON, edit_json, edit_manifest, hugging_face_model, save_pickled

HUGE = 2**40


def grow(file, size=HUGE):
    """Make a file as large as no memory is; it takes no room on the disk."""
    os.truncate(file, size)


@pytest.fixture(autouse=True)
def no_large_read(monkeypatch):
    """Whoever asks for more than is ever to be read would get it, from a file of such a size."""
    monkeypatch.setattr(small_files, "MOST_BYTES", {"tokenizer.json": 30_000, "tokenizer.model": 20_000})
    monkeypatch.setattr(small_files, "OTHERS_BYTES", 50_000)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_huge_file_of_a_source_is_refused(name, source, tmp_path, others):
    if not (source / name).exists():
        (source / name).write_text("{}")
    grow(source / name)
    for act in (lambda: convert(source, tmp_path / "converted"), lambda: pipedec_jax.load(source)):
        with pytest.raises(ValueError, match=rf"{name} has .* bytes"):
            act()
    assert others() == []
    (entry,) = library(tmp_path)
    assert entry.name == "source"


def test_huge_indexes_and_headers_are_refused(source, tmp_path):
    index = source / "model.safetensors.index.json"
    (source / "model.safetensors").rename(source / "a.safetensors")
    index.write_text("{}")
    grow(index)
    with pytest.raises(ValueError, match=r"index\.json has more than 50,000 bytes"):
        open_any(source)
    (source / "a.safetensors").rename(source / "model.safetensors")
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", 2**25) + data[8:])
    grow(source / "model.safetensors")
    with pytest.raises(ValueError, match="its header is said to have 33,554,432 bytes; at most 16,777,216 are read"):
        open_any(source)


def test_json_of_too_many_values_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr(small_files, "JSON_VALUES", 3000)
    monkeypatch.setattr(small_files, "JSON_KEYS", 1000)
    convert(source, tmp_path / "converted")
    many = {str(key): 0 for key in range(2000)}
    for values, kind in (([{}] * 2000, "values"), ([[]] * 2000, "values"), (many, "keys")):
        for name in ("config.json", "tokenizer.json"):
            whole = (source / name).read_text()
            edit_json(source / name, extra=values)
            with pytest.raises(ValueError, match=rf"{name} holds about \d,\d+ JSON {kind}; at most \d,000 are read"):
                convert(source, tmp_path / "again")
            (source / name).write_text(whole)


def test_many_files_are_bounded_together(source, tmp_path, monkeypatch):
    monkeypatch.setattr("checkpoints_convert.source.TOGETHER_BYTES", 100_000)
    (source / "additional_chat_templates").mkdir()
    for number in range(3):
        (source / "additional_chat_templates" / f"{number}.jinja").write_text("x" * 40_000)
    with pytest.raises(ValueError, match="have more than 100,000 bytes together"):
        convert(source, tmp_path / "converted")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "pipedec_jax.json", "parameters/head/.zarray", "parameters/head/0.0"]
)
def test_a_huge_file_of_a_converted_checkpoint_is_refused(name, source, tmp_path):
    converted = convert(source, tmp_path / "converted")
    grow(converted / name)
    if name == "pipedec_jax.json":
        with pytest.raises(ValueError, match=r"pipedec_jax\.json has more than 50,000 bytes"):
            open_checkpoint(converted)
        return
    with pytest.raises(ValueError, match=r"tokenizer\.json has .* bytes|cannot read array 'head' of .* bytes"):
        pipedec_jax.load(converted).source.read("head")


def test_what_a_hostile_manifest_states_is_not_believed(source, tmp_path):
    """Its own checksum proves nothing: whoever changes it can write that too."""
    converted = convert(source, tmp_path / "converted")
    values = open_checkpoint(converted).manifest.to_json()
    for facts in (*values["metadata"].values(), *values["files"].values()):
        facts["bytes"] = 10**30
    edit_manifest(converted, metadata=values["metadata"], files=values["files"])
    with pytest.raises(ValueError, match=r"file .* of .* differs from what was converted"):
        pipedec_jax.load(converted)
    with pytest.raises(ValueError, match=r"head/\.zarray differs from what was converted"):
        open_checkpoint(converted).read("head")
    assert len(list(damage(converted))) == 2 + 22 + 21


def test_metas_files_are_bounded(tmp_path):
    model = hugging_face_model(COMMON | {"num_attention_heads": 4, "vocab_size": 528})
    source = save_as_meta(model, tmp_path / "source")
    whole = (source / "params.json").read_bytes()
    grow(source / "params.json")
    with pytest.raises(ValueError, match=r"params\.json has more than 50,000 bytes"):
        open_any(source)
    (source / "params.json").write_bytes(whole)
    grow(source / "tokenizer.model")
    with pytest.raises(ValueError, match=r"tokenizer\.model has .* bytes"):
        open_any(source)


@pytest.mark.parametrize("large", [False, True])
def test_a_huge_table_of_an_archive_is_refused(large, tmp_path):
    source = save_pickled(hugging_face_model(COMMON | {"num_attention_heads": 4}), tmp_path / "source")
    file = source / "pytorch_model.bin"
    if not large:
        # PyTorch writes the records of large archives always, `zipfile` where they are needed.
        with zipfile.ZipFile(file) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w") as archive:
            for name, value in entries.items():
                archive.writestr(name, value)
    assert open_any(source).dtype == "float32"
    data = bytearray(file.read_bytes())
    end = data.rfind(b"PK\6\6" if large else b"PK\5\6")
    assert end > 0
    struct.pack_into("<Q" if large else "<L", data, end + (40 if large else 12), 2**31)
    file.write_bytes(data)
    with pytest.raises(ValueError, match="its table is said to have 2,147,483,648 bytes"):
        open_any(source)


def test_a_pipe_that_nobody_writes_to_is_no_small_file(tmp_path):
    os.mkfifo(tmp_path / "generation_config.json")
    with pytest.raises(OSError, match=r"generation_config\.json is no plain file"):
        small_files.read_small(tmp_path / "generation_config.json")


def test_values_are_called_what_json_calls_them():
    values = (None, True, False, "text", 1, 1.5, [], {})
    names = ("null", "true", "false", "text", "a number", "a number", "a list", "an object")
    assert tuple(map(small_files.json_kind, values)) == names
