import dataclasses
import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints_convert import convert
from checkpoints_convert.cache import stamp
from pipedec_jax import exit_store
from pipedec_jax.disk_cache import cache_directory
from pipedec_jax.exit_store import (
    find_exit_head,
    fingerprint,
    load_exit_head,
    save_exit_head,
    stored_exit_heads,
)
from pipedec_jax.loading import Model, load
from pipedec_jax.model.exit_head import ExitHeadConfig, head_shapes
from pipedec_jax.model.parameters import MemorySource, nest, parameter_shapes
from tests.conftest import copy_target, store_head

HEAD = ExitHeadConfig(2, "block", width=16)


def save(directory, head=HEAD, dtype="float32", agreement=None):
    return store_head(directory, head, agreement, dtype)


def zeros(head, target):
    return nest({path: np.zeros(shape, np.float32) for path, shape in head_shapes(head, target).items()})


@pytest.fixture
def directory(tmp_path, family):
    return copy_target(family, tmp_path)


def test_a_stored_head_is_read_back(directory):
    saved = save(directory, agreement={"1": 0.5})
    head = load_exit_head(load(directory), 2)
    assert head.config == HEAD
    assert head.agreement == {"1": 0.5}
    np.testing.assert_array_equal(head.params["layers"]["0"]["query"], saved["layers"]["0"]["query"])
    save(directory, dtype="bfloat16")
    assert load_exit_head(load(directory), 2, "block-16").params["head"].dtype.name == "bfloat16"


def test_others_may_read_a_stored_head(directory):
    save(directory)
    for name in ("head.safetensors", "head.json"):
        assert (directory / "exits" / HEAD.name / name).stat().st_mode & 0o444 == 0o444


def test_a_head_that_is_half_replaced_does_not_exist(directory, monkeypatch):
    """Else its new weights would be taken for what the old description says."""
    save(directory, agreement={"1": 0.9})

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exit_store, "write_whole", stop)
        with pytest.raises(KeyboardInterrupt):
            save(directory, agreement={"1": 0.1})
    assert stored_exit_heads(directory) == []
    save(directory, agreement={"1": 0.2})
    assert load_exit_head(load(directory), 2).agreement == {"1": 0.2}


def test_of_several_heads_the_one_that_agrees_most_is_taken_unless_one_is_named(directory):
    save(directory, agreement={"1": 0.7})
    save(directory, ExitHeadConfig(2, "norm-linear"), agreement={"1": 0.8})
    save(directory, ExitHeadConfig(2, "block", width=8))  # how well it agrees nobody knows
    save(directory, ExitHeadConfig(1, "norm-linear"))
    target = load(directory)
    names = ["1-norm-linear", "2-block-16", "2-block-8", "2-norm-linear"]
    assert [head.name for head in stored_exit_heads(target)] == names
    assert find_exit_head(target, 2).variant == "norm-linear"
    for name in ("block-16", "2-block-16", "block", "2-block"):
        assert find_exit_head(target, 2, name) == HEAD
    with pytest.raises(FileNotFoundError, match="no exit head 2-bl "):
        find_exit_head(target, 2, "bl")


def test_stored_heads_are_in_the_order_of_their_exits(directory):
    config = dataclasses.replace(load(directory).config, layers=12)
    for layer in (10, 9):
        head = ExitHeadConfig(layer, "norm-linear")
        save_exit_head(directory, head, config, zeros(head, config), "", "float32")
    assert [head.exit_layer for head in stored_exit_heads(directory)] == [9, 10]


def test_the_untrained_head_needs_no_file(directory):
    head = load_exit_head(load(directory), 3, "target")
    assert head.config == ExitHeadConfig(3, "target")
    assert head.params == {}


def test_a_head_of_other_weights_is_refused(directory):
    save(directory)
    weights = directory / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.3.mlp.up_proj.weight"][0] += 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="belongs to another target"):
        load_exit_head(load(directory), 2)


def test_a_model_in_memory_is_known_by_its_weights_not_by_its_name(directory):
    """One that was trained further may be called as what it came of, whose heads it does not have any more."""
    save(directory)
    stored = load(directory)
    assert load_exit_head(stored, 2).config == HEAD, "the fingerprint is kept now"
    source = stored.source
    arrays = {path: source.read(path) for path in parameter_shapes(source.config)}
    for factor in (1, 2):
        changed = arrays | {"final_norm": factor * arrays["final_norm"]}
        weights = MemorySource(source.config, nest(changed))
        model = Model(source.config, stored.tokenizer, lambda weights=weights: weights, name=str(directory))
        if factor == 1:
            assert load_exit_head(model, 2).config == HEAD
            continue
        with pytest.raises(ValueError, match="belongs to another target: its weights are not those of"):
            load_exit_head(model, 2)


def test_a_head_drafts_for_its_target_made_int8_while_it_is_loaded(directory, tmp_path):
    save(directory)
    assert load_exit_head(load(directory, int8=True), 2).config == HEAD
    # Stored as int8 it is another target, with heads of its own.
    int8 = convert(directory, tmp_path / "int8", int8=True)
    shutil.copytree(directory / "exits", int8 / "exits")
    with pytest.raises(ValueError, match="belongs to another target"):
        load_exit_head(load(int8), 2)
    save(int8)
    assert load_exit_head(load(int8), 2).config == HEAD


