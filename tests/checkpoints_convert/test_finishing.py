"""A conversion that is stopped while it takes its place, or another's, leaves a whole checkpoint or none."""

import pytest

from checkpoints_convert import conversion, convert, is_converted, open_checkpoint, workplace
from checkpoints_convert.verify import damage
from tests.checkpoints_convert.stopping import Stopped, contents


@pytest.mark.parametrize("step", ["write_tree_metadata", "Manifest.write", "finish", "remove"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_stopped_while_finishing(step, overwrite, source, tmp_path, others, expected, monkeypatch):
    destination = tmp_path / "converted"
    if overwrite:
        convert(source, destination, "bfloat16")

    def stop(*_):
        raise Stopped

    with monkeypatch.context() as patch:
        owner = workplace.Workplace if step in ("finish", "remove") else conversion
        if step == "Manifest.write":
            owner, step = conversion.Manifest, "write"
        patch.setattr(owner, step, stop)
        with pytest.raises(Stopped):
            convert(source, destination, overwrite=overwrite)
    assert is_converted(destination) == (overwrite or step == "remove")
    convert(source, destination, overwrite=overwrite)
    assert contents(destination) == expected
    assert others() == ["converted"]


def test_stopped_between_the_two_renames_of_an_overwrite(source, tmp_path, others, expected, monkeypatch):
    destination = convert(source, tmp_path / "converted", "bfloat16")
    rename = type(destination).rename

    def once(path, target):
        if path.name == "checkpoint":
            raise Stopped
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(destination), "rename", once)
        with pytest.raises(Stopped):
            convert(source, destination, overwrite=True)
    assert not destination.exists()
    convert(source, destination, overwrite=True)
    assert contents(destination) == expected
    assert others() == ["converted"]


def test_the_old_checkpoint_is_put_back_where_the_new_one_cannot_take_its_place(source, tmp_path, others, monkeypatch):
    destination = convert(source, tmp_path / "converted", "bfloat16")
    rename = type(destination).rename

    def refused(path, target):
        if path.name == "checkpoint":
            raise OSError("input/output error")
        return rename(path, target)

    monkeypatch.setattr(type(destination), "rename", refused)
    with pytest.raises(OSError, match="input/output error"):
        convert(source, destination, overwrite=True)
    assert open_checkpoint(destination).dtype == "bfloat16"
    assert list(damage(destination)) == []
    assert others() == ["converted"]


def test_an_overwrite_in_place_that_is_stopped_while_removing_leaves_no_checkpoint_and_goes_on(
    source, tmp_path, others, expected, monkeypatch
):
    """Else one of which half is gone would be opened."""
    monkeypatch.setattr(workplace, "is_cloud", lambda _: True)
    destination, remove = convert(source, tmp_path / "converted", "bfloat16"), workplace.remove_tree

    def stop(path):
        if path == destination:
            (path / "tokenizer.json").unlink()
            raise Stopped
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(workplace, "remove_tree", stop)
        with pytest.raises(Stopped):
            convert(source, destination, overwrite=True)
    assert not is_converted(destination)
    assert contents(convert(source, destination, overwrite=True)) == expected
    assert others() == ["converted"]


def test_a_checkpoint_that_was_moved_away_before_a_stopped_run_is_made_good_is_made_again(
    source, tmp_path, others, expected, monkeypatch
):
    destination = tmp_path / "converted"

    def stop(_):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(workplace.Workplace, "remove", stop)
        with pytest.raises(Stopped):
            convert(source, destination)
    destination.rename(tmp_path / "moved")
    convert(source, destination)
    assert contents(destination) == contents(tmp_path / "moved") == expected
    assert others() == ["converted", "moved"]


def test_what_an_overwrite_left_that_was_stopped_before_its_end_is_in_no_other_s_way(
    source, tmp_path, others, monkeypatch
):
    destination = convert(source, tmp_path / "converted", "bfloat16")

    def stop(_):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(workplace.Workplace, "remove", stop)
        with pytest.raises(Stopped):
            convert(source, destination, overwrite=True)
    convert(source, destination, "float16", overwrite=True)
    assert open_checkpoint(destination).dtype == "float16"
    assert others() == ["converted"]
