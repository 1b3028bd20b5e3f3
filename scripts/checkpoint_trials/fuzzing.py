"""Corrupted checkpoints by the thousand: each must end in a clear error or a correct result, nothing left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from checkpoint_trials.corruption import corrupt
from checkpoint_trials.good_inputs import Kind, write_good
from checkpoints_convert.conversion import convert
from checkpoints_convert.library import library
from checkpoints_convert.report import describe
from checkpoints_convert.source import same_bits
from checkpoints_convert.store import is_converted, open_checkpoint
from checkpoints_convert.verify import damage, differences
from pipedec_jax.model.parameters import parameter_shapes

SECONDS = 60
"""After which an input counts as one that hangs."""
MEMORY = 2 * 10**9
"""Bytes of address space beyond those in use at the start."""

EXPECTED = (ValueError, OSError, ImportError)
"""What a bad input may raise: what the command turns into one line."""


class Hang(BaseException):
    """An input took longer than `SECONDS`."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one input."""

    seed: int
    what: str
    """Which input, and what was done to it."""
    error: str | None
    """The message it ended in; None where it ended in a correct result."""


class Fuzzer:
    """Makes corrupted inputs from a few good ones, and tries them.

    Args:
        directory: to work in; everything in it but the good inputs is removed after each try.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.good = directory / "good"
        self.elsewhere = directory / "elsewhere"
        self.trial = directory / "trial"
        self.elsewhere.mkdir(parents=True)
        self.kinds = sorted(write_good(self.good, self.elsewhere))
        self._converted = {kind: open_checkpoint(self.good / kind) for kind in self.kinds if _is_converted(kind)}

    def run(self, seed: int) -> Outcome:
        """Make input number `seed` and try it.

        Raises:
            AssertionError: when it ends in anything but a clear error or a correct result.
        """
        rng = random.Random(seed)
        kind = rng.choice(self.kinds)
        self.trial.mkdir()
        before = _contents(self.elsewhere)
        try:
            shutil.copytree(self.good / kind, self.trial / kind, symlinks=True)
            place = next((self.trial / kind).rglob("snapshots/*"), self.trial / kind)
            full = not _is_converted(kind) and rng.random() < 0.05
            limit = rng.randrange(4000) if full else None
            what = f"{kind}: " + (
                f"no file may exceed {limit} bytes" if full else corrupt(place, kind, self.elsewhere, rng)
            )
            error = self._try(kind, place, limit, rng.random() < 0.2, what)
            assert _contents(self.elsewhere) == before, f"{what}: something outside was written"
            return Outcome(seed, what, error)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        finally:
            shutil.rmtree(self.trial)

    def _try(self, kind: Kind, place: Path, limit: int | None, int8: bool, what: str) -> str | None:
        destination = self.trial / "out"
        try:
            with _time_limit(), _file_limit(limit):
                self._look(kind, place)
                if _is_converted(kind):
                    self._read(kind, place)
                else:
                    convert(place, destination, int8=int8)
        except EXPECTED as error:
            if not str(error).strip():
                raise AssertionError(f"{what}: {type(error).__name__} without a message") from error
            left = sorted(path.name for path in self.trial.iterdir() if path.name != kind)
            if left:
                raise AssertionError(f"{what}: {left} left behind after {error}") from error
            return f"{type(error).__name__}: {error}"
        except (Exception, Hang) as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        if not _is_converted(kind):
            assert is_converted(destination), what
            assert list(damage(destination)) == [], what
            assert list(differences(place, destination)) == [], what
        return None

    def _look(self, kind: Kind, place: Path) -> None:
        """List the directory, which must show anything, inspect and verify what is in it, which may be refused."""
        library(place.parent)
        with contextlib.suppress(*EXPECTED):
            describe(place)
        if _is_converted(kind):
            with contextlib.suppress(*EXPECTED):
                list(damage(place))

    def _read(self, kind: Kind, place: Path) -> None:
        """Read a converted checkpoint: what it gives must be what was stored."""
        checkpoint, expected = open_checkpoint(place), self._converted[kind]
        assert checkpoint.manifest == expected.manifest, "another manifest was taken"
        for path in parameter_shapes(expected.config):
            assert same_bits(checkpoint.read(path), expected.read(path)), f"{path} was read wrong"


def _is_converted(kind: Kind) -> bool:
    return kind.startswith("converted")


def limit_memory() -> None:
    """Let no input take more than `MEMORY` beyond what the process has now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))


def _contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _file_limit(limit: int | None) -> Iterator[None]:
    """Let no file grow beyond `limit` bytes, as on a disk that is full."""
    if limit is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
