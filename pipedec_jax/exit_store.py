"""Exit heads on disk, beside the target they belong to.

    TARGET/exits/4-block/head.safetensors   the head's arrays under their paths (`model.exit_head.head_shapes`)
    TARGET/exits/4-block/head.json          what the head is, which target it belongs to, how it was trained;
                                            written last

TARGET is a converted checkpoint or a Hugging Face directory. A head knows its target by geometry, compared before any
weight is read, and by a fingerprint of the weights. It drafts for that target also where it becomes int8 as it is
loaded: guesses change no token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from checkpoints_convert import is_converted, is_source
from checkpoints_convert.cache import stamp
from checkpoints_convert.checkpoint import DTYPES, Checkpoint, check_dtype
from pipedec_jax.config import LlamaConfig
from pipedec_jax.disk_cache import cache_directory
from pipedec_jax.loading import Model
from pipedec_jax.model.exit_head import ExitHead, ExitHeadConfig, head_shapes
from pipedec_jax.model.int8 import unrounded
from pipedec_jax.model.parameters import Parameters, ParameterSource, flatten, nest, parameter_shapes
from pipedec_jax.whole_files import write_whole

FOLDER = "exits"
WEIGHTS = "head.safetensors"
DESCRIPTION = "head.json"
VERSION = 1
"""Version of the layout above; a reader refuses any other."""

SAMPLE = 65536
"""Elements of each array that a target's fingerprint covers, evenly spread over it."""


def fingerprint(source: ParameterSource) -> str:
    """A hash of a model's geometry and of a sample of every array, the same for every way to store equal values.

    Up to `SAMPLE` elements an array, compared as float32: another model, or a fine-tune of the same one, differs in
    them, and a large array need not be hashed whole. Reads every array once.
    """
    digest = hashlib.sha256(json.dumps(source.config.to_dict(), sort_keys=True).encode())
    for path in parameter_shapes(source.config):
        flat = np.asarray(source.read(path)).reshape(-1)
        picked = np.linspace(0, flat.size - 1, min(flat.size, SAMPLE)).astype(np.int64)
        digest.update(np.ascontiguousarray(flat[picked].astype(np.float32)).tobytes())
    return digest.hexdigest()


def kept_fingerprint(target: Model) -> str:
    """`fingerprint` of a target as it is stored, computed once: it is kept in `fingerprints` in the cache directory.

    Computed anew when the files in the target's directory have other names, sizes or times, where it is no local
    directory, and for weights that are read from elsewhere (`MemorySource`), whatever the model is called. It takes
    about as long as reading the whole model, of which a device reads its layers alone.
    """
    directory, source = _directory(target), unrounded(target.source)
    stored = is_converted(directory) or is_source(directory)
    if not (stored and directory.is_dir() and isinstance(source, Checkpoint)):
        return fingerprint(source)
    kept = cache_directory() / "fingerprints" / stamp(directory.resolve())
    found = ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found = kept.read_text(encoding="ascii")
    if len(found) != hashlib.sha256().digest_size * 2:  # Several processes may be writing it at once.
        found = fingerprint(source)
        with contextlib.suppress(OSError):  # It is only slower without.
            write_whole(kept, found)
    return found


