"""Files that are read whole, because they are small: configurations, indexes, tokenizers. What is too large is refused.

A hostile file must not exhaust memory: what is parsed takes many times the bytes of the file. Under these limits, a
process stays below 1 GB (tests/checkpoints_convert/test_hostile_memory.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MOST_BYTES = {"tokenizer.json": 2**26, "tokenizer.model": 5 * 2**20}
"""Most bytes of a file by name. LLaMA 3's have 9 to 17 MB and 2 MB."""
OTHERS_BYTES = 2**24
"""Most bytes of any other. An index has 0.1 MB, the manifest of LLaMA 3.1 405B 2 MB."""
JSON_VALUES = 2**21
"""Most values of a JSON file, counted by the marks before them (a `tokenizer.json` of LLaMA 3 has about a million)."""
JSON_KEYS = 2**19
"""Most keys of a JSON file, counted by the colons after them."""


def check_size(file: Path) -> None:
    """Raise `ValueError` when a file is larger than any such file of a LLaMA model; reads nothing."""
    size = file.stat().st_size
    if size > (most := _most_bytes(file)):
        raise ValueError(f"{file} has {size:,} bytes; at most {most:,} are read of such a file")


def read_small(file: Path) -> bytes:
    """All bytes of a file.

    Raises:
        OSError: when it cannot be read, or is a pipe or a device, which might never end or begin.
        ValueError: when it is too large, a JSON file that would be when parsed, or a file that Git LFS did not fetch.
    """
    most = _most_bytes(file)
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise OSError(f"{file} is no plain file")
    with file.open("rb") as opened:
        data = opened.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{file} has more than {most:,} bytes, which is too many for such a file")
    check_no_pointer(file, data)
    if file.suffix == ".json":
        check_json(data, str(file))
    return data


def check_json(data: bytes, name: str) -> None:
    """Raise `ValueError`, naming the file, when JSON text holds too many values or keys to be parsed."""
    # Those within strings count as well; they are few.
    if (values := sum(map(data.count, (b",", b"[", b"{")))) > JSON_VALUES:
        raise ValueError(f"{name} holds about {values:,} JSON values; at most {JSON_VALUES:,} are read")
    if (keys := data.count(b":")) > JSON_KEYS:
        raise ValueError(f"{name} holds about {keys:,} JSON keys; at most {JSON_KEYS:,} are read")


def check_no_pointer(file: Path, start: bytes) -> None:
    """Raise `ValueError` when a file begins as the note does that Git LFS leaves in place of what it did not fetch."""
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is only a pointer of Git LFS; run `git lfs pull` in {file.parent} to get the file")


def json_kind(value: Any) -> str:
    """What JSON calls a value, for messages to who wrote it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _most_bytes(file: Path) -> int:
    return MOST_BYTES.get(file.name, OTHERS_BYTES)
