"""Every bad source ends in an error that names the culprit, before a weight is read, and leaves nothing behind."""

import json
import os
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import pipedec_jax
from checkpoint_trials.synthetic import write_tokenizer
from checkpoints_convert import conversion, convert, open_checkpoint, open_hugging_face
from checkpoints_convert.__main__ import main
from checkpoints_convert.hugging_face import tensor_name
from checkpoints_convert.safetensors_reader import SafetensorsDirectory
from tests.checkpoints_convert.sources import TINY, edit_json, tiny_source

SINGLE = "model.safetensors"


def split(source):
    """Turn a single-file source into two shards with an index."""
    tensors = load_file(source / SINGLE)
    (source / SINGLE).unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, source / file)
    write_index(source, {name: file for file, part in shards.items() for name in part})


def write_index(source, weight_map):
    (source / f"{SINGLE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_index(source, **changes):
    split(source)
    index = json.loads((source / f"{SINGLE}.index.json").read_text())["weight_map"]
    write_index(source, index | {name.replace("__", "."): file for name, file in changes.items()})


def edit_tensors(source, file=SINGLE, **changes):
    tensors = load_file(source / file) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, source / file)


def duplicate(source):
    split(source)
    edit_tensors(source, "a.safetensors", model__norm__weight=np.ones(TINY.width, np.float32))


def tie_to_another_head(source):
    edit_json(source / "config.json", tie_word_embeddings=True)


def truncate(source, file=SINGLE, keep=0.5):
    data = (source / file).read_bytes()
    (source / file).write_bytes(data[: int(len(data) * keep)])


def truncate_shard(source):
    split(source)
    truncate(source, "b.safetensors")


def remove(*names):
    def act(source):
        for name in names:
            (source / name).unlink()

    return act


def shape(**tensors):
    return lambda source: edit_tensors(source, **tensors)


