import asyncio
import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from checkpoint_trials.synthetic import write_tokenizer
from checkpoints_convert import (
    cache,
    conversion,
    convert,
    convert_cached,
    export,
    export_hugging_face,
    is_converted,
    open_any,
    open_checkpoint,
    open_hugging_face,
)
from checkpoints_convert.checkpoint import DTYPES
from checkpoints_convert.source import same_bits
from checkpoints_convert.verify import damage, differences
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.parameters import flatten, parameter_shapes
from tests.checkpoints_convert.sources import (
    FAMILIES,
    GEOMETRIES,
    TINY,
    edit_json,
    hugging_face_model,
    save,
    stop_at,
    tiny_source,
    tiny_tree,
)

TIED = dataclasses.replace(TINY, tied_embeddings=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_tensors_come_back_bit_for_bit(name, dtype, tmp_path):
    # Sharded as transformers does it; `load_file` on its shards is the reference, which shares no code with ours.
    source = save(hugging_face_model(GEOMETRIES[name]), tmp_path / "source", dtype, max_shard_size="60KB")
    shards = sorted(source.glob("model-*.safetensors"))
    assert len(shards) > 1
    expected = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}

    checkpoint = open_checkpoint(convert(source, tmp_path / "converted"))
    assert checkpoint.dtype == dtype
    export_hugging_face(checkpoint.config, checkpoint.read_all(), tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        assert same_bits(found[tensor], value), tensor


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_become_llamas_of_the_same_bits(name, tmp_path):
    source = save(hugging_face_model(FAMILIES[name]), tmp_path / "source", "bfloat16")
    expected = load_file(source / "model.safetensors")
    converted = convert(source, tmp_path / "converted")
    assert list(differences(source, converted)) == []

    found = load_file(export(converted, tmp_path / "back") / "model.safetensors")
    added = {f"model.layers.{layer}.self_attn.o_proj.bias" for layer in range(2)} if name == "Qwen2" else set()
    assert found.keys() == expected.keys() | added
    assert all(same_bits(found[tensor], value) for tensor, value in expected.items())
    assert all(same_bits(found[tensor], np.zeros(64, DTYPES["bfloat16"])) for tensor in added)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert open_checkpoint(converted).config == open_hugging_face(tmp_path / "back").config


configs = st.builds(
    lambda kv, groups, half, **rest: LlamaConfig(heads=kv * groups, kv_heads=kv, head_size=2 * half, **rest),
    kv=st.integers(1, 3), groups=st.integers(1, 3), half=st.integers(1, 3), vocab_size=st.integers(1, 9),
    width=st.integers(1, 9), feed_forward=st.integers(1, 9), layers=st.integers(1, 3), context=st.integers(1, 99),
    tied_embeddings=st.booleans(),
)  # fmt: skip


@settings(max_examples=12, deadline=None)
@given(config=configs, dtype=st.sampled_from(list(DTYPES)))
def test_any_geometry_goes_out_and_comes_back(config, dtype, tmp_path_factory):
    directory = tmp_path_factory.mktemp("any")
    tree = jax.tree.map(lambda array: np.asarray(array).astype(DTYPES[dtype]), tiny_tree(config))
    export_hugging_face(config, tree, directory / "source")
    write_tokenizer(directory / "source", min(config.vocab_size, 6))
    checkpoint = open_checkpoint(convert(directory / "source", directory / "converted"))
    assert (checkpoint.config, checkpoint.dtype) == (config, dtype)
    for path, array in flatten(tree):
        assert same_bits(checkpoint.read(path), array), path
        assert same_bits(open_hugging_face(directory / "source").read(path), array), path


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chosen_dtype_rounds_as_torch_does(dtype, tmp_path):
    import torch

    model = hugging_face_model(GEOMETRIES["one KV head"])
    expected = model.model.layers[1].mlp.down_proj.weight.detach().to(getattr(torch, dtype)).float().numpy()
    checkpoint = open_checkpoint(convert(save(model, tmp_path / "source"), tmp_path / "converted", dtype))
    assert checkpoint.dtype == dtype
    assert np.array_equal(checkpoint.read("layers/1/down").astype(np.float32).T, expected)


def test_one_array_per_layer_and_tensor_that_orbax_restores(source, tmp_path):
    converted = convert(source, tmp_path / "converted")
    restored = orbax.checkpoint.StandardCheckpointer().restore(converted / "parameters")
    found = dict(flatten(restored))
    assert {path: array.shape for path, array in found.items()} == parameter_shapes(TINY)
    assert all(same_bits(found[path], np.asarray(array)) for path, array in flatten(tiny_tree()))
    stored = {path.name for path in (converted / "parameters").iterdir() if path.is_dir()}
    assert stored == {path.replace("/", ".") for path in parameter_shapes(TINY)}


def test_orbax_restores_onto_a_mesh(source, tmp_path):
    converted = convert(source, tmp_path / "converted")
    mesh = jax.make_mesh((2,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    tree = jax.tree.map(np.asarray, tiny_tree())
    abstract = {"layers": {"0": {"gate": jax.ShapeDtypeStruct((12, 20), np.float32, sharding=sharding)}}}
    with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            converted / "parameters",
            orbax.checkpoint.args.PyTreeRestore(
                abstract,
                restore_args=orbax.checkpoint.checkpoint_utils.construct_restore_args(abstract),
                partial_restore=True,
            ),
        )
    gate = restored["layers"]["0"]["gate"]
    assert gate.sharding == sharding
    assert same_bits(np.asarray(gate), tree["layers"]["0"]["gate"])


def test_large_arrays_are_stored_in_chunks(source, tmp_path, monkeypatch):
    monkeypatch.setattr("checkpoints_convert.store.CHUNK_BYTES", 100)
    converted = convert(source, tmp_path / "converted")
    assert len(list((converted / "parameters" / "embedding").glob("[0-9]*"))) > 8
    assert not list(damage(converted))
    assert not list(differences(source, converted))


def test_chunks_are_even_and_all_of_them_count_as_needed(source, tmp_path, monkeypatch):
    # At most 11 rows of the embedding's 29, or of 20.
    monkeypatch.setattr("checkpoints_convert.store.CHUNK_BYTES", 11 * 12 * 4)
    converted = convert(source, tmp_path / "converted")
    arrays = open_checkpoint(converted).manifest.arrays
    for name, length, chunks in (("embedding", 10, 3), ("layers/0/gate", 10, 2), ("layers/0/down", 10, 2)):
        assert (arrays[name].length, arrays[name].chunks) == (length, chunks), name
    stored = sum(file.stat().st_size for file in (converted / "parameters").rglob("[0-9]*"))
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: SimpleNamespace(free=stored - 1))
    with pytest.raises(OSError, match="make room"):
        convert(source, tmp_path / "other")
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: SimpleNamespace(free=stored))
    convert(source, tmp_path / "other")


