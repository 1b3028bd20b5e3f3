"""Checkpoints as others publish them, read in place in our layout: what Hugging Face's and Meta's have in common."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from checkpoints_convert.checkpoint import DTYPES, Checkpoint
from checkpoints_convert.layout import contiguous
from checkpoints_convert.paths import inside
from checkpoints_convert.tensor_files import TensorInfo
from pipedec_jax.model.parameters import Part
from pipedec_jax.small_files import check_size

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
"""At least one of these must be there."""
COPIED = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "params.json",
)
"""Patterns of the tokenizer and generation files that go along with the weights (Meta's `params.json` tells which
special tokens its tokenizer has)."""
COMPARED = 2**24
"""Elements that are compared at a time."""
TOGETHER_BYTES = 2**27
"""Most bytes of all of them, which are in memory together."""


@dataclasses.dataclass(frozen=True, eq=False)
class SourceCheckpoint(Checkpoint):
    """A published checkpoint. Nothing of it is in memory but what `view` maps."""

    format: str
    """`huggingface-safetensors`, `huggingface-pickle` or `meta`."""
    stored_dtypes: tuple[str, ...]
    """All dtypes found; where there are several, `dtype` is the one that holds them all without rounding."""
    files: tuple[Path, ...]
    """The weight files."""

    @abc.abstractmethod
    def view(self, path: str) -> np.ndarray:
        """An array in our layout and the dtype it is stored in; mapped where the source's layout allows it.

        Raises:
            ValueError: when its file is damaged.
        """

    @abc.abstractmethod
    def reading_order(self) -> list[str]:
        """All paths of our tree, in the order in which their tensors lie in the files."""

    @abc.abstractmethod
    def check_tied_head(self) -> None:
        """Compare a stored head that is said to be tied with the embedding; `ValueError` when they differ."""

    def _read(self, path: str, part: Part) -> np.ndarray:
        array = contiguous(self.view(path)[part]).astype(DTYPES[self.dtype], copy=False)
        # What is returned must not hang on a file.
        return array if array.flags.owndata else array.copy()


def tokenizer_files(directory: str | Path) -> dict[str, Path]:
    """Tokenizer and generation files of a model directory, under the names they have in a converted checkpoint.

    Meta's first releases keep one `tokenizer.model` in the parent directory of all sizes.

    Raises:
        FileNotFoundError: when there is no tokenizer among them.
        ValueError: when one is a link that leads out of the directory, or they are too large to be read whole.
    """
    directory = Path(directory)
    found = {
        path.relative_to(directory).as_posix(): inside(path, directory)
        for pattern in COPIED
        for path in sorted(directory.glob(pattern))
        if path.is_file()
    }
    beside = directory.absolute().parent / "tokenizer.model"
    if not any(name in found for name in TOKENIZERS):
        if not ((directory / "params.json").is_file() and beside.is_file()):
            raise FileNotFoundError(f"{directory} has no tokenizer; expected {' or '.join(TOKENIZERS)}")
        found[beside.name] = inside(beside, beside.parent)
    _check_sizes(found.values())
    return found


def check_tensors(
    expected: dict[str, tuple[int, ...]],
    tensors: dict[str, TensorInfo],
    *,
    optional: Iterable[str] = (),
    ignored: Iterable[str] = (),
    described_in: str,
    hints: dict[str, str] | None = None,
) -> tuple[str, ...]:
    """Check that tensors are exactly those of a config; returns the dtypes they are stored in.

    Args:
        expected: shape of every tensor by name.
        tensors: what the files hold.
        optional: names of `expected` that may be absent.
        ignored: names of `tensors` that do not matter.
        described_in: the file that asks for these shapes.
        hints: what to add to the message when a tensor is missing.

    Raises:
        ValueError: naming a missing, unknown or misshapen tensor, or one of another dtype.
    """
    missing = [name for name in expected if name not in tensors and name not in set(optional)]
    unknown = [name for name in tensors if name not in expected and name not in set(ignored)]
    if missing:
        # Their names may be all that is wrong.
        others = f"; it has unknown tensors {_names(unknown)}" if unknown else ""
        raise ValueError(f"the checkpoint lacks tensors {_names(missing)}{(hints or {}).get(missing[0], '')}{others}")
    if unknown:
        raise ValueError(f"the checkpoint has unknown tensors {_names(unknown)}")
    dtypes = set()
    for name, shape in expected.items():
        info = tensors.get(name)
        if info is None:
            continue
        if info.shape != shape:
            raise ValueError(f"tensor {name!r} has shape {info.shape}, {described_in} asks for {shape}")
        if info.dtype not in DTYPES:
            raise ValueError(f"tensor {name!r} is stored as {info.dtype}; supported are {', '.join(DTYPES)}")
        dtypes.add(info.dtype)
    return tuple(sorted(dtypes))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays agree in shape, dtype and every bit (unlike `==`, also for NaN and negative zero)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = np.dtype(f"u{a.dtype.itemsize}")
    if a.ndim == 0:
        return bool(a.view(bits) == b.view(bits))
    # Row by row, as the comparison makes an array of its own.
    rows = max(1, COMPARED // max(1, a[:1].size))
    places = (slice(start, start + rows) for start in range(0, len(a), rows))
    return all(np.array_equal(a[place].view(bits), b[place].view(bits)) for place in places)


def _check_sizes(files: Iterable[Path]) -> None:
    total = 0
    for file in files:
        check_size(file)
        total += file.stat().st_size
        if total > TOGETHER_BYTES:
            raise ValueError(f"the tokenizer files beside {file} have more than {TOGETHER_BYTES:,} bytes together")


def _names(names: Iterable[str], most: int = 4) -> str:
    quoted = [repr(name) for name in names]
    more = f" and {len(quoted) - most} more" if len(quoted) > most else ""
    return ", ".join(quoted[:most]) + more
