"""The text that exit heads are trained and measured on: files under the target's tokenizer, or the target's records."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from pipedec_jax.tokenizer import Tokenizer
from pipedec_jax.training.batches import TextWindows
from pipedec_jax.training.corpus import library_root, read_list, read_text
from pipedec_jax.training.teacher import TeacherWindows
from pipedec_jax.training.trainer import Batches

HELD_OUT_SHARE = 20
"""Without held-out files of their own, the last of the documents, about one in this many, are held out."""


@dataclasses.dataclass(frozen=True)
class ExitData:
    """What a run learns from and what it is measured on."""

    batches: Batches
    """Training sequences."""
    windows: TextWindows | None
    """The training text as windows, for the target to continue; `None` for records."""
    held_out: list[np.ndarray]
    """Held-out documents as token ids, begin token first, if there is one."""
    begin: int | None
    """The token that begins a text; `None` where the tokenizer puts none."""
    digest: str
    """A hash of all training tokens, by which a run that goes on knows its data again."""


def read_files(names: Iterable[str], root: Path | None = None) -> list[str]:
    """The texts of files; a name `@LIST` stands for the files that a list of `corpus.write_list` names.

    Args:
        names: Paths, or `@` and the path of a list.
        root: Where a list's files lie; the running interpreter's standard library when not given.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: when a file is no UTF-8 text, or not the one that the list means (SHA-256).
    """
    texts = []
    for name in names:
        path = Path(name.removeprefix("@"))
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file; give text files, or @LIST for a list of them")
        if name.startswith("@"):
            texts += [read_text(root or library_root(), file) for file in read_list(path)]
            continue
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start})") from error
    return texts


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str], end_token: int | None) -> list[np.ndarray]:
    """Token ids (`int32`) of every text that is not empty: begin token, text, end token, where there are such."""
    end = [] if end_token is None else [end_token]
    return [np.asarray([*tokenizer.encode(text), *end], np.int32) for text in texts if text]


def begin_token(tokenizer: Tokenizer) -> int | None:
    """The token that the tokenizer puts before a text; `None` where it puts none."""
    return next(iter(tokenizer.encode("")), None)


def open_data(
    tokenizer: Tokenizer,
    end_token: int | None,
    data: Sequence[str],
    held_out: Sequence[str] = (),
    root: Path | None = None,
    seed: int = 0,
) -> ExitData:
    """Read training and held-out data.

    Args:
        tokenizer: The target's.
        end_token: Ends a document.
        data: Text files or lists (`read_files`), or one directory with records that `teacher.write_records` wrote.
        held_out: Text files or lists. Not given, the last of the training documents are held out.
        root: As in `read_files`.
        seed: Shifts windows, shuffles records.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: for unreadable files, or too little text to hold some out.
    """
    begin = begin_token(tokenizer)
    apart = encode_documents(tokenizer, read_files(held_out, root), end_token)
    directories = [name for name in data if Path(name).is_dir()]
    if directories:
        if len(data) > 1:
            raise ValueError(f"records come from one directory alone, not from {', '.join(data)}")
        if not any(Path(data[0]).glob("*.npz")):
            raise ValueError(f"{data[0]} is a folder without records (.npz): name its text files, as in {data[0]}/*.py")
        if not apart:
            raise ValueError(f"{data[0]} holds records: name held-out text as well (--held-out)")
        records = TeacherWindows(Path(data[0]), seed)
        if records.highest >= tokenizer.size:
            raise ValueError(
                f"{data[0]} holds token {records.highest}, and the target's tokenizer has {tokenizer.size} tokens: "
                "give records of this target (--records writes them)"
            )
        return ExitData(records, None, apart, begin, records.digest)
    documents = encode_documents(tokenizer, read_files(data, root), end_token)
    if not apart:
        count = max(1, len(documents) // HELD_OUT_SHARE)
        documents, apart = documents[:-count], documents[-count:]
        if not documents:
            raise ValueError("one file alone leaves nothing to measure on: give more, or held-out files (--held-out)")
    digest = hashlib.sha256(b"".join(document.tobytes() for document in documents)).hexdigest()
    windows = TextWindows(documents, begin, seed)
    return ExitData(_without_targets(windows), windows, apart, begin, digest)


def _without_targets(windows: TextWindows) -> Batches:
    """The windows' tokens alone: the target, not the text, says what comes next."""
    return lambda window, B, T: {"token": windows(window, B, T)["token"]}
