import dataclasses
import importlib.util
import json
import os
import shutil

import pytest

from checkpoint_trials.synthetic import write_tokenizer
from checkpoints_convert import convert
from checkpoints_convert.__main__ import main
from checkpoints_convert.report import describe
from checkpoints_convert.verify import damage, differences, logit_difference
from pipedec_jax.config import LinearScaling, Llama3Scaling, LlamaConfig
from pipedec_jax.model.parameters import parameter_count, parameter_shapes
from tests.checkpoints_convert.sources import (
    FAMILIES,
    GEOMETRIES,
    TINY,
    edit_json,
    edit_manifest,
    hugging_face_model,
    save,
    tiny_source,
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A source and its conversion, not to be changed."""
    directory = tmp_path_factory.mktemp("pristine")
    source = tiny_source(directory / "source")
    return source, convert(source, directory / "converted")


@pytest.fixture
def pair(pristine, tmp_path):
    """A source and its conversion, to be spoilt."""
    return tuple(shutil.copytree(path, tmp_path / path.name) for path in pristine)


def only_chunk(converted, path):
    (chunk,) = (converted / "parameters" / path.replace("/", ".")).glob("[0-9]*")
    return chunk


def test_a_good_conversion_has_no_differences(pristine):
    assert list(differences(*pristine)) == []
    assert list(damage(pristine[1])) == []


@pytest.mark.parametrize("path", parameter_shapes(TINY))
def test_a_single_flipped_bit_is_found_and_named(path, pair):
    chunk = only_chunk(pair[1], path)
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    for (found,) in (list(damage(pair[1])), list(differences(*pair))):
        assert found.startswith(f"cannot read array {path!r} of ")
        assert found.endswith("chunk 0 of 1 does not have the checksum that pipedec_jax.json says")


def test_a_flipped_bit_is_found_in_every_file(pair):
    """Also in what no array is read from."""
    for number, file in enumerate(sorted(path for path in pair[1].rglob("*") if path.is_file())):
        whole = file.read_bytes()
        place = number * len(whole) // 64
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << number % 8]) + whole[place + 1 :])
        try:
            assert list(damage(pair[1])), (file.name, place)
        except ValueError as error:
            assert "pipedec_jax.json" in str(error)  # noqa: PT017  # Both ways of telling are right.
        file.write_bytes(whole)
    assert number < 64
    assert list(damage(pair[1])) == []


def test_two_exchanged_arrays_are_found_though_the_checksums_agree(pair):
    gate, up = (only_chunk(pair[1], f"layers/0/{name}") for name in ("gate", "up"))
    data = gate.read_bytes()
    gate.write_bytes(up.read_bytes())
    up.write_bytes(data)
    arrays = json.loads((pair[1] / "pipedec_jax.json").read_text())["arrays"]
    arrays["layers/0/gate"], arrays["layers/0/up"] = arrays["layers/0/up"], arrays["layers/0/gate"]
    edit_manifest(pair[1], arrays=arrays)
    assert list(damage(pair[1])) == []
    assert [text.split("'")[1] for text in differences(*pair)] == ["layers/0/gate", "layers/0/up"]


@pytest.mark.parametrize("spoil", ["truncate", "remove chunk", "remove array"])
def test_lost_data_is_found_and_named(spoil, pair):
    chunk = only_chunk(pair[1], "layers/1/query")
    if spoil == "truncate":
        chunk.write_bytes(chunk.read_bytes()[:-1])
    elif spoil == "remove chunk":
        chunk.unlink()
    else:
        shutil.rmtree(chunk.parent)
    for found in (list(damage(pair[1])), list(differences(*pair))):
        assert found[-1].startswith("cannot read array 'layers/1/query' of ")
        assert len(found) == 1 + (spoil == "remove array")


def test_a_chunk_that_is_a_pipe_is_an_error_and_no_hang(pair, capsys):
    chunk = only_chunk(pair[1], "layers/0/down")
    chunk.unlink()
    os.mkfifo(chunk)
    for (found,) in (list(damage(pair[1])), list(differences(*pair))):
        assert found.startswith("cannot read array 'layers/0/down' of ")
        assert found.endswith("chunk 0 of 1 is no file")
    assert main(["list", "--json", str(pair[1].parent)]) == 0
    states = {entry["name"]: entry["state"] for entry in json.loads(capsys.readouterr().out)}
    assert states["converted"] == "incomplete: chunk 0 of 1 of array 'layers/0/down' is missing or cut short"


@pytest.mark.parametrize("change", [{"shape": [11]}, {"chunks": [2**40]}])
def test_an_array_of_another_layout_is_found(change, pair):
    edit_json(only_chunk(pair[1], "final_norm").parent / ".zarray", **change)
    metadata, found = differences(*pair)
    assert metadata == "file parameters/final_norm/.zarray differs from what was converted"
    # TensorStore is not asked: it would believe any size, and end the process.
    assert found.startswith("cannot read array 'final_norm' of ")
    assert found.endswith("final_norm/.zarray differs from what was converted")


def test_a_manifest_that_says_the_same_in_other_bytes_is_found(source, tmp_path):
    converted = convert(source, tmp_path / "converted")
    path = converted / "pipedec_jax.json"
    path.write_text(path.read_text() + "\n")
    expected = ["file pipedec_jax.json is written otherwise than by the converter"]
    assert list(damage(converted)) == list(differences(source, converted)) == expected


def test_files_config_and_end_tokens_are_compared(pair):
    source, converted = pair
    (converted / "tokenizer.json").write_text("{}")
    (converted / "generation_config.json").unlink()
    (converted / "parameters" / "_METADATA").unlink()
    assert [text.split(" ")[1] for text in damage(converted)] == [
        "generation_config.json", "tokenizer.json", "parameters/_METADATA",
    ]  # fmt: skip
    values = json.loads((converted / "pipedec_jax.json").read_text())
    edit_manifest(converted, eos_token_ids=[2], model=values["model"] | {"rope_theta": 1.0})
    found = "\n".join(differences(source, converted))
    for expected in ("file tokenizer.json differs", "file generation_config.json is missing", "eos_token_ids is [2]"):
        assert expected in found
    assert "rope_theta=1.0" in found


def test_rounding_is_allowed_and_nothing_else(pristine, tmp_path):
    source, _ = pristine
    assert list(differences(source, convert(source, tmp_path / "half", "bfloat16"))) == []


@pytest.mark.parametrize(
    ("geometry", "dtype"),
    [
        (GEOMETRIES["LLaMA 3.2: tied, scaled RoPE"], "float32"),
        (GEOMETRIES["LLaMA 3.2: tied, scaled RoPE"], "bfloat16"),
        (FAMILIES["Mistral"], "float32"),
        (FAMILIES["Qwen2"] | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "bfloat16"),
    ],
    ids=["float32", "bfloat16", "Mistral", "Qwen2"],
)
def test_logits_are_compared_and_can_be_wrong(geometry, dtype, tmp_path):
    source = save(hugging_face_model(geometry), tmp_path / "source")
    converted = convert(source, tmp_path / "converted", dtype)
    assert logit_difference(source, converted) <= 1e-4
    # The same weights under another RoPE: only the logits can tell.
    values = json.loads((converted / "pipedec_jax.json").read_text())
    edit_manifest(converted, model=values["model"] | {"rope_theta": 1e3})
    assert logit_difference(source, converted) > 1e-2


def test_command_reports_success_and_failure(pristine, pair, capsys):
    source, converted = map(str, pristine)
    assert main(["verify", "--no-logits", source, converted]) == 0
    assert "all tensors are as in the source" in capsys.readouterr().out
    assert main(["verify", converted]) == 0
    assert "all tensors are as in the manifest" in capsys.readouterr().out
    only_chunk(pair[1], "head").write_bytes(b"")
    assert main(["verify", "--no-logits", *map(str, pair)]) == 1
    assert "wrong: cannot read array 'head'" in capsys.readouterr().err
    assert main(["verify", str(pair[1])]) == 1
    assert "wrong: cannot read array 'head'" in capsys.readouterr().err
    assert main(["verify", source, source]) == 2
    assert "error: " in capsys.readouterr().err


def test_without_torch_the_last_line_says_that_logits_were_not_compared(pristine, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    assert main(["verify", *map(str, pristine)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("passed WITHOUT the logits: torch not installed (pip ")


def test_rows_without_a_token_are_said_to_be_padding(source, tmp_path, capsys):
    write_tokenizer(source, TINY.vocab_size)
    assert main(["convert", str(source), str(tmp_path / "all")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    write_tokenizer(source, TINY.vocab_size - 2)
    said = f"ids {TINY.vocab_size - 2} to {TINY.vocab_size - 1} are padding, and never chosen"
    assert main(["convert", str(source), str(tmp_path / "fewer")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(said)
    assert main(["inspect", str(tmp_path / "fewer")]) == 0
    assert said in capsys.readouterr().out
    assert main(["inspect", "--json", str(source)]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == TINY.vocab_size - 2
    (source / "tokenizer.json").write_text("{}")
    assert main(["inspect", str(source)]) == 0
    assert "the tokenizer cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("scaling", [Llama3Scaling(8.0, 1.0, 4.0, 32), LinearScaling(4.0), None])
def test_inspect_names_the_kind_of_rope_scaling(scaling, tmp_path):
    source = tiny_source(tmp_path / "source", dataclasses.replace(TINY, rope_scaling=scaling))
    found = describe(source)["model"]["rope_scaling"]
    assert found == (None if scaling is None else {"kind": scaling.kind} | dataclasses.asdict(scaling))


def test_a_name_that_steers_the_terminal_is_shown_harmless(tmp_path, capsys):
    converted = convert(tiny_source(tmp_path / "odd\nname\x1b[2J"), tmp_path / "converted")
    assert main(["inspect", str(converted)]) == 0
    text = capsys.readouterr().out
    assert "odd?name?[2J" in text
    assert "\x1b" not in text


def test_inspect_works_on_both_sides(pristine, capsys):
    facts = []
    for path in map(str, pristine):
        assert main(["inspect", "--json", path]) == 0
        facts.append(json.loads(capsys.readouterr().out))
        assert main(["inspect", path]) == 0
        text = capsys.readouterr().out
        assert f"{parameter_count(TINY):,}" in text
        assert "rope_theta" in text
    source, converted = facts
    assert (source.pop("format"), converted.pop("format")) == ("huggingface-safetensors", "converted")
    assert converted.pop("source")["name"] == "source"
    assert converted.pop("tool").startswith("pipedec_jax ")
    assert source == converted
    assert source["bytes"] == 4 * source["parameters"] == 4 * parameter_count(TINY)
    assert LlamaConfig.from_dict(source["model"]) == TINY
