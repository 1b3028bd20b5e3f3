"""Models of the Hugging Face hub: its cache's snapshots of links, downloads, and paths that are no repository."""

import json
import shutil
import types
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from checkpoints_convert import convert, open_checkpoint, open_hugging_face
from checkpoints_convert.__main__ import main
from checkpoints_convert.source import same_bits
from checkpoints_convert.verify import differences


def cache_snapshot(source: Path, cache: Path, name: str = "org/model") -> Path:
    """Lay a directory out as the Hugging Face cache does: links into blobs."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for index, file in enumerate(sorted(source.iterdir())):
        shutil.copyfile(file, blobs / f"{index:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{index:064x}")
    return snapshot


def test_snapshots_of_the_hugging_face_cache_load(source, tmp_path):
    snapshot = cache_snapshot(source, tmp_path / "hub")
    assert list(differences(source, convert(snapshot, tmp_path / "converted"))) == []


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize(("in_cache", "place"), [(False, "elsewhere"), (False, "blobs"), (True, "elsewhere")])
def test_links_that_lead_elsewhere_are_refused(file, in_cache, place, source, tmp_path):
    if in_cache:
        directory = cache_snapshot(source, tmp_path / "hub")
    else:
        directory = tmp_path / "models" / "model"
        shutil.copytree(source, directory)
    elsewhere = directory.parents[1] / place  # in the cache, beside the blobs that links may lead to
    elsewhere.mkdir()
    (directory / file).resolve().replace(elsewhere / file)
    (directory / file).unlink(missing_ok=True)
    (directory / file).symlink_to(elsewhere / file)
    with pytest.raises(ValueError, match=rf"{file} is a link to .*{place}.*, outside of "):
        convert(directory, tmp_path / "converted")
    if file != "tokenizer.json":
        with pytest.raises(ValueError, match=rf"{file} is a link to .*{place}.*, outside of "):
            open_hugging_face(directory)
    assert not (tmp_path / "converted").exists()


def test_links_inside_of_the_directory_load(source, tmp_path):
    (source / "model.safetensors").rename(source / "weights")
    (source / "model.safetensors").symlink_to("weights")
    expected = load_file(source / "weights")["model.norm.weight"]
    assert same_bits(open_checkpoint(convert(source, tmp_path / "converted")).read("final_norm"), expected)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub, which cannot be reached."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_hub_repository_is_found_in_the_local_cache(source, tmp_path, hub, capsys):
    cache_snapshot(source, hub)
    assert list(differences(source, convert("org/model", tmp_path / "converted"))) == []
    assert main(["inspect", "--json", "org/model"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "huggingface-safetensors"
    assert main(["verify", "--no-logits", "org/model", str(tmp_path / "converted")]) == 0
    with pytest.raises(
        FileNotFoundError, match="org/other is no directory here, not in the local Hugging Face cache, a"
    ):
        convert("org/other", tmp_path / "again")


def interrupt(source, snapshot, what) -> str:
    """Take a file out of a snapshot as an interrupted download would; returns what is to be said."""
    if what == "shard":
        names = sorted(load_file(source / "model.safetensors"))
        weight_map = dict.fromkeys(names, "model-00001.safetensors") | {names[-1]: "model-00002.safetensors"}
        (snapshot / "model.safetensors").rename(snapshot / "model-00001.safetensors")
        (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return r"names shards that do not exist: model-00002\.safetensors"
    (snapshot / what).unlink()
    return {
        "model.safetensors": r"has neither model\.safetensors nor",
        "tokenizer.json": "has no tokenizer",
        "config.json": r"has neither config\.json nor params\.json",
    }[what]


@pytest.mark.parametrize("what", ["shard", "model.safetensors", "tokenizer.json", "config.json"])
def test_a_snapshot_that_is_not_whole_is_downloaded_or_named(what, source, tmp_path, hub, monkeypatch):
    message = interrupt(source, cache_snapshot(source, hub), what)
    with pytest.raises(
        FileNotFoundError, match=rf"not whole in the local Hugging Face cache \(.*{message}.*not be downl"
    ):
        convert("org/model", tmp_path / "converted")
    asked = serve(source, monkeypatch)
    assert list(differences(source, convert("org/model", tmp_path / "converted"))) == []
    assert list(asked) == ["org/model"]


def test_a_download_that_ends_early_is_named(source, tmp_path, hub, monkeypatch):
    message = interrupt(source, source, "shard")
    serve(source, monkeypatch)
    with pytest.raises(FileNotFoundError, match=f"org/model was downloaded from the Hugging Face hub, but .*{message}"):
        convert("org/model", tmp_path / "converted")


def serve(
    source, monkeypatch, files=("model.safetensors", "pytorch_model.bin", "original/consolidated.00.pth")
) -> dict:
    """Stand in for the hub with one repository, which holds `source`; returns what will have been asked for."""
    import huggingface_hub

    asked, snapshot_download = {}, huggingface_hub.snapshot_download

    class Api:
        def model_info(self, name, *, timeout):
            names = ["config.json", "tokenizer.json", *files]
            return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=file) for file in names])

    def download(name, *, local_files_only=False, allow_patterns=None):
        if local_files_only:
            return snapshot_download(name, local_files_only=True)
        asked[name] = allow_patterns
        return str(source)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_what_is_downloaded(source, tmp_path, hub, monkeypatch):
    asked = serve(source, monkeypatch)
    assert list(differences(source, convert("org/model", tmp_path / "converted"))) == []
    assert "model.safetensors" in asked["org/model"]
    assert "config.json" in asked["org/model"]
    assert "pytorch_model.bin" not in asked["org/model"]
    serve(source, monkeypatch, files=["original/consolidated.00.pth", "onnx/model.safetensors"])
    with pytest.raises(
        FileNotFoundError, match="the repository org/model on the Hugging Face hub holds no LLaMA weights"
    ):
        convert("org/model", tmp_path / "again")


def test_paths_that_are_no_repository_are_not_asked_for(tmp_path):
    for path in (str(tmp_path / "nowhere"), "../nowhere", "nowhere", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="is not a directory"):
            convert(path, tmp_path / "converted")
