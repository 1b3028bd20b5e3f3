"""The answers' file of a job over many prompts: one line each, on the disk before the next prompt begins.

A kill leaves at most one torn line at the end: that is dropped, and its prompt decoded again. What is finished is known
by the number of the prompt's line and a digest of what stands there. The first line holds the settings: with others,
the file is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

VERSION = 1
"""Of the form of the answers' file."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the prompts' file."""

    number: int
    """From 1, as editors count."""
    content: bytes

    @property
    def digest(self) -> str:
        """By which the content is known again."""
        return hashlib.blake2b(self.content, digest_size=16).hexdigest()


class Answers:
    """The answers' file while it is held. `open_answers` makes one.

    Args:
        file: its descriptor, at the end of the last whole line; `None` where another process writes.
        path: where it is.
        finished: by the numbers of the prompts' lines that have had an answer before, whether that is an error.
    """

    def __init__(self, file: int | None, path: Path, finished: dict[int, bool]) -> None:
        self._file = file
        self._path = path
        self.finished = finished

    def append(self, line: Line, answer: Mapping[str, Any]) -> None:
        """Write an answer; when this returns, the disk has it."""
        if self._file is not None:
            _write(self._file, self._path, {"line": line.number, "digest": line.digest, **answer})


@contextlib.contextmanager
def open_answers(path: Path, settings: Mapping[str, Any], lines: Sequence[Line]) -> Iterator[Answers]:
    """Open an answers' file for appending, after a look at what it holds; a torn last line is cut off.

    Raises:
        ValueError: when it is a pipe or a device, or holds something else, other settings, or answers to other prompts.
        BlockingIOError: when another process writes to it.
    """
    # As it will be read again: tuples become lists.
    header = {"pipedec_jax_answers": VERSION, "settings": json.loads(json.dumps(settings))}
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ValueError(f"{path} is no file that answers can be kept in and read again: give another --out")
        _lock(file, path)
        content = b""
        while piece := os.read(file, 1 << 20):
            content += piece
        whole = content[: content.rfind(b"\n") + 1]
        if not whole and not _encode(header).startswith(content):
            raise ValueError(f"{path} is no file of answers: give another --out")
        finished = _check_answers(path, whole.splitlines(), header, lines) if whole else {}
        if len(whole) < len(content):
            os.ftruncate(file, len(whole))
        if not whole:
            _write(file, path, header)
            _sync_directory(path.parent)
        yield Answers(file, path, finished)
    finally:
        os.close(file)


def _check_answers(
    path: Path, held: Sequence[bytes], header: Mapping[str, Any], lines: Sequence[Line]
) -> dict[int, bool]:
    """The numbers of the prompts that have an answer, and whether that is an error."""
    try:
        first = json.loads(held[0])
    except (ValueError, RecursionError):
        first = None
    if not isinstance(first, dict) or "pipedec_jax_answers" not in first:
        raise ValueError(f"{path} is no file of answers: give another --out")
    if first["pipedec_jax_answers"] != VERSION or not isinstance(first.get("settings"), dict):
        raise ValueError(f"{path} is no file of answers of this version: give another --out")
    records = []
    for number, line in enumerate(held[1:], start=2):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record["line"], int):
                raise ValueError("no answer")
        except (ValueError, KeyError, RecursionError) as error:
            raise ValueError(
                f"line {number} of {path} is damaged ({error}): remove that line, or give another --out"
            ) from error
        records.append(record)
    old, new = first["settings"], header["settings"]
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if differing:
        what = ", ".join(
            f"{name} {json.dumps(old.get(name))} and not {json.dumps(new.get(name))}" for name in differing
        )
        raise ValueError(f"{path} was begun with {what}: give the same settings, or another --out")
    prompts = {line.number: line.digest for line in lines}
    finished: dict[int, bool] = {}
    for record in records:
        number = record["line"]
        if number in finished:
            raise ValueError(f"{path} has two answers to line {number}: remove one")
        if prompts.get(number) != record.get("digest"):
            raise ValueError(f"line {number} of the prompts has changed since {path} was begun: give another --out")
        finished[number] = "error" in record
    return finished


def _encode(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _write(file: int, path: Path, record: Mapping[str, Any]) -> None:
    rest = _encode(record)
    try:
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    except OSError as error:  # such as a full disk: what is said of an open file does not name it
        raise OSError(error.errno, error.strerror, str(path)) from error


def _sync_directory(directory: Path) -> None:
    """Bring the name of a new file to the disk, where the system lets one."""
    with contextlib.suppress(OSError):
        place = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)


def _lock(file: int, path: Path) -> None:
    """Hold the file until it is closed; the system lets go of it when the process ends, however it does."""
    try:
        import fcntl
    except ImportError:  # Not on Windows: there, two processes must not write to one file.
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(f"another process is writing to {path}; wait until it is done") from None