BAD = {
    "missing tensor": (
        shape(model__layers__1__mlp__up_proj__weight=None), r"lacks tensors 'model\.layers\.1\.mlp\.up_proj\.weight'"),
    "misnamed tensor": (
        shape(model__norm__weight=None, norm__weight=np.ones(12, np.float32)),
        r"lacks tensors 'model\.norm\.weight'; it has unknown tensors 'norm\.weight'$"),
    "missing head": (shape(lm_head__weight=None), r"lacks tensors 'lm_head\.weight' \(config\.json says .* not tied"),
    "unknown tensor": (
        shape(model__layers__0__self_attn__q_proj__bias=np.ones(24, np.float32)),
        r"unknown tensors 'model\.layers\.0\.self_attn\.q_proj\.bias'"),
    "buffer of no rotary embedding": (
        shape(model__layers__0__mlp__inv_freq=np.ones(3, np.float32)), r"unknown tensors 'model\.layers\.0\.mlp\.inv"),
    "buffer of another name": (
        shape(model__rotary_emb__inv_freq_2=np.ones(3, np.float32)), r"unknown tensors 'model\.rotary_emb\.inv_freq_"),
    "layer too many": (
        lambda source: edit_json(source / "config.json", num_hidden_layers=1),
        r"unknown tensors 'model\.layers\.1\..* and 5 more"),
    "layer too few": (
        lambda source: edit_json(source / "config.json", num_hidden_layers=3), r"lacks tensors 'model\.layers\.2\."),
    "misshapen tensor": (
        shape(model__layers__0__self_attn__k_proj__weight=np.ones((24, 12), np.float32)),
        r"'model\.layers\.0\.self_attn\.k_proj\.weight' has shape \(24, 12\), config\.json asks for \(12, 12\)"),
    "transposed matrix": (
        shape(model__layers__0__mlp__up_proj__weight=np.ones((12, 20), np.float32)), r"shape \(12, 20\).*\(20, 12\)"),
    "embedding of another size": (
        lambda source: edit_json(source / "config.json", vocab_size=30),
        r"'model\.embed_tokens\.weight' has shape \(29, 12\), config\.json asks for \(30, 12\)"),
    "stored as integers": (
        shape(model__norm__weight=np.ones(12, np.int8)), "'model.norm.weight' is stored as I8; supported are bfloat16"),
    "tensor in two shards": (duplicate, r"'model\.norm\.weight' is in two files, a\.safetensors and b\.safetensors"),
    "index names the wrong shard": (
        lambda source: edit_index(source, model__norm__weight="a.safetensors"),
        r"puts tensor 'model\.norm\.weight' in a\.safetensors, but it is in b\.safetensors"),
    "index names a missing shard": (
        lambda source: edit_index(source, model__norm__weight="c.safetensors"), r"do not exist: c\.safetensors"),
    "index leads out, upwards": (
        lambda source: edit_index(source, model__norm__weight="../b.safetensors"), r"'\.\./b\.safetensors'; shards"),
    "index leads out, absolute": (
        lambda source: edit_index(source, model__norm__weight="/etc/passwd"), r"'/etc/passwd'; shards are plain"),
    "index with no name of a file": (
        lambda source: edit_index(source, model__norm__weight="a\0b"), r"in 'a\\x00b'; shards are plain"),
    "index with a wrong type": (lambda source: edit_index(source, model__norm__weight=["a"]), r"\['a'\]; shards are"),
    "index without a map": (lambda source: (split(source), write_index(source, None)), "has no 'weight_map' object"),
    "index is not JSON": (
        lambda source: (split(source), (source / f"{SINGLE}.index.json").write_text("{")), "not valid JSON"),
    "tied head that differs": (tie_to_another_head, r"'lm_head\.weight' differs from 'model\.embed_tokens\.weight'"),
    "truncated data": (truncate, "no complete safetensors file"),
    "truncated header": (lambda source: truncate(source, keep=0.01), "no complete safetensors file"),
    "truncated shard": (truncate_shard, r"b\.safetensors is no complete safetensors file"),
    "empty weights": (lambda source: truncate(source, keep=0), "no complete safetensors file"),
    "no weights": (remove(SINGLE), r"has neither model\.safetensors nor model\.safetensors\.index\.json"),
    "no config": (remove("config.json"), r"has neither config\.json nor params\.json"),
    "config is not JSON": (lambda source: truncate(source, "config.json"), r"config\.json is not valid JSON"),
    "generation config is not JSON": (
        lambda source: (source / "generation_config.json").write_text("]"), r"generation_config\.json is not valid"),
    "bad end token": (
        lambda source: edit_json(source / "generation_config.json", eos_token_id="</s>"), "eos_token_id must be"),
    "no tokenizer": (remove("tokenizer.json"), r"has no tokenizer; expected tokenizer\.json or tokenizer\.model"),
    "tokenizer is not JSON": (
        lambda source: truncate(source, "tokenizer.json"), r"read the tokenizer in .*/source: .*nothing was written"),
    "tokenizer is none": (
        lambda source: (source / "tokenizer.json").write_text("{}"), r"cannot read the tokenizer in .*nothing was w"),
    "tokenizer settings are not JSON": (
        lambda source: (source / "tokenizer_config.json").write_text("{"), "cannot read the tokenizer in "),
    "sentencepiece tokenizer is none": (
        lambda source: (source / "tokenizer.json").rename(source / "tokenizer.model"), "cannot read the tokenizer in "),
    "tokenizer of another model": (
        lambda source: write_tokenizer(source, 30), r"ids up to 29, the embedding 29 rows \(0 to 28\); they belong to"),
    "end token without a row": (
        lambda source: edit_json(source / "generation_config.json", eos_token_id=[2, 29]), "names token 29, the embed"),
    "another architecture": (lambda source: edit_json(source / "config.json", model_type="qwen3"), "'qwen3'; only"),
    "biases that are not there": (
        lambda source: edit_json(source / "config.json", mlp_bias=True), r"lacks? .*layers.0.mlp.gate_proj.bias"),
    "unknown RoPE": (
        lambda source: edit_json(source / "config.json", rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        "rope_type is 'dynamic'"),
    "quantized": (lambda source: edit_json(source / "config.json", quantization_config={}), "quantization_config"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_source_is_named_and_leaves_nothing_behind(name, source, tmp_path, others, capsys, monkeypatch):
    spoil, message = BAD[name]
    spoil(source)
    if name != "tied head that differs":  # The only check that takes weights.
        monkeypatch.setattr(SafetensorsDirectory, "view", None)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert(source, tmp_path / "converted")
    assert main(["convert", str(source), str(tmp_path / "converted")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert others() == []


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        open_hugging_face(tmp_path / "nowhere")


def test_unknown_dtype_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match=r"dtype .int8. is not supported; choose one of .* --int8"):
        convert(source, tmp_path / "converted", "int8")


def test_what_is_not_finite_in_the_source_is_kept_in_any_dtype():
    array = np.asarray([np.inf, -np.inf, np.nan, 1.5], np.float32)
    for dtype in ("float16", "bfloat16"):
        np.testing.assert_array_equal(conversion.cast(array, "x", dtype).astype(np.float32), array)
    with pytest.raises(ValueError, match="'x' has values too large for float16"):
        conversion.cast(np.asarray([np.inf, 70000.0], np.float32), "x", "float16")


def test_a_tied_head_of_another_dtype_differs(source, tmp_path):
    edit_json(source / "config.json", tie_word_embeddings=True)
    embedding = load_file(source / SINGLE)["model.embed_tokens.weight"]
    edit_tensors(source, lm_head__weight=embedding.astype(np.float16))
    with pytest.raises(ValueError, match=r"'lm_head\.weight' differs from 'model\.embed_tokens\.weight'"):
        convert(source, tmp_path / "converted", "float32")


def test_values_too_large_for_float16_are_refused(source, tmp_path, others):
    edit_tensors(source, model__norm__weight=np.full(TINY.width, 1e5, np.float32))
    with pytest.raises(ValueError, match="array 'final_norm' has values too large for float16; choose --dtype"):
        convert(source, tmp_path / "converted", "float16")
    assert others() == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_weights_cut_anywhere_are_an_error(data, tmp_path_factory):
    source = tiny_source(tmp_path_factory.mktemp("cut"))
    whole = (source / SINGLE).read_bytes()
    (source / SINGLE).write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match="no complete safetensors file"):
        open_hugging_face(source)


def test_opening_what_is_not_converted_says_what_to_do(source, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is a source; convert .*`python -m checkpoints_conv"):
        open_checkpoint(source)
    with pytest.raises(FileNotFoundError, match=r"has no pipedec_jax\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99 is not 2"),
        ({"model": ...}, "'model' must be of type dict"),
        ({"model": {"vocab": 1}}, "unknown key 'vocab' in model config; did you mean 'vocab_size'"),
        ({"dtype": "int4"}, "dtype 'int4' is not supported"),
        ({"eos_token_ids": "x"}, "eos_token_ids must be"),
    ],
)
def test_a_damaged_config_file_is_named(change, message, source, tmp_path):
    converted = convert(source, tmp_path / "converted")
    edit_json(converted / "pipedec_jax.json", **change)
    with pytest.raises(ValueError, match=rf"pipedec_jax\.json: .*{message}"):
        open_checkpoint(converted)


@pytest.mark.parametrize("name", [SINGLE, "b.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_said_to_be_one(name, tmp_path, capsys):
    source = tiny_source(tmp_path / "source")
    if name == "b.safetensors":
        split(source)
    (source / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert main(["convert", str(source), str(tmp_path / "converted")]) == 2
    error = capsys.readouterr().err
    assert f"{source / name} is only a pointer of Git LFS; run `git lfs pull`" in error.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_is_wrong_is_named_with_its_directory(tmp_path):
    source = tiny_source(tmp_path / "source")
    edit_tensors(source, extra=np.ones(3, np.float32))
    with pytest.raises(ValueError, match=f"^{source}: the checkpoint has unknown tensors 'extra'"):
        open_hugging_face(source)
    edit_json(source / "config.json", hidden_act="gelu")
    with pytest.raises(ValueError, match=f"^{source}: hidden_act is 'gelu'"):
        open_hugging_face(source)


def test_tensors_are_read_as_they_lie_in_their_files(tmp_path):
    source = tiny_source(tmp_path / "source")
    split(source)
    checkpoint = open_hugging_face(source)
    places = [checkpoint.weights.tensors[tensor_name(path)] for path in checkpoint.reading_order()]
    read = [(place.file, place.offset) for place in places]
    assert read == sorted(read)
    assert len(read) == len(checkpoint.weights.tensors)
    assert {file.name for file, _ in read} == {"a.safetensors", "b.safetensors"}


@pytest.mark.parametrize("address", ["https://huggingface.co/org/name", "hf://org/name", "file:///models/llama"])
def test_addresses_of_no_store_are_an_error_in_words(address, tmp_path, capsys):
    source = tiny_source(tmp_path / "source")
    for arguments in (
        ["inspect", address],
        ["convert", address, str(tmp_path / "a")],
        ["convert", str(source), address],
    ):
        assert main(arguments) == 2
        assert f"error: {address} is no address that can be read: give a directory" in capsys.readouterr().err
    with pytest.raises(ValueError, match="or a hub repository as org/name"):
        pipedec_jax.load(address)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_a_destination_whose_path_is_not_utf_8_is_refused(tmp_path, capsys):
    destination = os.fsdecode(os.fsencode(tmp_path) + b"/m\xf6del")
    assert main(["convert", str(tiny_source(tmp_path / "source")), destination]) == 2
    assert "is not valid UTF-8; choose another name" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
