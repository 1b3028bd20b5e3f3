"""A file is the old one or the new one at every moment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipedec_jax.whole_files import write_whole


def test_a_file_is_written_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "summary.json"
    write_whole(path, "old")
    write_whole(path, "new ü")
    assert path.read_text(encoding="utf-8") == "new ü"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_what_was_there_stays_until_all_of_the_new_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "summary.json"
    write_whole(path, "old")

    def killed(part: Path, *_: object, **__: object) -> None:
        part.write_bytes(b"ne")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, step, killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    write_whole(path, "new")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["new"]


def test_links_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"
    write_whole(Path(os.devnull), "text")
    assert not Path(os.devnull).is_file()
