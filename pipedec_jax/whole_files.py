"""Files that are written as a whole: a kill leaves the old one or the new one, never a part."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file aside and rename it; its folder is made where there is none.

    What is no plain file, such as `/dev/stdout`, is written in place.

    Raises:
        OSError: when it cannot be written.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
