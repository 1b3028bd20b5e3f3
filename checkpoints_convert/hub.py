"""Sources on the Hugging Face hub: first the local cache, then a download."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

from checkpoints_convert.detection import open_source
from checkpoints_convert.paths import any_path
from checkpoints_convert.source import COPIED, tokenizer_files

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""A repository on the hub: `org/name`."""

CONFIGS = ("config.json", *COPIED)
SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
META = ("consolidated.*.pth",)
TIMEOUT = 20.0
"""Seconds for the hub to say what a repository holds."""


def local_directory(source: str | Path) -> Path:
    """The directory that `source` names: itself, or that of a hub repository, downloaded if it is not in the cache.

    Raises:
        FileNotFoundError: when there is no such directory, and no such repository can be had.
    """
    path = any_path(source)
    name = str(source)
    if not NAME.fullmatch(name) or path.exists():
        return path
    snapshot = _snapshot(name)
    lacking = None if snapshot is None else what_lacks(snapshot)
    return _download(name, lacking) if snapshot is None or lacking else snapshot


def what_lacks(snapshot: Path) -> str | None:
    """Which file of a model an interrupted download has left out, in words; None when all are there.

    What else may be wrong is for the reader to say.
    """
    try:
        open_source(snapshot)
        tokenizer_files(snapshot)
    except FileNotFoundError as error:
        return str(error)
    except (ValueError, OSError, ImportError):
        pass
    return None


def _snapshot(name: str) -> Path | None:
    """Where the cache has (parts of) a repository."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None


def _download(name: str, lacking: str | None) -> Path:
    """Download the files of a repository that a conversion reads: one format of weights, the safest there is."""
    import huggingface_hub

    formats = (SAFETENSORS, PICKLES, META)
    try:
        # Asked once: a list of files is asked for five times more, over half a minute, where there is no network.
        listed = huggingface_hub.HfApi().model_info(name, timeout=TIMEOUT).siblings
        files = [file.rfilename for file in listed or ()]
        present = [kind for kind in formats if any(fnmatchcase(file, pattern) for file in files for pattern in kind)]
        snapshot = None
        if present:
            # Without a network, the library may return what is there, whole or not.
            snapshot = Path(huggingface_hub.snapshot_download(name, allow_patterns=[*CONFIGS, *present[0]]))
    except Exception as error:  # The library and what it stands on raise errors of many kinds.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        here = (
            f"not whole in the local Hugging Face cache ({lacking})"
            if lacking
            else "not in the local Hugging Face cache"
        )
        raise FileNotFoundError(
            f"{name} is no directory here, {here}, and could not be downloaded: {reason}"
        ) from error
    if snapshot is None:
        raise FileNotFoundError(f"the repository {name} on the Hugging Face hub holds no LLaMA weights")
    if lacking := what_lacks(snapshot):
        raise FileNotFoundError(f"{name} was downloaded from the Hugging Face hub, but {lacking}")
    return snapshot
