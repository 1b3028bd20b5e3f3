"""Every format that a LLaMA model comes in becomes the same checkpoint, told apart without flags."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from checkpoint_trials.synthetic import sentencepiece_model
from checkpoints_convert import convert, open_checkpoint, open_source
from checkpoints_convert.__main__ import main
from checkpoints_convert.reference_logits import reference_logits
from checkpoints_convert.verify import differences, logit_difference
from pipedec_jax.config import Llama3Scaling
from pipedec_jax.model import llama
from tests.checkpoints_convert.meta_files import save_as_meta, write_tiktoken
from tests.checkpoints_convert.sources import (
    GEOMETRIES,
    edit_json,
    edit_manifest,
    halve,
    hugging_face_model,
    same_arrays,
    save,
    save_pickled,
)

LLAMA_1, LLAMA_2, ONE_KV = (
    "LLaMA 1: as many KV heads as heads",
    "LLaMA 2 70B: grouped queries",
    "one KV head",
)
EVEN = 528
"""A vocabulary that several files can share, with room for a tokenizer of bytes and special tokens."""
PROMPT = np.random.default_rng(0).integers(EVEN, size=(1, 500), dtype=np.int32)


def logits_agree(model, checkpoint) -> None:
    with torch.no_grad():
        prompt = PROMPT % model.config.vocab_size
        expected = model.double()(torch.from_numpy(prompt).long()).logits.numpy()
    weights = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), checkpoint.read_all())
    forward = jax.jit(functools.partial(llama.forward, checkpoint.config))
    found = np.asarray(forward(weights, jnp.asarray(prompt)))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pickled_files_equal_safetensors(shards, dtype, tmp_path):
    model = hugging_face_model(GEOMETRIES[LLAMA_2])
    theirs = open_source(save(model, tmp_path / "safetensors", dtype))
    source = save_pickled(model, tmp_path / "pickled", dtype, shards)
    converted = convert(source, tmp_path / "converted")
    assert open_source(source).format == "huggingface-pickle"
    assert same_arrays(open_checkpoint(converted), theirs)
    assert list(differences(source, converted)) == []
    # The conversions differ in what they say of their sources, and in nothing else.
    other = convert(tmp_path / "safetensors", tmp_path / "other")
    values = [json.loads((place / "pipedec_jax.json").read_text()) for place in (converted, other)]
    assert values[0].pop("source") != values[1].pop("source")
    assert values[0].pop("manifest") != values[1].pop("manifest")
    assert values[0] == values[1]


@pytest.mark.parametrize("geometry", [LLAMA_2, "LLaMA 3.2: tied, scaled RoPE"])
def test_logits_of_pickled_files(geometry, tmp_path):
    model = hugging_face_model(GEOMETRIES[geometry])
    logits_agree(model, open_checkpoint(convert(save_pickled(model, tmp_path / "a"), tmp_path / "b")))


META = {
    "one file": (LLAMA_1, 1, False, {}),
    "four files, LLaMA 1 and 2's embedding": (LLAMA_1, 4, False, {}),
    "two files, grouped queries": (LLAMA_2, 2, False, {}),
    "more files than KV heads": (LLAMA_2, 4, False, {}),
    "one KV head in all files": (ONE_KV, 4, True, {}),
    "LLaMA 3": ("LLaMA 3: large theta", 2, True, {"rope_theta": 500000.0}),
    "LLaMA 3.1": ("LLaMA 3.1: scaled RoPE", 2, True, {"rope_theta": 500000.0, "use_scaled_rope": True}),
    "LLaMA 3.2": ("LLaMA 3.2: tied, scaled RoPE", 1, True, {"rope_theta": 500000.0, "use_scaled_rope": True}),
}


def as_published(geometry: dict, scaled: bool) -> dict:
    """The geometry with the released models' original context, which Meta's files do not state."""
    if not scaled:
        return geometry | {"vocab_size": EVEN}
    return (
        geometry
        | {"vocab_size": EVEN, "max_position_embeddings": 16384}
        | {"rope_parameters": geometry["rope_parameters"] | {"original_max_position_embeddings": 8192}}
    )


@pytest.mark.parametrize("name", META)
def test_metas_files_equal_hugging_faces(name, tmp_path):
    geometry, ranks, llama3, params = META[name]
    model = hugging_face_model(as_published(GEOMETRIES[geometry], "use_scaled_rope" in params))
    source = save_as_meta(
        model, tmp_path / "meta", ranks, llama3, max_seq_len=model.config.max_position_embeddings, **params
    )
    theirs = open_source(save(model, tmp_path / "hugging_face"))
    converted = convert(source, tmp_path / "converted")
    assert open_source(source).format == "meta"
    assert same_arrays(open_checkpoint(converted), theirs)
    assert list(differences(source, converted)) == []
    # Of the others, Hugging Face's file has the same bits, and logits of its own test.
    if (ranks > 1 and (llama3 or geometry == LLAMA_1)) or "3.2" in geometry:
        logits_agree(model, open_checkpoint(converted))


def test_a_head_of_metas_that_begins_as_the_embedding_must_be_it(tmp_path):
    model = hugging_face_model(GEOMETRIES[LLAMA_1] | {"vocab_size": EVEN})
    embedding = model.model.embed_tokens.weight.detach().clone()
    model.lm_head.weight.data = embedding.clone()
    assert open_source(save_as_meta(model, tmp_path / "tied")).config.tied_embeddings
    assert "head" not in open_checkpoint(convert(tmp_path / "tied", tmp_path / "converted")).manifest.arrays
    model.lm_head.weight.data[-1, -1] += 1
    with pytest.raises(ValueError, match=r"'output\.weight' differs from 'tok_embeddings\.weight' though both begin"):
        convert(save_as_meta(model, tmp_path / "damaged"), tmp_path / "other")


def test_parts_of_one_tensor_must_have_one_dtype(meta, tmp_path):
    source = shutil.copytree(meta, tmp_path / "source")
    edit_rank(source, 0, output__weight=torch.load(source / "consolidated.00.pth")["output.weight"].half())
    with pytest.raises(ValueError, match=r"'output\.weight' is float32 in consolidated\.01\.pth, float16 before"):
        convert(source, tmp_path / "converted", "float32")


def test_metas_files_beside_a_config_of_hugging_faces_are_metas(meta, source, tmp_path):
    both = shutil.copytree(meta, tmp_path / "both")
    shutil.copy(source / "config.json", both)
    assert same_arrays(open_source(both), open_source(meta))
    shutil.copytree(source, both, dirs_exist_ok=True)
    assert open_source(both).format == "huggingface-safetensors"
    with pytest.raises(FileNotFoundError, match="is a converted checkpoint; give the model that it was made from"):
        open_source(convert(source, tmp_path / "converted"))


def test_metas_files_in_bfloat16(tmp_path):
    model = hugging_face_model(as_published(GEOMETRIES[LLAMA_2], False)).to(torch.bfloat16)
    source = save_as_meta(model, tmp_path / "meta", 2, False, max_seq_len=1024)
    assert same_arrays(open_source(source), open_source(save(model, tmp_path / "hugging_face", "bfloat16")))


@pytest.mark.parametrize(
    ("params", "context", "scaling"),
    [
        ({"norm_eps": 1e-6}, 2048, None),
        ({"norm_eps": 1e-5}, 4096, None),
        ({"rope_theta": 1e6}, 16384, None),
        ({"rope_theta": 5e5}, 8192, None),
        ({"rope_theta": 5e5, "use_scaled_rope": True}, 131072, Llama3Scaling(8.0, 1.0, 4.0, 8192)),
        ({"rope_theta": 5e5, "use_scaled_rope": True, "rope_scaling_factor": 16.0, "max_seq_len": 77}, 77,
         Llama3Scaling(16.0, 1.0, 4.0, 8192)),
    ],
)  # fmt: skip
def test_what_params_json_leaves_out_is_known_from_the_release(params, context, scaling, tmp_path):
    found = open_source(save_as_meta(hugging_face_model(GEOMETRIES[LLAMA_1]), tmp_path, **params)).config
    assert (found.context, found.rope_scaling) == (context, scaling)
    assert found.rope_theta == params.get("rope_theta", 1e4)


def test_llama_1_has_a_buffer_in_every_layer(tmp_path):
    # That of 65B has LLaMA 2's epsilon.
    geometry = {"vocab_size": EVEN, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
    model = hugging_face_model(GEOMETRIES[LLAMA_1] | geometry)
    source = save_as_meta(model, tmp_path / "meta", 2, llama3=False, norm_eps=1e-5)
    assert open_source(source).config.context == 4096
    for rank in range(2):
        buffers = {f"layers__{layer}__attention__inner_attention__rope__freqs": torch.ones(8) for layer in range(2)}
        edit_rank(source, rank, **buffers)
    assert open_source(source).config.context == 2048
    assert same_arrays(open_source(source), open_source(save(model, tmp_path / "hugging_face")))


def test_special_tokens_of_metas_files(tmp_path):
    model = hugging_face_model(GEOMETRIES[LLAMA_1])
    newer = open_source(save_as_meta(model, tmp_path / "3"))
    assert (newer.bos_token_id, newer.eos_token_ids) == (262, [263, 270, 271])
    older = save_as_meta(model, tmp_path / "1" / "7B", llama3=False)
    assert (open_source(older).bos_token_id, open_source(older).eos_token_ids) == (1, [2])
    # LLaMA 1 came with one tokenizer beside the directories of all sizes.
    (older / "tokenizer.model").rename(older.parent / "tokenizer.model")
    assert open_source(older).eos_token_ids == [2]
    assert (convert(older, tmp_path / "converted") / "tokenizer.model").read_bytes() == sentencepiece_model()


FORMATS = {
    "safetensors": lambda model, place: save(model, place),
    "safetensors, sharded": lambda model, place: save(model, place, max_shard_size="200KB"),
    "pickled": lambda model, place: save_pickled(model, place),
    "pickled, sharded": lambda model, place: save_pickled(model, place, shards=3),
    "Meta's": lambda model, place: save_as_meta(model, place, max_seq_len=16384, **META["LLaMA 3.1"][3]),
    "Meta's, two files": lambda model, place: save_as_meta(model, place, 2, max_seq_len=16384, **META["LLaMA 3.1"][3]),
}


@pytest.mark.parametrize("form", FORMATS)
def test_verify_compares_every_format_with_its_source(form, tmp_path, capsys):
    model = hugging_face_model(as_published(GEOMETRIES["LLaMA 3.1: scaled RoPE"], True))
    source = FORMATS[form](model, tmp_path / "source")
    converted = convert(source, tmp_path / "converted", "bfloat16" if "sharded" in form else None)
    command = ["verify", str(source), str(converted)]
    assert main(command) == 0
    assert "logits, float32: max|difference| / max|logit| = " in capsys.readouterr().out
    logits = reference_logits(open_source(source), PROMPT[:, :9], "float32")
    with torch.no_grad():
        expected = model.float()(torch.from_numpy(PROMPT[:, :9]).long()).logits.numpy()
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    # The same weights under another RoPE: only the logits can tell.
    values = json.loads((converted / "pipedec_jax.json").read_text())
    edit_manifest(converted, model=values["model"] | {"rope_theta": 1e4})
    assert logit_difference(source, converted) > 1e-2


def test_verify_tells_a_wrong_permutation_of_metas_heads_by_the_logits(tmp_path, capsys, monkeypatch):
    # Both sides of the comparison of arrays would have it.
    monkeypatch.setattr("checkpoints_convert.meta.halves_from_pairs", lambda tensor, _: tensor)
    source = save_as_meta(hugging_face_model(GEOMETRIES[LLAMA_2] | {"vocab_size": EVEN}), tmp_path / "meta", 2, False)
    assert main(["verify", str(source), str(convert(source, tmp_path / "converted"))]) == 1
    assert "all tensors are as in the source" in capsys.readouterr().out


def spoil_meta(**changes):
    return lambda source: edit_json(source / "params.json", **changes)


def edit_rank(source, rank=1, **changes):
    file = source / f"consolidated.{rank:02d}.pth"
    tensors = torch.load(file) | {name.replace("__", "."): value for name, value in changes.items()}
    torch.save({name: value for name, value in tensors.items() if value is not None}, file)


BAD_META = {
    "missing rank": (lambda s: (s / "consolidated.00.pth").unlink(), r"lacks consolidated\.00\.pth"),
    "missing last rank": (
        lambda s: (s / "consolidated.01.pth").unlink(), r"lacks consolidated\.01\.pth: the tensors are split over 2 f"),
    "file too many": (
        lambda s: shutil.copy(s / "consolidated.01.pth", s / "consolidated.02.pth"), "but consolidated.02.pth is"),
    "missing tensor": (lambda s: edit_rank(s, norm__weight=None), r"01\.pth: the checkpoint lacks tensors 'norm\.w"),
    "norms that differ": (lambda s: edit_rank(s, norm__weight=torch.ones(64)), "'norm.weight' should be the same"),
    "unknown tensor": (lambda s: edit_rank(s, bias=torch.ones(3)), "01.pth: the checkpoint has unknown tensors 'bias'"),
    "misshapen part": (
        lambda s: edit_rank(s, output__weight=torch.ones(3, 64)), r"'output\.weight' has shape \(3, 64\), params.json"),
    "integers": (lambda s: edit_rank(s, norm__weight=torch.ones(64, dtype=torch.int8)), "is stored as int8"),
    "truncated": (lambda s: halve(s / "consolidated.01.pth"), r"01\.pth is no complete PyTorch file"),
    "no width": (spoil_meta(dim=...), r"params\.json: the configuration lacks 'dim'"),
    "heads": (spoil_meta(n_heads=7), r"dim \(64\) is no multiple of n_heads \(7\)"),
    "layers": (spoil_meta(n_layers=10**9), "layers must be at most"),
    "vocabulary": (spoil_meta(vocab_size=99), "vocab_size is 99, but the embedding has 528 rows"),
    "quantized": (spoil_meta(quantization_args={"scheme": "int4"}), "quantization_args is present"),
    "scaled RoPE": (spoil_meta(use_scaled_rope="yes"), "use_scaled_rope must be true or false, not 'yes'"),
    "tokenizer": (lambda s: (s / "tokenizer.model").write_bytes(b"YQ== 0\nYg== 5\n"), "not numbered from 0"),
}  # fmt: skip


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
    model = hugging_face_model(GEOMETRIES[LLAMA_1] | {"vocab_size": EVEN})
    return save_as_meta(model, tmp_path_factory.mktemp("meta") / "source", 2)


@pytest.mark.parametrize("name", BAD_META)
def test_bad_files_of_metas_are_named(name, meta, tmp_path, capsys):
    spoil, message = BAD_META[name]
    source = shutil.copytree(meta, tmp_path / "source")
    spoil(source)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert(source, tmp_path / "converted")
    assert main(["convert", str(source), str(tmp_path / "converted")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_original_folder_of_a_repository_is_pointed_to(meta, tmp_path):
    shutil.copytree(meta, tmp_path / "original")
    with pytest.raises(FileNotFoundError, match=r"\(but .*original is one\)"):
        open_source(tmp_path)


def test_tiktoken_files_without_a_gap(tmp_path):
    from pipedec_jax.tiktoken_file import is_tiktoken, read_ranks

    write_tiktoken(tmp_path / "tokenizer.model")
    assert is_tiktoken(tmp_path / "tokenizer.model")
    assert read_ranks(tmp_path / "tokenizer.model")[b"hello"] == 259
    (tmp_path / "tokenizer.model").write_text("aGVsbG8 0\n")
    with pytest.raises(ValueError, match="line 1 is not valid base64"):
        read_ranks(tmp_path / "tokenizer.model")
