"""The safetensors files of a directory as one set of named tensors; headers first, data tensor by tensor."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16, which safetensors then returns as NumPy)
import numpy as np
from safetensors import SafetensorError, safe_open

from checkpoints_convert.config_json import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it: `BF16`, `F16`, `F32`, ..."""
    file: Path


class SafetensorsDirectory:
    """All tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names."""

    def __init__(self, directory: Path) -> None:
        """Read the headers only.

        Raises:
            FileNotFoundError: when there are no such files, or the index names a shard that is not there.
            ValueError: for a damaged file, a tensor in two shards, or an index that contradicts the shards.
        """
        self.tensors: dict[str, TensorInfo] = {}
        self._handles: dict[Path, Any] = {}
        # Like Hugging Face, prefer the single file where both exist.
        weight_map = None if (directory / SINGLE).is_file() else _read_index(directory)
        for file in [directory / SINGLE] if weight_map is None else sorted(set(weight_map.values())):
            self._add(file)
        if weight_map is not None:
            self._compare_with(weight_map, directory / INDEX)

    def read(self, name: str) -> np.ndarray:
        """The data of one tensor; `ValueError` when its file is damaged."""
        file = self.tensors[name].file
        try:
            return self._handles[file].get_tensor(name)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"cannot read tensor {name!r} of {file}: {error}") from error

    def _add(self, file: Path) -> None:
        try:
            handle = safe_open(file, framework="numpy")
            headers = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  (not a dictionary)
            infos = {name: TensorInfo(tuple(x.get_shape()), x.get_dtype(), file) for name, x in headers.items()}
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"{file} is no complete safetensors file ({error}); it is damaged or its download was cut short, "
                "fetch it again"
            ) from error
        for name, info in infos.items():
            if name in self.tensors:
                raise ValueError(f"tensor {name!r} is in two files, {self.tensors[name].file.name} and {file.name}")
            self.tensors[name] = info
        self._handles[file] = handle

    def _compare_with(self, weight_map: dict[str, Path], index: Path) -> None:
        for name in sorted(weight_map.keys() | self.tensors.keys()):
            found = self.tensors[name].file.name if name in self.tensors else "no shard"
            named = weight_map[name].name if name in weight_map else "no shard"
            if found != named:
                raise ValueError(f"{index} puts tensor {name!r} in {named}, but it is in {found}")


def _read_index(directory: Path) -> dict[str, Path]:
    """The file of every tensor, from the index; all files are known to exist inside `directory`."""
    if not (directory / INDEX).is_file():
        raise FileNotFoundError(f"{directory} has neither {SINGLE} nor {INDEX}; only safetensors can be converted")
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{directory / INDEX} has no 'weight_map' object that names the shard of every tensor")
    for name, file in weight_map.items():
        # A bare file name cannot lead out of the directory.
        if not isinstance(file, str) or "\0" in file or Path(file).name != file:
            raise ValueError(f"{directory / INDEX} puts tensor {name!r} in {file!r}; shards are plain file names")
    missing = sorted({file for file in weight_map.values() if not (directory / file).is_file()})
    if missing:
        raise FileNotFoundError(f"{directory / INDEX} names shards that do not exist: {', '.join(missing)}")
    return {name: directory / file for name, file in weight_map.items()}
