"""Pickled files: nothing in them runs, bad ones are named, and tensors are read however they lie."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoints_convert import convert, open_checkpoint, open_source, pickle_reader
from tests.checkpoints_convert.sources import GEOMETRIES, halve, hugging_face_model, same_arrays, save_pickled


class Harmful:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return Path.touch, (Path(self.file),)


@pytest.fixture(scope="module")
def pickled(tmp_path_factory):
    return save_pickled(
        hugging_face_model(GEOMETRIES["LLaMA 1: as many KV heads as heads"]),
        tmp_path_factory.mktemp("pickled") / "source",
    )


def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(pickled, tmp_path, monkeypatch):
    source = shutil.copytree(pickled, tmp_path / "source")
    tensors = torch.load(source / "pytorch_model.bin")
    torch.save(tensors | {"extra": Harmful(tmp_path / "ran")}, source / "pytorch_model.bin")
    # Not even where the user asks torch for the old behaviour.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin was refused .* it would run code") as error:
        convert(source, tmp_path / "converted")
    assert not re.search("weights_only|safe_globals", str(error.value))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


BAD_PICKLES = {
    "truncated": (halve, "no complete PyTorch file"),
    "no archive": (lambda file: file.write_bytes(b"\x80\x02}q\x00."), "no complete PyTorch file"),
    "a list": (lambda file: torch.save([torch.ones(2)], file), "must hold a dictionary of named tensors, not a list"),
    "numbers": (lambda file: torch.save({"model.norm.weight": 3}, file), "other than a plain tensor under 'model.norm"),
    "repeated data": (
        lambda file: torch.save({"a": torch.ones(1).expand(10**6)}, file), "tensor 'a' repeats what is stored"),
    "to be negated": (
        lambda file: torch.save({"a": torch._neg_view(torch.ones(2))}, file), "other than a plain tensor under 'a'"),
    "sparse": (lambda file: torch.save({"a": torch.ones(2, 2).to_sparse()}, file), "plain tensor|refused"),
    "compressed": (lambda file: compress(file), "is compressed"),
}  # fmt: skip


def compress(file):
    import zipfile

    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("name", BAD_PICKLES)
def test_bad_pickles_are_named(name, pickled, tmp_path):
    spoil, message = BAD_PICKLES[name]
    source = shutil.copytree(pickled, tmp_path / "source")
    spoil(source / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        open_source(source)


def test_tensors_of_pickled_files_need_not_lie_in_one_piece(pickled, tmp_path):
    source = shutil.copytree(pickled, tmp_path / "source")
    tensors = torch.load(source / "pytorch_model.bin")
    matrices = [name for name, tensor in tensors.items() if tensor.dim() == 2]
    changed = {name: tensors[name].t().contiguous().t() for name in matrices[::3]}
    for name in matrices[1::3]:
        wide = torch.zeros(*tensors[name].shape, 3)
        changed[name] = wide[..., 1].copy_(tensors[name])
    # All others are slices of one storage.
    rest = [name for name in tensors if name not in changed]
    whole = torch.cat([tensors[name].flatten() for name in rest])
    sizes = [tensors[name].numel() for name in rest]
    changed |= {name: part.view(tensors[name].shape) for name, part in zip(rest, whole.split(sizes), strict=True)}
    torch.save(changed, source / "pytorch_model.bin")
    assert same_arrays(open_source(source), open_source(pickled))
    assert same_arrays(open_checkpoint(convert(source, tmp_path / "converted")), open_source(pickled))


def test_pages_of_pickled_files_are_let_go(pickled, monkeypatch):
    loads, load = [], pickle_reader._load_tensors
    monkeypatch.setattr(pickle_reader, "_load_tensors", lambda file: loads.append(file) or load(file))
    monkeypatch.setattr(pickle_reader, "RELOAD_BYTES", 50_000)
    checkpoint = open_source(pickled)
    for path in checkpoint.reading_order():
        checkpoint.read(path)
    assert 5 <= len(loads) <= 15
    assert checkpoint.nbytes > 200_000


def test_missing_torch_is_a_clear_message(pickled, tmp_path):
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "from checkpoints_convert.__main__ import main\n"
        f"sys.exit(main(['convert', {str(pickled)!r}, {str(tmp_path / 'converted')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "only PyTorch reads safely: pip install 'pipedec_jax[torch]'" in done.stderr
    assert "Traceback" not in done.stderr