def test_a_targets_weights_are_read_once_for_its_heads(directory, monkeypatch):
    save(directory)
    load_exit_head(load(directory), 2)
    with monkeypatch.context() as patch:
        patch.setattr("pipedec_jax.exit_store.fingerprint", lambda _: pytest.fail("weights were read"))
        assert load_exit_head(load(directory, int8=True), 2).config == HEAD
        os.utime(directory / "model.safetensors", ns=(1, 1))  # other files, as far as can be told
        with pytest.raises(pytest.fail.Exception, match="weights were read"):
            load_exit_head(load(directory), 2)
    load_exit_head(load(directory), 2)
    kept = cache_directory() / "fingerprints" / stamp(directory.resolve())
    kept.write_bytes(kept.read_bytes()[:20])  # half written
    assert load_exit_head(load(directory), 2).config == HEAD
    # Where nothing can be kept they are read each time.
    (directory / "file").touch()
    monkeypatch.setenv("PIPEDEC_JAX_CACHE", str(directory / "file"))
    assert load_exit_head(load(directory), 2).config == HEAD


def test_a_head_of_another_geometry_is_refused_before_weights_are_read(directory, monkeypatch):
    save(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    target = load(directory)
    monkeypatch.setattr("pipedec_jax.loading.Model.source", property(lambda _: pytest.fail("weights were read")))
    with pytest.raises(ValueError, match="another geometry"):
        load_exit_head(target, 2)


def test_a_converted_target_has_the_fingerprint_of_its_source(directory, tmp_path):
    convert(directory, tmp_path / "converted")
    assert fingerprint(load(tmp_path / "converted").source) == fingerprint(load(directory).source)


def test_a_fingerprint_is_of_the_values_and_the_geometry_not_of_how_they_are_stored(directory, monkeypatch):
    config, noise = load(directory).config, np.random.default_rng(0)
    arrays = {
        path: noise.normal(size=shape).astype(ml_dtypes.bfloat16) for path, shape in parameter_shapes(config).items()
    }
    monkeypatch.setattr(exit_store, "SAMPLE", 10)

    def of(config=config, **changes):
        return fingerprint(MemorySource(config, nest(arrays | changes)))

    before = of()
    assert of(**{path: array.astype(np.float32) for path, array in arrays.items()}) == before
    assert of(dataclasses.replace(config, norm_eps=1e-3)) != before
    for place in (0, -1):
        other = arrays["embedding"].copy()
        other[place, place] += 1
        assert of(embedding=other) != before, "the sample reaches from one end to the other"


@pytest.mark.parametrize(
    ("layer", "name", "error", "message"),
    [
        (3, None, FileNotFoundError, "stored: 2-block-16"),
        (2, "norm-linear", FileNotFoundError, "no exit head 2-norm-linear"),
        (4, None, ValueError, "choose 1 to 3"),
        (4, "target", ValueError, "choose 1 to 3"),
        (0, None, ValueError, "positive whole number"),
    ],
)
def test_a_head_that_is_not_there_is_an_error(directory, layer, name, error, message):
    save(directory)
    with pytest.raises(error, match=message):
        find_exit_head(load(directory), layer, name)


def test_damaged_files_are_an_error(directory):
    save(directory)
    folder = directory / "exits" / "2-block-16"
    whole = (folder / "head.safetensors").read_bytes()
    (folder / "head.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="train the head again"):
        load_exit_head(load(directory), 2)
    save_file({"head": np.zeros((16, 416), np.float32)}, folder / "head.safetensors")
    with pytest.raises(ValueError, match=r"head.safetensors lacks \[.* train the head again"):
        load_exit_head(load(directory), 2)
    (folder / "head.safetensors").write_bytes(whole)
    description = json.loads((folder / "head.json").read_text())
    (folder / "head.json").write_text(json.dumps(description | {"version": 2}))
    with pytest.raises(ValueError, match="has version 2"):
        load_exit_head(load(directory), 2)
    (folder / "head.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"head.json is damaged \(UnicodeDecodeError"):
        load_exit_head(load(directory), 2)
    (folder / "head.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        load_exit_head(load(directory), 2)
    for key, value in (
        ("agreement", "high"),
        ("agreement", {"1": "high"}),
        ("agreement", {"all": 0.5}),
        ("target", {}),
        ("head", "2-block-16"),
    ):
        (folder / "head.json").write_text(json.dumps(description | {key: value}))
        with pytest.raises(ValueError, match=r"head.json is incomplete; train the head again"):
            load_exit_head(load(directory), 2)
    (folder / "head.json").write_text(json.dumps(description | {"head": {"exit_layer": 2, "variants": 3}}))
    with pytest.raises(ValueError, match=r"head.json is damaged \(unknown key 'variants'"):
        load_exit_head(load(directory), 2)


def test_a_head_in_a_folder_of_another_name_is_an_error(directory):
    save(directory)
    shutil.copytree(directory / "exits" / "2-block-16", directory / "exits" / "kept")
    with pytest.raises(ValueError, match=r"kept.head.json describes the head 2-block-16: give its folder that name"):
        load_exit_head(load(directory), 2)


def test_arrays_that_are_not_the_heads_are_not_saved(directory):
    target = load(directory)
    with pytest.raises(ValueError, match="lacks"):
        save_exit_head(directory, HEAD, target.config, {"head": np.zeros((16, 416))}, "", "float32")
    linear = ExitHeadConfig(2, "norm-linear")
    with pytest.raises(ValueError, match="dtype 'int4' is not supported"):
        save_exit_head(directory, linear, target.config, zeros(linear, target.config), "", "int4")
    assert stored_exit_heads(target) == []