def test_an_array_of_zeros_is_stored_as_any_other(tmp_path):
    tree = tiny_tree()
    tree["layers"]["0"]["up"][:] = 0
    export_hugging_face(TINY, tree, tmp_path / "source", "float32")
    write_tokenizer(tmp_path / "source")
    converted = convert(tmp_path / "source", tmp_path / "converted")
    assert np.array_equal(open_checkpoint(converted).read("layers/0/up"), tree["layers"]["0"]["up"])
    assert list(differences(tmp_path / "source", converted)) == []


def test_files_and_special_tokens_come_along(source, tmp_path):
    (source / "chat_template.jinja").write_text("{{ x }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ y }}")
    (source / "README.md").write_text("not this one")
    converted = convert(source, tmp_path / "converted")
    checkpoint = open_checkpoint(converted)
    # generation_config.json says [2, 5], config.json [2, 3] and the only bos_token_id.
    assert (checkpoint.eos_token_ids, checkpoint.bos_token_id) == ([2, 5], 1)
    files = {path.relative_to(converted).as_posix() for path in converted.rglob("*") if path.is_file()}
    assert {path for path in files if not path.startswith("parameters/")} == {
        "pipedec_jax.json", "tokenizer.json", "generation_config.json", "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    }  # fmt: skip
    assert (converted / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("generation", "expected"), [({"eos_token_id": 7}, [7]), ({"eos_token_id": None}, [2, 3]), (None, [2, 3])]
)
def test_end_tokens_fall_back_to_config_json(source, generation, expected):
    (source / "generation_config.json").unlink()
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps(generation))
    assert open_hugging_face(source).eos_token_ids == expected


