"""Where a conversion is made before it is complete, what of it is done, and that no two work on it at once.

.NAME.partial/lock          held while a process works here
.NAME.partial/plan.json     what is being converted how; another plan starts anew
.NAME.partial/done/         the facts of each array and source file that is finished
.NAME.partial/checkpoint/   becomes NAME by a rename (an object store, which has no rename, is written in place)
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoints_convert import manifest
from checkpoints_convert.config_json import Json
from checkpoints_convert.paths import any_path, is_cloud, remove_tree

SUFFIX = ".partial"
OWN = ("lock", "plan.json", "done", "checkpoint", "old")
"""What a conversion may leave in its workplace."""
_CLEARING = "removing what was here, for\n"
"""Before the plan while that is done."""


def workplace_of(destination: Path) -> Path:
    """The directory beside `destination` in which it is made."""
    return destination.parent / f".{destination.name}{SUFFIX}"


class Workplace:
    """The unfinished state of one conversion. Made by `workplace`."""

    def __init__(self, destination: Path, plan: Json) -> None:
        self.destination = destination
        self.root = workplace_of(destination)
        self.in_place = is_cloud(destination)
        self.checkpoint = destination if self.in_place else self.root / "checkpoint"
        self._plan = json.dumps(plan, sort_keys=True, indent=1) + "\n"
        self._done = self.root / "done"

    @property
    def begun(self) -> bool:
        """Whether an earlier run left some conversion here, this or another one, or it still runs."""
        return (self.root / "plan.json").is_file()

    @property
    def resumed(self) -> bool:
        """Whether an earlier run left this very conversion here."""
        return self._noted() == self._plan

    @property
    def clearing(self) -> bool:
        """Whether an earlier run of this conversion was stopped while it removed what had been here."""
        return self._noted() == _CLEARING + self._plan

    def _noted(self) -> str | None:
        try:
            return (self.root / "plan.json").read_text()
        except (OSError, ValueError):
            return None

    @property
    def finished(self) -> bool:
        """Whether an earlier run of this conversion was stopped after the checkpoint was in place."""
        return (
            self.resumed
            and not self.in_place
            and not self.checkpoint.exists()
            and (self.destination / manifest.FILE).is_file()
        )

    def prepare(self) -> None:
        """Make an empty workplace, unless this conversion is to go on in it."""
        if self.in_place:
            # From now on, what is there is no checkpoint.
            (self.checkpoint / manifest.FILE).unlink(missing_ok=True)
        if self.resumed and self.checkpoint.exists():
            return
        # First, so that what is half removed is never taken for something to go on with.
        (self.root / "plan.json").write_text(_CLEARING + self._plan)
        remove_tree(self._done)
        if self.in_place:
            remove_tree(self.checkpoint)
        remove_tree(self.root / "checkpoint")
        self._done.mkdir(parents=True, exist_ok=True)
        self.checkpoint.mkdir(parents=True, exist_ok=True)
        (self.root / "plan.json").write_text(self._plan)

    def recorded(self, kind: str, name: str) -> Any:
        """What was recorded of a finished piece, or None."""
        try:
            return json.loads((self._done / f"{kind}.{name.replace('/', '.')}.json").read_text())
        except (OSError, ValueError):  # Not there, or killed while it was written.
            return None

    def record(self, kind: str, name: str, facts: Any) -> None:
        """Record a piece that is finished."""
        (self._done / f"{kind}.{name.replace('/', '.')}.json").write_text(json.dumps(facts))

    def finish(self) -> None:
        """Put the complete checkpoint into its place, an older one away, and remove everything else."""
        if not self.in_place:
            for path in [*self.checkpoint.rglob("*"), self.checkpoint]:
                _sync(path)
            old = self.root / "old"
            if self.destination.exists():
                # A run before this one may have been stopped between the two renames.
                remove_tree(old)
                self.destination.rename(old)
            try:
                self.checkpoint.rename(self.destination)
            except OSError:
                if old.exists() and not self.destination.exists():
                    old.rename(self.destination)
                raise
            _sync(self.destination.parent)
        self.remove()

    def remove(self) -> None:
        """Remove all that was made here."""
        remove_tree(self.root)
        if self.in_place and not (self.checkpoint / manifest.FILE).is_file():
            remove_tree(self.checkpoint)


@contextlib.contextmanager
def workplace(destination: Path, plan: Json, *, wait: bool = False) -> Iterator[Workplace]:
    """The workplace of a conversion, for one process at a time.

    Args:
        destination: of the checkpoint.
        plan: what decides the bytes of the result; must be JSON.
        wait: wait while another process works on the same destination.

    Raises:
        FileExistsError: when another process works there, unless `wait`, or what is there is no conversion's.
    """
    place = Workplace(any_path(destination), plan)
    check_own(place.root)
    place.root.mkdir(parents=True, exist_ok=True)
    # Object stores have no locks.
    with contextlib.nullcontext() if place.in_place else _locked(place.root, wait):
        try:
            yield place
        finally:
            # Of a conversion that never began, nothing stays.
            if not place.begun:
                remove_tree(place.root)


def check_own(root: Path) -> None:
    """Raise `FileExistsError` when a workplace's directory is somebody else's: it will be written to and removed."""
    if not root.exists() and not _is_link(root):
        return
    foreign = not root.is_dir() or _is_link(root) or sorted({entry.name for entry in root.iterdir()} - {*OWN})
    if foreign:
        what = f"holds {', '.join(foreign[:3])}" if isinstance(foreign, list) else "is no directory, or a link to one"
        raise FileExistsError(
            f"{root}, where the conversion would be made, is not left by one (it {what}): move it away, or choose "
            "another destination"
        )


def _is_link(path: Path) -> bool:
    return not is_cloud(path) and path.is_symlink()


@contextlib.contextmanager
def _locked(root: Path, wait: bool) -> Iterator[None]:
    """Hold the lock of a workplace; the system lets go of it when the process ends, however it does."""
    try:
        import fcntl
    except ImportError:  # Not on Windows: there, two processes must not convert to one place.
        yield
        return
    while True:
        root.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # Whoever held it has just removed the directory.
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Whoever held it may have removed the file while we waited; that lock protects nothing any more.
            if _is_same_file(file, root / "lock"):
                yield
                return
        except BlockingIOError:
            raise FileExistsError(
                f"another process is converting to {root.name.removeprefix('.').removesuffix(SUFFIX)!r} in "
                f"{root.parent}; wait until it is done"
            ) from None
        finally:
            os.close(file)


def _is_same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def boot() -> str:
    """What tells this start of the machine from others, where the system says it.

    What was written before a power cut may not be on disk, although it was recorded as finished.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _sync(path: Path) -> None:
    """Make a file, or a rename in a directory, survive a power cut, where the system can."""
    with contextlib.suppress(PermissionError, IsADirectoryError):
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
