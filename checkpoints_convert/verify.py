"""Proof of a conversion: by its manifest alone, or against its source, array by array bit for bit, and the logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from checkpoints_convert import manifest
from checkpoints_convert.conversion import read_as
from checkpoints_convert.detection import open_source
from checkpoints_convert.hashing import file_facts
from checkpoints_convert.manifest import FileFacts
from checkpoints_convert.paths import file_size
from checkpoints_convert.source import same_bits, tokenizer_files
from checkpoints_convert.store import ConvertedCheckpoint, open_checkpoint
from pipedec_jax.model.int8 import Int8Source
from pipedec_jax.model.parameters import fixed_dtype, nest, parameter_shapes
from pipedec_jax.small_files import read_small

LOGIT_TOLERANCE = 1e-4
"""Largest allowed max|difference| / max|logit| in float32; the order of sums accounts for about 1e-6."""


def damage(converted: str | Path) -> Iterator[str]:
    """What of a converted checkpoint is not as its manifest says, one sentence each; none when it is whole.

    Reads everything. Finds any flipped bit in any of its files, a missing file or array, and a truncated chunk.

    Raises:
        FileNotFoundError, ValueError: when it cannot be opened at all.
    """
    ours = open_checkpoint(converted)
    yield from _damaged_files(ours, ours.manifest.files | ours.manifest.metadata)
    for path in tqdm(parameter_shapes(ours.config), desc="verify", disable=None):
        try:
            ours.read(path)
        except ValueError as error:
            yield str(error)


def differences(source: str | Path, converted: str | Path) -> Iterator[str]:
    """What of a conversion is not as in its source, one sentence each; none when it is right. Needs no torch.

    Both sides are read again, array by array; the source's arrays are cast to the converted dtype, or made int8.

    Raises:
        FileNotFoundError, ValueError: when one side cannot be opened at all.
    """
    ours, theirs = open_checkpoint(converted), open_source(source)
    int8 = Int8Source(theirs)
    config = int8.config if ours.config.int8 else theirs.config
    for name, expected in (
        ("config", config),
        ("bos_token_id", theirs.bos_token_id),
        ("eos_token_ids", theirs.eos_token_ids),
    ):
        if getattr(ours, name) != expected:
            yield f"{name} is {getattr(ours, name)}, the source has {expected}"
    for name, file in tokenizer_files(source).items():
        copy = ours.directory / name
        if not copy.is_file() or not _has(copy, FileFacts.of(read_small(file))):
            yield f"file {name} {'differs' if copy.is_file() else 'is missing'}"
    yield from _damaged_files(ours, ours.manifest.metadata)
    if ours.config != config:
        return
    for path in tqdm(parameter_shapes(ours.config), desc="verify", disable=None):
        try:
            plain = fixed_dtype(config, path) is None
            same = same_bits(ours.read(path), read_as(theirs, path, ours.dtype) if plain else int8.read(path))
        except ValueError as error:
            yield str(error)
        else:
            if not same:
                yield f"array {path!r} differs from the source"


def _damaged_files(ours: ConvertedCheckpoint, files: dict[str, FileFacts]) -> Iterator[str]:
    """What of the manifest, and of some files that it names, is not as it should be."""
    if read_small(ours.directory / manifest.FILE) != ours.manifest.text().encode():
        yield f"file {manifest.FILE} is written otherwise than by the converter"
    for name, facts in files.items():
        file = ours.directory / name
        if not file.is_file():
            yield f"file {name} is missing"
        elif not _has(file, facts):
            yield f"file {name} differs from what was converted"


def _has(file: Path, facts: FileFacts) -> bool:
    """Whether a file has this size and checksum; one of another size is not read."""
    return file_size(file) == facts.bytes and file_facts(file) == facts


def logit_difference(source: str | Path, converted: str | Path, tokens: int = 500, seed: int = 0) -> float:
    """max|difference| / max|logit| between our model and the source's own, in float32, on random tokens.

    The source's own is Hugging Face's model, or Meta's (see `reference_logits`). Both compute with the converted
    dtype's values, but that int8 layers of ours are compared with what they were made from: the difference is then
    mostly theirs. Holds one model in memory, then the other.

    Raises:
        FileNotFoundError, ValueError: when one side cannot be opened.
        ImportError: when torch or transformers is not installed.
    """
    import jax.numpy as jnp

    from checkpoints_convert.reference_logits import reference_logits
    from pipedec_jax.model import llama

    ours = open_checkpoint(converted)
    tokens = min(tokens, ours.config.context)
    prompt = np.random.default_rng(seed).integers(ours.config.vocab_size, size=(1, tokens), dtype=np.int32)
    model = open_source(source)
    try:
        expected = reference_logits(model, prompt, ours.dtype)
    except (ValueError, OSError, ImportError, MemoryError):
        raise
    except Exception as error:  # transformers has errors of its own for values that it does not take.
        reason = " ".join(str(error).split())
        raise ValueError(f"the source's own model cannot be made from {model.directory}: {reason}") from error

    weights = {
        path: jnp.asarray(ours.read(path), fixed_dtype(ours.config, path) or jnp.float32)
        for path in parameter_shapes(ours.config)
    }
    found = np.asarray(llama.forward(ours.config, nest(weights), jnp.asarray(prompt)))
    return float(np.abs(found - expected).max() / np.abs(expected).max())
