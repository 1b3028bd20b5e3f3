"""A manifest that was damaged, or made by somebody, is refused before anything is read by it."""

import json
import shutil

import pytest

from checkpoints_convert import convert, open_checkpoint
from tests.checkpoints_convert.sources import edit_manifest, tiny_source


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("manifest")
    return convert(tiny_source(root / "source"), root / "converted")


@pytest.fixture
def converted(whole, tmp_path):
    shutil.copy(whole / "pipedec_jax.json", tmp_path)  # nothing else is read
    return tmp_path


def test_a_changed_value_is_found_by_the_checksum_though_it_makes_sense(converted):
    path = converted / "pipedec_jax.json"
    values = json.loads(path.read_text())
    values["model"]["rope_theta"] += 1.0
    path.write_text(json.dumps(values, indent=1) + "\n")
    with pytest.raises(ValueError, match=r"does not have the checksum that it states .*; it was changed or damaged"):
        open_checkpoint(converted)
    edit_manifest(converted, model=values["model"])
    assert open_checkpoint(converted).config.rope_theta == values["model"]["rope_theta"]


@pytest.mark.parametrize("name", ["../model.json", "a/../../b.json", "/etc/model.json", "", ".", "a\\b.json", "a\0"])
@pytest.mark.parametrize("kind", ["files", "metadata"])
def test_names_of_files_that_lead_out_of_the_checkpoint_are_refused(converted, name, kind):
    held = json.loads((converted / "pipedec_jax.json").read_text())[kind]
    edit_manifest(converted, **{kind: held | {name: next(iter(held.values()))}})
    with pytest.raises(ValueError, match=r"file .* would lie outside of the checkpoint"):
        open_checkpoint(converted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis": 0}, "has dtype 'float32' and axis 0, not float32 and 1"),
        ({"dtype": "float16"}, "has dtype 'float16' and axis 1, not float32 and 1"),
        ({"shape": [1, 2]}, r"has shape \[1, 2\], the model asks for"),
        ({"length": 0}, "has chunks of length 0"),
        ({"length": 1}, "has 1 checksums for"),
        ({"checksums": ["0" * 32] * 2}, "has 2 checksums for 1 chunks"),
        ({"checksums": ["0" * 31]}, "has malformed checksums"),
        ({"more": 1}, "must have the keys"),
    ],
    ids=str,
)
def test_an_array_that_is_not_as_the_model_has_it_is_refused(converted, changes, message):
    arrays = json.loads((converted / "pipedec_jax.json").read_text())["arrays"]
    arrays["layers/0/up"] |= changes
    edit_manifest(converted, arrays=arrays)
    with pytest.raises(ValueError, match=rf"array 'layers/0/up' {message}"):
        open_checkpoint(converted)