def test_of_several_tokens_that_begin_a_text_the_first_is_taken(source):
    edit_json(source / "generation_config.json", bos_token_id=[4, 9])
    assert open_hugging_face(source).bos_token_id == 4


def test_source_and_converted_read_alike(source, tmp_path):
    theirs, ours = open_any(source), open_any(convert(source, tmp_path / "converted"))
    for name in ("config", "dtype", "bos_token_id", "eos_token_ids", "nbytes"):
        assert getattr(theirs, name) == getattr(ours, name)
    assert theirs.nbytes == sum(array.nbytes for _, array in flatten(tiny_tree()))
    with pytest.raises(ValueError, match=r"unknown array 'layers/0/querry'; did you mean 'layers/0/query'\?"):
        ours.read("layers/0/querry")


def edit_tensors(source, dtype=None, **changes):
    """Replace, add or (with None) remove tensors of a single-file source; names are given with `__` for dots."""
    tensors = load_file(source / "model.safetensors")
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, source / "model.safetensors")


def test_a_tied_head_that_equals_the_embedding_is_not_stored(tmp_path):
    source = tiny_source(tmp_path / "source", TIED)
    edit_tensors(source, lm_head__weight=load_file(source / "model.safetensors")["model.embed_tokens.weight"])
    converted = convert(source, tmp_path / "converted")
    assert not (converted / "parameters" / "head").exists()
    assert not list(differences(source, converted))


def test_rotary_buffers_of_old_files_are_ignored(source, tmp_path):
    buffer = np.ones(3, np.float64)
    edit_tensors(
        source, model__layers__0__self_attn__rotary_emb__inv_freq=buffer, model__rotary_emb__inv_freq=buffer.copy()
    )
    convert(source, tmp_path / "converted")


def test_pickled_files_beside_safetensors_are_not_opened(source):
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        (source / name).write_text("anything")
    assert open_hugging_face(source).format == "huggingface-safetensors"


def test_several_stored_dtypes_need_a_choice(source, tmp_path):
    edit_tensors(source, model__norm__weight=np.ones(TINY.width, np.float16))
    checkpoint = open_hugging_face(source)
    assert (checkpoint.stored_dtypes, checkpoint.dtype) == (("float16", "float32"), "float32"), "none is rounded"
    with pytest.raises(ValueError, match=r"several dtypes \(float16, float32\); choose one with --dtype"):
        convert(source, tmp_path / "converted")
    assert open_checkpoint(convert(source, tmp_path / "converted", "float32")).dtype == "float32"


def test_conversion_works_inside_a_running_event_loop(source, tmp_path):
    # As in a notebook.
    async def cell():
        return convert(source, tmp_path / "converted")

    assert not list(differences(source, asyncio.run(cell())))


def test_others_may_read_what_is_exported(source):
    modes = {path.stat().st_mode for path in source.iterdir()}
    assert len(modes) == 1


def test_overwrite_replaces_converted_checkpoints_only(source, tmp_path, others):
    destination = convert(source, tmp_path / "converted")
    with pytest.raises(FileExistsError, match="pass --overwrite to replace it"):
        convert(source, destination, "bfloat16")
    (destination / "exits").mkdir()
    with pytest.raises(FileExistsError, match="also holds exits, which no conversion wrote and which would be lost"):
        convert(source, destination, "bfloat16", overwrite=True)
    (destination / "exits").rmdir()
    convert(source, destination, "bfloat16", overwrite=True)
    assert open_checkpoint(destination).dtype == "bfloat16"
    for existing in (source, source / "config.json"):
        with pytest.raises(FileExistsError, match="is no converted checkpoint; choose another destination"):
            convert(source, existing, overwrite=True)
    assert others() == ["converted"]


