"""Checksums of large files, computed beside other work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import xxhash

from checkpoints_convert.manifest import FileFacts
from checkpoints_convert.paths import is_cloud

BLOCK = 2**22


class BackgroundChecksums:
    """Computes the checksums of files one after the other in a thread. Use as a context manager.

    Args:
        files: in the order in which others read them, so that both share what the system has cached.
        known: facts of files that need not be read again, by file.
        done: told each file and its facts.
    """

    def __init__(
        self, files: Sequence[Path], known: dict[Path, FileFacts], done: Callable[[Path, FileFacts], object]
    ) -> None:
        self._files = [file for file in files if file not in known]
        self._facts = dict(known)
        self._done = done
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checksums", daemon=True)

    def __enter__(self) -> BackgroundChecksums:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def result(self) -> dict[Path, FileFacts]:
        """The facts of all files, once they are there.

        Raises:
            OSError: when a file could not be read.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._facts

    def _run(self) -> None:
        try:
            for file in self._files:
                facts = file_facts(file, self._stop.is_set)
                if facts is None:
                    return
                self._facts[file] = facts
                self._done(file, facts)
        except Exception as error:  # Raised again by `result`.
            self._error = error


def file_facts(file: Path, stopped: Callable[[], bool] = lambda: False) -> FileFacts | None:
    """Size and checksum of a file, read in blocks; None when `stopped` before the end."""
    digest = xxhash.xxh3_128()
    size = 0
    block = bytearray(BLOCK)
    # Object stores take no word on buffers.
    with file.open("rb") if is_cloud(file) else file.open("rb", buffering=0) as opened:
        while count := cast(Any, opened).readinto(block):
            if stopped():
                return None
            size += count
            digest.update(memoryview(block)[:count])
    return FileFacts(size, digest.hexdigest())