def save_exit_head(
    directory: str | Path,
    config: ExitHeadConfig,
    target: LlamaConfig,
    params: Parameters,
    target_fingerprint: str,
    dtype: str,
    training: Mapping[str, Any] | None = None,
    agreement: Mapping[str, float] | None = None,
) -> Path:
    """Store a head in the target's directory; one of the same name is replaced.

    Args:
        directory: The target's.
        config: The head.
        target: The target's geometry.
        params: The head's arrays.
        target_fingerprint: `fingerprint` of the target's weights.
        dtype: What the arrays are stored in: `bfloat16`, `float16` or `float32`.
        training: How it was trained; JSON-ready, for the reader's information.
        agreement: As `ExitHead.agreement`.

    Returns:
        The head's folder.

    Raises:
        ValueError: for an untrained head, an unknown dtype, or arrays that are not the head's.
    """
    if config.variant == "target":
        raise ValueError("the untrained 'target' head has no weights to save")
    arrays = {path: np.asarray(value) for path, value in flatten(params)}
    _check_shapes(config, target, arrays, "the head's parameter tree")
    check_dtype(dtype)
    folder = Path(directory) / FOLDER / config.name
    folder.mkdir(parents=True, exist_ok=True)
    description = folder / DESCRIPTION
    description.unlink(missing_ok=True)  # Until it is back, the head does not exist.
    partial = folder / f"{WEIGHTS}.partial"
    save_file({path: np.ascontiguousarray(value.astype(DTYPES[dtype])) for path, value in arrays.items()}, partial)
    partial.chmod(0o644)  # safetensors lets the owner alone read what it writes.
    partial.replace(folder / WEIGHTS)
    values = {
        "version": VERSION,
        "head": config.to_dict(),
        "dtype": dtype,
        "target": {"fingerprint": target_fingerprint, "geometry": target.to_dict()},
        "agreement": dict(agreement or {}),
        "training": dict(training or {}),
    }
    write_whole(description, json.dumps(values, indent=1) + "\n")
    return folder


def stored_exit_heads(target: Model | str | Path) -> list[ExitHeadConfig]:
    """The heads stored beside a target, by exit layer and name; an empty list when there are none."""
    found = []
    for path in sorted((_directory(target) / FOLDER).glob(f"*/{DESCRIPTION}")):
        values = _describe(path.parent)
        try:
            head = ExitHeadConfig.from_dict(values["head"])
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); train the head again") from error
        if path.parent.name != head.name:
            raise ValueError(
                f"{path} describes the head {head.name}: give its folder that name, or move it out of {FOLDER}/"
            )
        found.append(head)
    return sorted(found, key=lambda head: (head.exit_layer, head.name))


def fitting_heads(stored: Sequence[ExitHeadConfig], exit_layer: int, head: str | None) -> list[ExitHeadConfig]:
    """Of stored heads those of an exit, and of that name or else of one that begins so (as in `find_exit_head`)."""
    there = [one for one in stored if one.exit_layer == exit_layer]
    named = _with_layer(exit_layer, head)
    return [one for one in there if named in (None, one.name)] or [
        one for one in there if one.name.startswith(f"{named}-")
    ]


def stored_agreement(target: Model | str | Path, head: ExitHeadConfig) -> dict[str, float]:
    """What `ExitHead.agreement` of a stored head will be."""
    return _describe(description_path(target, head).parent)["agreement"]


def description_path(target: Model | str | Path, head: ExitHeadConfig) -> Path:
    """The file that says what a stored head is, whose weights, and how well it agrees."""
    return _directory(target) / FOLDER / head.name / DESCRIPTION


def find_exit_head(target: Model, exit_layer: int, head: str | None = None) -> ExitHeadConfig:
    """Choose the head of an exit, by what the files say: no weight is read.

    Args:
        target: The target.
        exit_layer: Layers of the exit path (E).
        head: The head's name, with or without the exit layer, or how it begins (`block`, `norm-linear`, `block-64`,
            `4-block-64`, ...), or `target` for the untrained one. Of several that fit, and where it is not given, the
            stored head that agrees most with the target.

    Raises:
        FileNotFoundError: when no such head is stored.
        ValueError: for an exit layer that the target does not have, a damaged description, or a head that belongs to
            a target of another geometry.
    """
    if head == "target":
        config = ExitHeadConfig(exit_layer, "target")
        config.check(target.config)
        return config
    ExitHeadConfig(exit_layer, "target").check(target.config)
    stored = stored_exit_heads(target)
    fitting = fitting_heads(stored, exit_layer, head)
    if not fitting:
        names = ", ".join(one.name for one in stored) or "none"
        wanted = _with_layer(exit_layer, head) or f"after layer {exit_layer}"
        raise FileNotFoundError(
            f"{_directory(target)} has no exit head {wanted} (stored: {names}); train it with "
            f"scripts/train_exit_head.py --exit-layer {exit_layer}, or use the untrained one ('target')"
        )
    chosen = max(fitting, key=lambda one: stored_agreement(target, one).get("1", 0.0))
    geometry = _describe(_folder(target, chosen))["target"]["geometry"]
    # Whether it is int8 as stored, or becomes so while it is loaded, the fingerprint tells.
    if dataclasses.replace(LlamaConfig.from_dict(geometry), int8=target.config.int8) != target.config:
        raise ValueError(
            f"the exit head in {_folder(target, chosen)} belongs to a target of another geometry; train one for this"
        )
    return chosen