def test_what_is_done_is_done_and_what_only_looks_like_it_is_not(source, tmp_path, others):
    destination = convert(source, tmp_path / "converted")
    (destination / "exits").mkdir()
    before = (destination / "pipedec_jax.json").stat().st_mtime_ns
    assert convert(source, destination) == destination
    assert (destination / "pipedec_jax.json").stat().st_mtime_ns == before
    whole = (source / "config.json").read_text()
    for changes in ({"bos_token_id": 4}, {"rms_norm_eps": 0.25}):
        edit_json(source / "config.json", **changes)
        with pytest.raises(FileExistsError, match="pass --overwrite to replace it"):
            convert(source, destination)
        (source / "config.json").write_text(whole)
    assert convert(source, destination) == destination
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")  # as long, other weights
    with pytest.raises(FileExistsError, match="pass --overwrite to replace it"):
        convert(source, destination)
    assert others() == ["converted"]


@pytest.mark.parametrize("kind", ["a folder of somebody's", "a link", "a file"])
def test_a_workplace_that_is_somebody_elses_is_left_alone(kind, source, tmp_path):
    place, theirs = tmp_path / ".converted.partial", tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("mine")
    if kind == "a file":
        place.write_text("mine")
    elif kind == "a link":
        place.symlink_to(theirs)
    else:
        theirs.rename(place)
    with pytest.raises(FileExistsError, match="is not left by one"):
        convert(source, tmp_path / "converted")
    assert "mine" in (place.read_text() if kind == "a file" else (place / "notes.txt").read_text())
    assert not (tmp_path / "converted").exists()


def test_an_empty_destination_and_new_parents_are_fine(source, tmp_path):
    (tmp_path / "empty").mkdir()
    assert is_converted(convert(source, tmp_path / "empty"))
    assert is_converted(convert(source, tmp_path / "a" / "b" / "c"))


@pytest.mark.parametrize("error", [OSError("input/output error"), MemoryError, ValueError("bad")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_conversion_that_fails_in_the_middle_changes_nothing(error, overwrite, source, tmp_path, others, monkeypatch):
    destination = tmp_path / "converted"
    if overwrite:
        convert(source, destination, "bfloat16")
    before = others()
    stop_at(monkeypatch, 7, error)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        convert(source, destination, overwrite=overwrite)
    assert others() == before
    if overwrite:
        assert open_checkpoint(destination).dtype == "bfloat16"


def test_cache_converts_once_and_again_when_the_source_changes(source, tmp_path, monkeypatch):
    monkeypatch.setenv("PIPEDEC_JAX_CACHE", str(tmp_path / "cache"))
    first = convert_cached(source)
    assert first.parent == tmp_path / "cache"
    assert not list(differences(source, first))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "convert", None)
        assert convert_cached(source) == first
    edit_json(source / "config.json", rope_theta=123456.0)
    second = convert_cached(source)
    assert second != first
    assert open_checkpoint(second).config.rope_theta == 123456.0
    with pytest.raises(FileNotFoundError, match="no Hugging Face directory"):
        convert_cached(tmp_path / "nowhere")


def test_processes_that_ask_the_cache_at_once_convert_once(source, tmp_path, monkeypatch):
    written, write = [], conversion.write_array

    def counting(*arguments):
        written.append(arguments[1])
        return write(*arguments)

    monkeypatch.setattr(conversion, "write_array", counting)
    with ThreadPoolExecutor(4) as threads:
        found = set(threads.map(lambda _: convert_cached(source, tmp_path / "cache"), range(4)))
    assert len(found) == 1
    assert list((tmp_path / "cache").iterdir()) == list(found)
    assert not list(differences(source, found.pop()))
    assert sorted(written) == sorted(parameter_shapes(TINY))


def test_neither_torch_nor_a_model_of_transformers_is_imported(source, tmp_path):
    code = (
        "import sys, checkpoints_convert as c\n"
        "from checkpoints_convert.__main__ import main\n"
        f"assert main(['convert', {str(source)!r}, {str(tmp_path / 'converted')!r}]) == 0\n"
        f"assert main(['inspect', {str(tmp_path / 'converted')!r}]) == 0\n"
        f"assert main(['verify', '--no-logits', {str(source)!r}, {str(tmp_path / 'converted')!r}]) == 0\n"
        "sys.exit(sorted({'torch', 'transformers.modeling_utils'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
