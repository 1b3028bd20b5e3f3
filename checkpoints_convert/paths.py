"""Which files of a source directory may be opened, and paths of object stores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from etils import epath


def inside(file: Path, directory: Path) -> Path:
    """`file` itself, which must lie in `directory` once symbolic links are followed.

    In a snapshot of the Hugging Face cache, whose files are links into the repository's `blobs/`, these may be meant
    as well.

    Raises:
        ValueError: when the file is somewhere else.
    """
    real, home = Path(os.path.realpath(file)), Path(os.path.realpath(directory))
    snapshots = [place.parent for place in (home, *home.parents) if place.parent.name == "snapshots"]
    allowed = [home, *(place.parent / "blobs" for place in snapshots)]
    if not any(real.is_relative_to(place) for place in allowed):
        raise ValueError(f"{file} is a link to {real}, outside of {directory}; copy the file itself there")
    return file


def is_cloud(path: str | os.PathLike[str]) -> bool:
    """Whether `path` names an object store (`gs://...`), where nothing can be renamed in one step."""
    return "://" in os.fspath(path)


def any_path(path: str | os.PathLike[str]) -> Path:
    """A local path, or one of an object store, as the path library that Orbax uses has it (the same methods).

    Raises:
        ValueError: for an address of no such store, such as `https://...`, or of the hub (`hf://...`).
    """
    if not is_cloud(path):
        return Path(path)
    try:
        if not os.fspath(path).startswith("hf://"):
            return cast(Path, epath.Path(path))
    except KeyError:  # What the library raises for a scheme that it does not have.
        pass
    raise ValueError(
        f"{path} is no address that can be read: give a directory, a path of an object store (gs://...), or a hub "
        "repository as org/name"
    )


def key_value_store(directory: Path) -> str | dict[str, Any]:
    """TensorStore's description of a directory.

    Raises:
        ValueError: when its path is not valid UTF-8, which TensorStore takes alone.
    """
    if is_cloud(directory):
        return f"{os.fspath(directory)}/"
    path = os.path.abspath(directory)  # noqa: PTH100  (no link may be followed)
    if os.fsencode(path).decode(errors="ignore") != path:
        raise ValueError(f"the path {os.fsencode(path)!r} is not valid UTF-8; choose another name")
    return {"driver": "file", "path": f"{path}/"}


def file_size(file: Path) -> int:
    """Bytes of a file, wherever it is."""
    return cast(Any, file).stat().length if is_cloud(file) else file.stat().st_size


def remove_tree(directory: Path) -> None:
    """Remove a directory, wherever it is; nothing when there is none."""
    if directory.is_dir():
        epath.Path(directory).rmtree(missing_ok=True)
