"""Sources on the Hugging Face hub: first the local cache, then a download."""

from __future__ import annotations

import re
from pathlib import Path

from checkpoints_convert.source import COPIED

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""A repository on the hub: `org/name`."""

CONFIGS = ("config.json", *COPIED)
SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
META = ("consolidated.*.pth",)


def local_directory(source: str | Path) -> Path:
    """The directory that `source` names: itself, or that of a hub repository, downloaded if it is not in the cache.

    Raises:
        FileNotFoundError: when there is no such directory, and no such repository can be had.
    """
    path = Path(source)
    name = str(source)
    if path.exists() or not NAME.fullmatch(name):
        return path
    return cached(name) or _download(name)


def cached(name: str) -> Path | None:
    """The snapshot of a hub repository in the local Hugging Face cache, if it is there with its weights."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None
    weights = (*SAFETENSORS, *PICKLES, *META)
    return found if any(any(found.glob(pattern)) for pattern in weights) else None


def _download(name: str) -> Path:
    """Download the files of a repository that a conversion reads: one format of weights, the safest there is."""
    import huggingface_hub

    try:
        files = huggingface_hub.HfApi().list_repo_files(name)
        formats = (SAFETENSORS, PICKLES, META)
        present = [kind for kind in formats if any(Path(file).match(pattern) for file in files for pattern in kind)]
        if not present:
            raise FileNotFoundError(f"the repository {name} on the Hugging Face hub holds no LLaMA weights")
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[*CONFIGS, *present[0]]))
    except FileNotFoundError:
        raise
    except Exception as error:  # The library and what it stands on raise errors of many kinds.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"{name} is no directory here, not in the local Hugging Face cache, and could not be downloaded: {reason}"
        ) from error
