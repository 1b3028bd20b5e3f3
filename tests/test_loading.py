"""Opening models: converted and Hugging Face directories, end tokens, the demo family, and paths that are none."""

import dataclasses
import json
import shutil
import types

import jax
import numpy as np
import pytest

import pipedec_jax
from checkpoints_convert import convert, open_hugging_face
from pipedec_jax import loading
from pipedec_jax.model.parameters import nest, parameter_shapes
from pipedec_jax.tokenizer import check_same_tokens


def test_a_converted_and_a_hugging_face_directory_are_the_same_model(family, tmp_path):
    source = pipedec_jax.load(family["target"])
    converted = pipedec_jax.load(convert(family["target"], tmp_path / "converted"))
    assert source.config == converted.config
    assert source.end_tokens == converted.end_tokens == (1, 2)
    assert source.tokenizer.vocabulary == converted.tokenizer.vocabulary
    assert source.chat("Hi") == converted.chat([{"role": "user", "content": "Hi"}])
    for path in ("embedding", "layers/3/query"):
        np.testing.assert_array_equal(source.source.read(path), converted.source.read(path))


def test_safetensors_are_read_as_they_are_and_pickled_files_converted_when_needed(family, tmp_path):
    import torch
    from safetensors.torch import load_file

    cache = tmp_path / "cache"
    direct = pipedec_jax.load(family["target"], cache_dir=cache)
    assert direct.source.directory == family["target"]

    pickled = shutil.copytree(family["target"], tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Not a directory \(PIPEDEC_JAX_CACHE names another cache\): .*/file/"):
        _ = pipedec_jax.load(pickled, cache_dir=tmp_path / "file").source
    model = pipedec_jax.load(pickled, cache_dir=cache)
    assert not cache.exists()
    first = model.source
    assert model.source is first, "opened once"
    assert len(list(cache.iterdir())) == 1
    again = pipedec_jax.load(pickled, cache_dir=cache).source
    assert again.directory == first.directory != pickled
    for path in ("embedding", "layers/3/query"):
        np.testing.assert_array_equal(direct.source.read(path), first.read(path))


def test_a_head_that_is_called_tied_and_is_not_is_an_error(family, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(family["target"], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'lm_head\.weight' differs from 'model\.embed_tokens\.weight'"):
        _ = pipedec_jax.load(tmp_path).source


def test_models_of_metas_load_with_their_tokenizers(tmp_path):
    from tests.checkpoints_convert.meta_files import save_as_meta
    from tests.checkpoints_convert.sources import GEOMETRIES, hugging_face_model

    model = hugging_face_model(GEOMETRIES["one KV head"] | {"vocab_size": 520})
    loaded = pipedec_jax.load(save_as_meta(model, tmp_path / "meta", max_seq_len=1024), cache_dir=tmp_path / "cache")
    assert loaded.end_tokens == (263, 270, 271)
    assert loaded.vocab_size == 518
    assert loaded.source.read("layers/2/down").shape == (96, 64)
    converted = pipedec_jax.load(convert(tmp_path / "meta", tmp_path / "converted"))
    assert converted.tokenizer.vocabulary == loaded.tokenizer.vocabulary
    assert converted.end_tokens == loaded.end_tokens


def test_padding_rows_of_the_embedding_are_no_tokens(family):
    model = pipedec_jax.load(family["target"])
    assert (model.config.vocab_size, model.tokenizer.size, model.vocab_size) == (416, 400, 400)
    narrow = dataclasses.replace(model.config, vocab_size=300)
    assert loading.Model(narrow, model.tokenizer, lambda: model.source).vocab_size == 300, "nor are ids without a row"


def test_the_tokenizer_names_the_end_where_the_checkpoint_does_not(family, tmp_path):
    shutil.copytree(family["target"], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("eos_token_id")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_hugging_face(tmp_path).eos_token_ids == []
    assert pipedec_jax.load(tmp_path).end_tokens == (1,)


def test_an_empty_chat_is_an_error(family):
    with pytest.raises(ValueError, match="the prompt is empty"):
        pipedec_jax.load(family["target"]).chat("")


def test_paths_that_are_no_checkpoint_are_named(family, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: give a converted checkpoint or"):
        pipedec_jax.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is no checkpoint"):
        pipedec_jax.load(tmp_path)
    shutil.copytree(family["target"], tmp_path / "bare")
    for file in (tmp_path / "bare").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        pipedec_jax.load(tmp_path / "bare")
    shutil.copytree(family["target"], tmp_path / "weightless")
    (tmp_path / "weightless" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        pipedec_jax.load(tmp_path / "weightless")


def test_the_demo_family_is_named():
    with pytest.raises(ValueError, match="the demo family has target, middle, draft, not 'big'"):
        pipedec_jax.load_demo("big")
    assert loading.demo_directory("draft").parts[-3:] == ("pipedec_jax", "demo", "draft")


def test_the_demo_family_shares_its_tokens():
    if not (loading.demo_directory("target") / "config.json").is_file():
        pytest.skip("the demo family has not been trained")
    models = [pipedec_jax.load_demo(name) for name in loading.DEMO]
    for model in models[1:]:
        check_same_tokens(models[0].tokenizer, model.tokenizer)
    assert [model.config.layers for model in models] == sorted((model.config.layers for model in models), reverse=True)
    assert all(model.config.context == 2048 and model.end_tokens for model in models)


def test_public_names_exist_and_others_do_not():
    for name in pipedec_jax.__all__:
        assert getattr(pipedec_jax, name) is not None
    assert set(pipedec_jax.__all__) <= set(dir(pipedec_jax))
    with pytest.raises(AttributeError, match="no attribute 'Decode'"):
        _ = pipedec_jax.Decode


def test_short_names_keep_models_apart():
    cache = "/c/models--org--name/snapshots/"
    for given, expected in {
        ("/a/b/target", "/a/b/draft"): ["target", "draft"],
        ("/a/model", "/b/model", "c"): ["a/model", "b/model", "c"],
        ("/x/a/model", "/y/a/model", "/z/model"): ["x/a/model", "y/a/model", "z/model"],
        ("model", "a/model"): ["model", "a/model"],
        ("/a/model", "a/model"): ["/a/model", "a/model"],
        (f"{cache}1a", "/a/model"): ["name", "model"],
        (f"{cache}1a", "/b/name"): ["org/name", "b/name"],
        (f"{cache}1a", f"{cache}2b"): [f"{cache}1a", f"{cache}2b"],
        ("model", "model"): ["model"],
        ("/",): ["/"],
    }.items():
        assert list(loading.short_names(given).values()) == expected


class Own:
    """A `ParameterSource` of a user's own; `part` says what it makes of one."""

    def __init__(self, source, part):
        self.config, self._source, self._part = source.config, source, part

    def read(self, path, part=None):
        return self._part(jax.numpy.asarray(self._source.read(path)), part)


def test_a_parameter_source_of_ones_own_may_give_jaxs_arrays_and_what_it_gives_wrong_is_named(family):
    stored = pipedec_jax.load(family["target"])

    def decoder(weights):
        model = pipedec_jax.Model(stored.config, stored.tokenizer, lambda: weights)
        return pipedec_jax.Decoder(model, method="pp", stages=2, tensor_parallel=1, dtype="float32")

    def cut(array, part):
        return array if part is None else array[part]

    expected = pipedec_jax.Decoder(stored, method="pp", stages=2, dtype="float32").generate("x", max_new_tokens=5)
    assert decoder(Own(stored.source, cut)).generate("x", max_new_tokens=5).token_ids == expected.token_ids
    named = r"Own.read\('embedding', part=\(slice.* must give an array of shape \[208, 32\], not \[416, 32\]"
    with pytest.raises(ValueError, match=named):
        decoder(Own(stored.source, lambda array, _: array)).prepare()
    with pytest.raises(ValueError, match=r"object.config must be a LlamaConfig, not 3"):
        decoder(types.new_class("object", exec_body=lambda body: body.update(config=3, read=print))()).prepare()
    tree = nest({path: stored.source.read(path) for path in parameter_shapes(stored.config)})
    with pytest.raises(ValueError, match="'final_norm' must be an array, not a list"):
        pipedec_jax.MemorySource(stored.config, tree | {"final_norm": [1.0] * stored.config.width})
