"""Ways to corrupt a checkpoint's directory."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from checkpoint_trials.good_inputs import Kind

Corrupt = Callable[[Path, random.Random], str]
"""Corrupts a directory in place, and says what it did."""


def corrupt(place: Path, kind: Kind, elsewhere: Path, rng: random.Random) -> str:
    """Do one to three things to a directory."""
    ways: list[Corrupt] = [_flip, _flip, _truncate, _hostile_json, _hostile_json, _remove]
    if kind in ("single", "sharded", "cache"):
        ways += [_hostile_header, _hostile_header, _hostile_length]
    if kind in ("pickled", "pickled shards", "meta"):
        ways += [_harmful_pickle(elsewhere), _rewritten_pickle]
    link = _link_out(elsewhere)
    ways += [_pipe, _grow, link]
    chosen = [rng.choice(ways) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    # Last, so that nothing here writes through a link or reads what is larger than memory.
    chosen.sort(key=lambda way: (way is link, way is _grow))
    return "; ".join(way(place, rng) for way in chosen)


def _pick(place: Path, rng: random.Random, *endings: str) -> Path | None:
    """A regular file of a directory, through links."""
    files = sorted(path for path in place.rglob("*") if path.is_file())
    files = [path for path in files if not endings or path.name.endswith(endings)]
    return rng.choice(files) if files else None


def _flip(place: Path, rng: random.Random) -> str:
    """Change some bytes, more often near the beginning, where headers are."""
    file = _pick(place, rng)
    if file is None or not (data := bytearray(file.read_bytes())):
        return "nothing"
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 200))
        data[at] = rng.choice((data[at] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255))
    file.write_bytes(data)
    return f"bytes changed in {file.name}"


def _truncate(place: Path, rng: random.Random) -> str:
    file = _pick(place, rng)
    if file is None:
        return "nothing"
    data = file.read_bytes()
    longer = rng.random() < 0.2
    file.write_bytes(data + rng.randbytes(rng.randrange(1, 99)) if longer else data[: rng.randrange(len(data) + 1)])
    return f"{file.name} {'extended' if longer else 'cut short'}"


def _remove(place: Path, rng: random.Random) -> str:
    file = _pick(place, rng)
    if file is None:
        return "nothing"
    file.unlink()
    if rng.random() < 0.3:
        file.mkdir()
        return f"{file.name} replaced by a directory"
    return f"{file.name} removed"


def _pipe(place: Path, rng: random.Random) -> str:
    file = _pick(place, rng)
    if file is None:
        return "nothing"
    file.unlink()
    os.mkfifo(file)
    return f"{file.name} replaced by a pipe nobody writes to"


def _grow(place: Path, rng: random.Random) -> str:
    """Make a file larger than memory; on the disk it takes no room."""
    file = _pick(place, rng)
    if file is None:
        return "nothing"
    size = rng.choice((2**26, 2**31, 2**36, 2**40))
    os.truncate(file, size)
    return f"{file.name} extended to {size} bytes"


def _link_out(elsewhere: Path) -> Corrupt:
    def link(place: Path, rng: random.Random) -> str:
        file = _pick(place, rng)
        if file is None:
            return "nothing"
        twin = elsewhere / "model" / file.name
        target = rng.choice([twin if twin.exists() else elsewhere, Path("/etc/passwd"), Path("/dev/zero"), file])
        file.unlink()
        file.symlink_to(target)
        return f"{file.name} replaced by a link to {target}"

    return link


HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 2, 7, 2**31, 2**62, 2**64, 10**30, -(2**63), 0.5, 1e308, float("inf"), float("nan"), "", "x",
    "../../elsewhere/x", "/etc/passwd", "a\0b", "\ud800", "x" * 10**5, [], [[]], {}, {"": {}}, [0, 2**62], [-1, 3], [8],
    "llama", "float32", "BF16",
]  # fmt: skip


def _hostile_json(place: Path, rng: random.Random) -> str:
    """Set, add or remove one value anywhere in a JSON file; or nest it deeply."""
    file = _pick(place, rng, ".json", ".zarray", "_METADATA")
    if file is None:
        return "nothing"
    if rng.random() < 0.05:
        file.write_text("[" * 10**5 if rng.random() < 0.5 else '{"a":' * 10**5)
        return f"{file.name} nested deeply"
    try:
        values = json.loads(file.read_text())
    except (ValueError, RecursionError):
        return "nothing"
    nodes = [node for node in _nodes(values) if node]
    if not nodes:
        return "nothing"
    node = rng.choice(nodes)
    key = rng.choice(sorted(node)) if isinstance(node, dict) else rng.randrange(len(node))
    value = rng.choice(HOSTILE)
    way = rng.random()
    if way < 0.15:
        del node[key]
    elif way < 0.25 and isinstance(node, dict):
        node[rng.choice(["../x", "/x", "extra", "\0"])] = node[key]
    else:
        node[key] = value
    file.write_text(json.dumps(values), errors="surrogatepass")
    return f"{file.name}: {str(key)[:40]!r} set to {str(value)[:40]!r}, removed or renamed"


def _nodes(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _nodes(inner)


def _hostile_header(place: Path, rng: random.Random) -> str:
    """Change the header of a safetensors file, its length kept right."""
    file = _pick(place, rng, ".safetensors")
    if file is None or len(data := file.read_bytes()) < 8:
        return "nothing"
    (size,) = struct.unpack("<Q", data[:8])
    try:
        header = json.loads(data[8 : 8 + size])
        tensors = [entry for entry in header.values() if isinstance(entry, dict) and "shape" in entry]
        entry = rng.choice(tensors)
    except (ValueError, IndexError, AttributeError, RecursionError):
        return "nothing"
    key = rng.choice(["shape", "dtype", "data_offsets"])
    value = rng.choice([*HOSTILE, "F16", "I8", "F64", [0, 0], [16, 8], [8, 16], [128], [2**32, 2**32], [1] * 99])
    if key == "data_offsets" and rng.random() < 0.5:
        value = [rng.choice((0, 8, 2**40, -8)) + number for number in entry[key]]
    entry[key] = value
    with contextlib.suppress(UnicodeEncodeError):
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    return f"{file.name}: {key} set to {str(value)[:40]}"


def _hostile_length(place: Path, rng: random.Random) -> str:
    file = _pick(place, rng, ".safetensors")
    if file is None:
        return "nothing"
    data = file.read_bytes()
    length = rng.choice([0, 1, 8, 2**31, 2**40, 2**63, 2**64 - 1, len(data), rng.randrange(len(data) + 9)])
    file.write_bytes(struct.pack("<Q", length) + data[8:])
    return f"{file.name}: header length {length}"


class _Harm:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _harmful_pickle(elsewhere: Path) -> Corrupt:
    """Put a pickle that would write a file into an archive, or in its stead."""

    def harm(place: Path, rng: random.Random) -> str:
        file = _pick(place, rng, ".bin", ".pth")
        if file is None:
            return "nothing"
        data = pickle.dumps({"model.norm.weight": _Harm(elsewhere / "ran")}, protocol=2)
        if rng.random() < 0.3:
            file.write_bytes(data)
        else:
            _rewrite(file, lambda name, old: data if name.endswith("data.pkl") else old)
        return f"{file.name} would run code"

    return harm


def _rewritten_pickle(place: Path, rng: random.Random) -> str:
    """Change some bytes of an archive's entry, its checksum kept right."""
    file = _pick(place, rng, ".bin", ".pth")
    if file is None:
        return "nothing"
    ending = rng.choice(("data.pkl", "data.pkl", "byteorder", "version", "/0"))

    def change(name: str, old: bytes) -> bytes:
        if not name.endswith(ending) or not old:
            return old
        new = bytearray(old)
        for _ in range(rng.choice((1, 2, 5))):
            new[rng.randrange(len(new))] = rng.randrange(256)
        return bytes(new[: rng.randrange(len(new)) + 1]) if rng.random() < 0.1 else bytes(new)

    _rewrite(file, change)
    return f"{file.name}: {ending} changed"


def _rewrite(file: Path, change: Callable[[str, bytes], bytes]) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError):
        return
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(name, data))
