"""The manifest of a converted checkpoint, `pipedec_jax.json`: what it holds, where from, and checksums of all of it.

Written last. The same source converted with the same options by the same version gives the same manifest, byte for
byte.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import xxhash

import pipedec_jax
from checkpoints_convert.checkpoint import STORED, array_dtype, check_dtype
from checkpoints_convert.config_json import Json, read_json, token_ids
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.parameters import Part, device_axis, parameter_shapes

FILE = "pipedec_jax.json"
VERSION = 2
"""Version of the layout; a reader refuses any other."""
TOOL = f"pipedec_jax {pipedec_jax.__version__}"
"""What writes it."""
CHECKSUM = "xxh3-128"
"""Every checksum in it: 128 bits of XXH3 (finds damage; proves nothing about intent)."""

_HEXADECIMAL = re.compile(r"[0-9a-f]{32}")


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """How one array is stored: in chunks along the axis that devices split."""

    shape: tuple[int, ...]
    dtype: str
    axis: int
    length: int
    """Size of a chunk along `axis`; the last may be shorter."""
    checksums: tuple[str, ...]
    """Of each chunk's elements in C order, little-endian."""

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.shape[self.axis] // self.length)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * STORED[self.dtype].itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk's file: Zarr stores the last one in full too."""
        return self.nbytes // self.shape[self.axis] * self.length

    def touched(self, part: Part) -> range:
        """The chunks that a part of the array, given with both ends, has elements of."""
        wanted = part[self.axis]
        if any(index.stop <= index.start for index in part):
            return range(0)
        return range(wanted.start // self.length, -(-wanted.stop // self.length))

    def part(self, chunk: int) -> tuple[slice, ...]:
        """Where a chunk lies in the array."""
        whole = [slice(0, size) for size in self.shape]
        start = chunk * self.length
        whole[self.axis] = slice(start, min(start + self.length, self.shape[self.axis]))
        return tuple(whole)

    def to_json(self) -> Json:
        """A JSON-ready object that `from_json` reads back."""
        return dataclasses.asdict(self) | {"shape": list(self.shape), "checksums": list(self.checksums)}

    @classmethod
    def from_json(cls, values: Json, path: str, shape: tuple[int, ...], dtype: str) -> StoredArray:
        """Check and take the object of array `path`; `ValueError` when damaged, or not of this shape and dtype."""
        expected = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) != expected:
            raise ValueError(f"array {path!r} must have the keys {', '.join(sorted(expected))}")
        if values["shape"] != list(shape):
            raise ValueError(f"array {path!r} has shape {values['shape']!r}, the model asks for {list(shape)}")
        if values["dtype"] != dtype or values["axis"] != device_axis(path):
            raise ValueError(
                f"array {path!r} has dtype {values['dtype']!r} and axis {values['axis']!r}, not {dtype} and "
                f"{device_axis(path)}"
            )
        if not _is_count(values["length"]) or values["length"] < 1:
            raise ValueError(f"array {path!r} has chunks of length {values['length']!r}")
        digests = values["checksums"]
        found = cls(shape, dtype, values["axis"], values["length"], ())
        if not isinstance(digests, list) or not all(_is_digest(digest) for digest in digests):
            raise ValueError(f"array {path!r} has malformed checksums")
        if len(digests) != found.chunks:
            raise ValueError(f"array {path!r} has {len(digests)} checksums for {found.chunks} chunks")
        return dataclasses.replace(found, checksums=tuple(digests))


