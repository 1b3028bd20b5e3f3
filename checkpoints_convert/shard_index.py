"""The index of a sharded Hugging Face checkpoint: which file holds which tensor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from checkpoints_convert.config_json import read_json
from checkpoints_convert.paths import inside
from checkpoints_convert.tensor_files import TensorInfo
from pipedec_jax.small_files import check_no_pointer


def weight_files(directory: Path, single: str) -> tuple[list[Path], dict[str, Path] | None]:
    """The weight files of a directory, and the index that maps tensors to them if there is one.

    Args:
        directory: of the checkpoint.
        single: name of the file when there is but one; the index is called `{single}.index.json`. Like Hugging Face,
            the single file is preferred where both exist.

    Raises:
        FileNotFoundError: when there is neither, or the index names a file that is not there.
        ValueError: for an index that is no map of tensors to plain file names, or a file that Git LFS did not fetch.
    """
    if (directory / single).is_file():
        files = [inside(directory / single, directory)]
        check_fetched(files)
        return files, None
    index = directory / f"{single}.index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{directory} has neither {single} nor {index.name}")
    weight_map = read_json(inside(index, directory)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no 'weight_map' object that names the shard of every tensor")
    for name, file in weight_map.items():
        # A bare file name cannot lead out of the directory.
        if not isinstance(file, str) or "\0" in file or Path(file).name != file:
            raise ValueError(f"{index} puts tensor {name!r} in {file!r}; shards are plain file names")
    missing = sorted({file for file in weight_map.values() if not _is_file(directory / file)})
    if missing:
        raise FileNotFoundError(f"{index} names shards that do not exist: {', '.join(missing)}")
    files = [inside(directory / file, directory) for file in sorted(set(weight_map.values()))]
    check_fetched(files)
    return files, {name: directory / file for name, file in weight_map.items()}


def check_index(directory: Path, single: str, weight_map: dict[str, Path], tensors: dict[str, TensorInfo]) -> None:
    """Raise `ValueError` unless every tensor is in the file that the index says."""
    for name in sorted(weight_map.keys() | tensors.keys()):
        found = tensors[name].file.name if name in tensors else "no shard"
        named = weight_map[name].name if name in weight_map else "no shard"
        if found != named:
            raise ValueError(f"{directory / single}.index.json puts tensor {name!r} in {named}, but it is in {found}")


def check_fetched(files: Iterable[Path]) -> None:
    """Raise `ValueError` where a file is but Git LFS's note of it, as after `git clone` without that extension."""
    for file in files:
        with file.open("rb") as opened:
            check_no_pointer(file, opened.read(64))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # A name that the file system cannot have.
        return False
