"""The demo family's text: the Python standard library's own source, split into training and held-out files.

Files are named by their path relative to the standard library's folder, so that lists made on one machine can be
read on another; each list carries every file's SHA-256, and reading checks it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipedec_jax.whole_files import write_whole

EXCLUDED_FOLDERS = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data")
"""Folders that are left out wherever they appear: foreign packages, tests, and one large generated text."""

EXCLUDED_FILES = ("html/entities.py", "lib2to3/pgen2/", "_sysconfigdata", "config-3", "idlelib/help")
"""Prefixes of single files that are tables or generated per machine."""

GENERATED_MARK = re.compile(r"^(decoding_table|decoding_map)\b", re.MULTILINE)
"""What tells a character set's table among the codecs."""

HELD_OUT_PACKAGES = ("json", "logging", "email", "http", "concurrent", "wsgiref", "tomllib", "zoneinfo")
"""Whole packages the models never see in training."""

SEQUENCE = 13
"""Lexical tokens of one sequence in the overlap report."""

LEXICAL = re.compile(r"\w+|[^\w\s]")
"""A lexical token: a run of word characters, or one other character that is not white space."""


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of the standard library."""

    path: str
    """Relative to the standard library's folder, with forward slashes."""
    sha256: str
    """Digest of the file's bytes."""

    @property
    def package(self) -> str:
        """The top-level package or module the file belongs to."""
        return self.path.split("/")[0].removesuffix(".py")


def library_root() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def find_files(root: Path) -> list[SourceFile]:
    """All usable source files under `root`, sorted by path."""
    found = []
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        name = relative.as_posix()
        if any(part in EXCLUDED_FOLDERS for part in relative.parts) or name.startswith(EXCLUDED_FILES):
            continue
        data = file.read_bytes()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if not text.strip() or GENERATED_MARK.search(text):
            continue
        found.append(SourceFile(name, digest(data)))
    return found


def split_files(files: Sequence[SourceFile]) -> tuple[list[SourceFile], list[SourceFile]]:
    """Training files and held-out candidates, by package."""
    training = [file for file in files if file.package not in HELD_OUT_PACKAGES]
    held_out = [file for file in files if file.package in HELD_OUT_PACKAGES]
    return training, held_out


def read_text(root: Path, file: SourceFile) -> str:
    """The text of a listed file.

    Raises:
        FileNotFoundError: when the file is missing under `root`.
        ValueError: when its content is not the listed one (another Python version).
    """
    path = root / file.path
    if not path.is_file():
        raise FileNotFoundError(f"{file.path} is not in the standard library at {root}; the lists are of Python 3.11")
    data = path.read_bytes()
    if digest(data) != file.sha256:
        raise ValueError(f"{file.path} at {root} differs from the listed version (SHA-256); use the Python of the list")
    return data.decode("utf-8")


def write_list(path: Path, files: Iterable[SourceFile]) -> None:
    """Write a list, one `sha256  path` per line, as `sha256sum` prints it."""
    write_whole(path, "".join(f"{file.sha256}  {file.path}\n" for file in files))


def read_list(path: Path) -> list[SourceFile]:
    """Read a list that `write_list` wrote."""
    files = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        sha256, separator, name = line.partition("  ")
        if not separator or len(sha256) != 64:
            raise ValueError(f"{path}:{number}: expected 'sha256  path', found {line!r}")
        files.append(SourceFile(name, sha256))
    return files


def sequences(text: str, length: int = SEQUENCE) -> list[tuple[str, ...]]:
    """All runs of `length` lexical tokens of `text`; none when it is shorter."""
    tokens = LEXICAL.findall(text)
    return [tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1)]


@dataclasses.dataclass(frozen=True)
class Overlap:
    """How much of one held-out candidate also stands in training text."""

    path: str
    sequences: int
    """Runs of 13 lexical tokens in the file."""
    shared: int
    """Those of them that occur somewhere in the training text."""
    kept: bool
    """Whether the file stays in the held-out list."""

    @property
    def share(self) -> float:
        """Shared runs as a fraction of all (0 for a file without any)."""
        return self.shared / self.sequences if self.sequences else 0.0


def measure_overlap(training: Iterable[str], held_out: Iterable[tuple[str, str]], limit: float = 0.2) -> list[Overlap]:
    """Overlap of every held-out `(path, text)` with all training texts; files above `limit` are not kept."""
    known: set[int] = set()
    for text in training:
        known.update(map(hash, sequences(text)))
    report = []
    for path, text in held_out:
        runs = sequences(text)
        shared = sum(hash(run) in known for run in runs)
        report.append(Overlap(path, len(runs), shared, not runs or shared <= limit * len(runs)))
    return report


def write_overlap(path: Path, report: Sequence[Overlap], limit: float) -> None:
    """Write the overlap report as JSON, the largest share first."""
    rows = [
        dataclasses.asdict(row) | {"share": round(row.share, 4)}
        for row in sorted(report, key=lambda row: (-row.share, row.path))
    ]
    total, shared = sum(row.sequences for row in report if row.kept), sum(row.shared for row in report if row.kept)
    summary = {
        "sequence_tokens": SEQUENCE,
        "lexical_token": LEXICAL.pattern,
        "limit": limit,
        "files": len(report),
        "kept": sum(row.kept for row in report),
        "share_of_kept_text": round(shared / total, 4) if total else 0.0,
        "report": rows,
    }
    write_whole(path, json.dumps(summary, indent=1) + "\n")


def prepare(root: Path, directory: Path, limit: float = 0.2) -> tuple[list[SourceFile], list[SourceFile]]:
    """Choose the files, write `train_files.txt`, `heldout_files.txt` and `overlap.json`; returns both lists.

    Python's licence goes with them: the models are made of its source.
    """
    training, candidates = split_files(find_files(root))
    if not training or not candidates:
        raise FileNotFoundError(f"no standard library source under {root}")
    report = measure_overlap(
        (read_text(root, file) for file in training), ((file.path, read_text(root, file)) for file in candidates), limit
    )
    held_out = [file for file, row in zip(candidates, report, strict=True) if row.kept]
    directory.mkdir(parents=True, exist_ok=True)
    write_list(directory / "train_files.txt", training)
    write_list(directory / "heldout_files.txt", held_out)
    write_overlap(directory / "overlap.json", report, limit)
    licence = root / "LICENSE.txt"
    if licence.is_file():
        (directory / "LICENSE-PYTHON.txt").write_bytes(licence.read_bytes())
    return training, held_out