def load_exit_head(target: Model, exit_layer: int, head: str | None = None) -> ExitHead:
    """Read a head and make sure that it belongs to this target, whose weights are read once (`kept_fingerprint`).

    Args:
        target: The target.
        exit_layer: As in `find_exit_head`.
        head: As in `find_exit_head`.

    Raises:
        FileNotFoundError: when no such head is stored.
        ValueError: as `find_exit_head`, and for damaged weights or a head of another target.
    """
    config = find_exit_head(target, exit_layer, head)
    if config.variant == "target":
        return ExitHead(config, {}, {})
    folder = _folder(target, config)
    description = _describe(folder)
    try:
        arrays = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {folder / WEIGHTS} ({error}); train the head again") from error
    try:
        _check_shapes(config, target.config, arrays, str(folder / WEIGHTS))
    except ValueError as error:
        raise ValueError(f"{error}; train the head again") from error
    if description["target"]["fingerprint"] != kept_fingerprint(target):
        raise ValueError(
            f"the exit head in {folder} belongs to another target: its weights are not those of {target.name}; "
            "train one for this target with scripts/train_exit_head.py"
        )
    return ExitHead(
        config, nest({path: arrays[path] for path in head_shapes(config, target.config)}), description["agreement"]
    )


def given_exit_head(head: ExitHead, target: LlamaConfig) -> ExitHead:
    """A head that is in memory, its arrays NumPy's (those of training are JAX's).

    Raises:
        ValueError: unless it has the arrays that its description says, for a target of this geometry.
    """
    if not isinstance(head.params, dict):
        raise ValueError(f"the params of an ExitHead must be a nested dictionary of arrays, not {head.params!r}")
    arrays = {path: np.asarray(array) for path, array in flatten(head.params)}
    _check_shapes(head.config, target, arrays, "the exit head")
    return dataclasses.replace(head, params=nest(arrays))


def _with_layer(exit_layer: int, head: str | None) -> str | None:
    """A head's name, or how it begins, with the exit layer."""
    return head if head is None or head.startswith(f"{exit_layer}-") else f"{exit_layer}-{head}"


def _directory(target: Model | str | Path) -> Path:
    return Path(target.name if isinstance(target, Model) else target)


def _folder(target: Model, config: ExitHeadConfig) -> Path:
    return _directory(target) / FOLDER / config.name


def _describe(folder: Path) -> dict[str, Any]:
    """A head's description, checked for version and keys."""
    path = folder / DESCRIPTION
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["version"]
        complete = _is_complete(values)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); train the head again") from error
    if version != VERSION:
        raise ValueError(f"{path} has version {version!r}, this program reads {VERSION}; train the head again")
    if not complete:
        raise ValueError(f"{path} is incomplete; train the head again")
    return values


def _is_complete(values: dict[str, Any]) -> bool:
    """Whether a description has all its parts, of the right kinds."""
    if not {"head", "dtype", "target", "agreement"} <= set(values):
        return False
    head, target, agreement = values["head"], values["target"], values["agreement"]
    if not all(isinstance(part, dict) for part in (head, target, agreement)):
        return False
    return (
        isinstance(target.get("fingerprint"), str)
        and isinstance(target.get("geometry"), dict)
        and all(top.isdecimal() and isinstance(share, int | float) for top, share in agreement.items())
    )


def _check_shapes(config: ExitHeadConfig, target: LlamaConfig, arrays: Mapping[str, np.ndarray], what: str) -> None:
    shapes = head_shapes(config, target)
    if set(arrays) != set(shapes):
        missing, unknown = sorted(set(shapes) - set(arrays)), sorted(set(arrays) - set(shapes))
        raise ValueError(f"{what} lacks {missing} and has unknown {unknown}")
    for path, shape in shapes.items():
        if arrays[path].shape != shape:
            raise ValueError(f"{path!r} of {what} has shape {arrays[path].shape}, a {config.name} head has {shape}")
