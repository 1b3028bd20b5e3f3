"""Conversions killed at random moments: started again, each must end with the same bytes."""

from __future__ import annotations

import hashlib
import importlib
import os
import random
import shutil
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

from tqdm import tqdm

from checkpoints_convert.conversion import convert
from checkpoints_convert.store import is_converted, open_checkpoint
from pipedec_jax.tokenizer import no_advice


class Killer:
    """Converts one source over and over and kills the processes.

    Processes are forked from this one, which has everything imported: starting Python anew would take most of the
    time. So nothing here may compute before.

    Args:
        source: what to convert.
        directory: to work in.
    """

    def __init__(self, source: Path, directory: Path) -> None:
        # What a conversion imports when it needs it.
        with no_advice():
            importlib.import_module("transformers.tokenization_utils_tokenizers")

        self.source = source
        self.destination = directory / "converted"
        begun = time.perf_counter()
        if _wait(self._start()):
            raise RuntimeError("the conversion fails even when nobody kills it")
        self.seconds = time.perf_counter() - begun
        """What a whole conversion takes."""
        self.expected = tree_digest(self.destination)
        shutil.rmtree(self.destination)

    def run(self, seed: int) -> int:
        """Kill a conversion one to three times at random moments, then let it end; returns how often it was killed.

        Raises:
            AssertionError: when it does not end with the same bytes, leaves unfinished files beside, or an incomplete
                checkpoint could be opened.
        """
        rng = random.Random(seed)
        kills = 0
        for _ in range(rng.randint(1, 3)):
            process = self._start()
            time.sleep(rng.uniform(0, self.seconds))
            os.kill(process, rng.choice((signal.SIGKILL, signal.SIGTERM)))
            if _wait(process):
                kills += 1
            if is_converted(self.destination):
                break
            try:
                open_checkpoint(self.destination)
            except FileNotFoundError:
                continue
            raise AssertionError(f"seed {seed}: an incomplete checkpoint opens")
        if not is_converted(self.destination) and _wait(self._start()):
            raise AssertionError(f"seed {seed}: the conversion does not go on")
        if tree_digest(self.destination) != self.expected:
            raise AssertionError(f"seed {seed}: other bytes after {kills} kills")
        # A kill after the last rename may leave the empty workplace; the next conversion to the same place removes it.
        shutil.rmtree(self.destination)
        workplace = self.destination.with_name(f".{self.destination.name}.partial")
        if (workplace / "checkpoint").exists():
            raise AssertionError(f"seed {seed}: unfinished files are left beside the complete checkpoint")
        shutil.rmtree(workplace, ignore_errors=True)
        return kills

    def _start(self) -> int:
        """Start a conversion in a process of its own."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            process = os.fork()
        if process:
            return process
        status = 1
        try:
            signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
            # Forked processes share tqdm's lock, and one that is killed while it holds it would stop all later ones.
            tqdm.set_lock(threading.RLock())
            convert(self.source, self.destination)
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(status)


def tree_digest(directory: Path) -> str:
    """A digest of all names and contents below a directory."""
    digest = hashlib.blake2b()
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            digest.update(f"{path.relative_to(directory)}\0{len(data)}\0".encode())
            digest.update(data)
    return digest.hexdigest()


def _wait(process: int) -> int:
    """The exit status of a process, once it has ended; 0 means well."""
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)