@dataclasses.dataclass(frozen=True)
class FileFacts:
    """Size and checksum of a file."""

    bytes: int
    checksum: str

    @classmethod
    def of(cls, data: bytes) -> FileFacts:
        """Those of a file with this content."""
        return cls(len(data), xxhash.xxh3_128_hexdigest(data))

    @classmethod
    def from_json(cls, values: Json, name: str) -> FileFacts:
        """Check and take the object of file `name`; `ValueError` when it is damaged."""
        if not isinstance(values, dict) or set(values) != {"bytes", "checksum"}:
            raise ValueError(f"file {name!r} must have the keys bytes, checksum")
        if not _is_count(values["bytes"]) or not _is_digest(values["checksum"]):
            raise ValueError(f"file {name!r} has malformed facts")
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All that is known of a converted checkpoint without reading an array."""

    model: LlamaConfig
    dtype: str
    bos_token_id: int | None
    eos_token_ids: list[int]
    source: Json
    """Format, name and files of the source (each with its size and checksum)."""
    files: dict[str, FileFacts]
    """Tokenizer and generation files that came along."""
    metadata: dict[str, FileFacts]
    """Files beside the arrays' chunks, under their path in the checkpoint."""
    arrays: dict[str, StoredArray]
    tool: str = TOOL
    """What wrote it."""

    def write(self, path: Path) -> None:
        """Write the file at `path`."""
        path.write_text(self.text())

    def text(self) -> str:
        """The content of the file."""
        return json.dumps(self.to_json(), indent=1) + "\n"

    def to_json(self) -> Json:
        """The JSON object of the file."""
        values = {
            "version": VERSION,
            "tool": self.tool,
            "checksum": CHECKSUM,
            "model": self.model.to_dict(),
            "dtype": self.dtype,
            "bos_token_id": self.bos_token_id,
            "eos_token_ids": self.eos_token_ids,
            "source": self.source,
            "files": {name: dataclasses.asdict(self.files[name]) for name in sorted(self.files)},
            "metadata": {name: dataclasses.asdict(self.metadata[name]) for name in sorted(self.metadata)},
            "arrays": {path: self.arrays[path].to_json() for path in parameter_shapes(self.model)},
        }
        return values | {"manifest": _digest(values)}

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read and check the file at `path`.

        Raises:
            FileNotFoundError: when it does not exist.
            ValueError: when it is damaged or of another version.
        """
        values = read_json(path)
        try:
            found = cls._from_json(values)
            # After the checks that name what is wrong.
            stated = values.pop("manifest", None)
            if stated != _digest(values):
                raise ValueError(
                    f"it does not have the checksum that it states ({stated!r}); it was changed or damaged"
                )
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
        return found

    @classmethod
    def _from_json(cls, values: Json) -> Manifest:
        if values.get("version") != VERSION:
            raise ValueError(f"version {values.get('version')!r} is not {VERSION}; convert the source again")
        if values.get("checksum") != CHECKSUM:
            raise ValueError(f"checksum must be {CHECKSUM!r}, not {values.get('checksum')!r}")
        config = LlamaConfig.from_dict(_member(values, "model", dict))
        bos = token_ids(values, "bos_token_id")
        arrays = _member(values, "arrays", dict)
        files, metadata = (_member(values, key, dict) for key in ("files", "metadata"))
        shapes = parameter_shapes(config)
        if set(arrays) != set(shapes):
            differing = sorted(set(arrays) ^ set(shapes))
            raise ValueError(f"'arrays' has other entries than the model: {', '.join(map(repr, differing[:4]))}")
        for name in (*files, *metadata):
            parts = Path(name).parts
            if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name or "\\" in name:
                raise ValueError(f"file {name!r} would lie outside of the checkpoint")
        dtype = check_dtype(_member(values, "dtype", str))
        return cls(
            model=config,
            dtype=dtype,
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=token_ids(values, "eos_token_ids"),
            source=_member(values, "source", dict),
            files={name: FileFacts.from_json(facts, name) for name, facts in files.items()},
            metadata={name: FileFacts.from_json(facts, name) for name, facts in metadata.items()},
            arrays={
                path: StoredArray.from_json(arrays[path], path, shape, array_dtype(config, path, dtype).name)
                for path, shape in shapes.items()
            },
            tool=_member(values, "tool", str),
        )


def _digest(values: Json) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


def _member(values: Json, key: str, kind: type) -> Any:
    found = values.get(key)
    if not isinstance(found, kind):
        raise ValueError(f"{key!r} must be of type {kind.__name__}, not {found!r}")
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _HEXADECIMAL.fullmatch(value) is not None
