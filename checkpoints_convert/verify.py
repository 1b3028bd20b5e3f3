"""Proof of a conversion: by its manifest alone, or against its source, array by array bit for bit, and the logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from checkpoints_convert.conversion import read_as
from checkpoints_convert.detection import open_source
from checkpoints_convert.hashing import file_facts
from checkpoints_convert.source import same_bits, tokenizer_files
from checkpoints_convert.store import ARRAYS, open_checkpoint
from pipedec_jax.model.parameters import parameter_shapes

LOGIT_TOLERANCE = 1e-4
"""Largest allowed max|difference| / max|logit| in float32; the order of sums accounts for about 1e-6."""


def damage(converted: str | Path) -> Iterator[str]:
    """What of a converted checkpoint is not as its manifest says, one sentence each; none when it is whole.

    Reads everything. Finds any flipped bit, missing file or array, and any truncated chunk.

    Raises:
        FileNotFoundError, ValueError: when it cannot be opened at all.
    """
    ours = open_checkpoint(converted)
    for name, facts in ours.manifest.files.items():
        file = ours.directory / name
        if not file.is_file():
            yield f"file {name} is missing"
        elif file_facts(file) != facts:
            yield f"file {name} differs from what was converted"
    if not (ours.directory / ARRAYS / "_METADATA").is_file():
        yield f"file {ARRAYS}/_METADATA is missing, without which Orbax cannot restore the checkpoint"
    for path in tqdm(parameter_shapes(ours.config), desc="verify", disable=None):
        try:
            ours.read(path)
        except ValueError as error:
            yield str(error)


def differences(source: str | Path, converted: str | Path) -> Iterator[str]:
    """What of a conversion is not as in its source, one sentence each; none when it is right. Needs no torch.

    Both sides are read again, array by array; the source's arrays are cast to the converted dtype.

    Raises:
        FileNotFoundError, ValueError: when one side cannot be opened at all.
    """
    ours, theirs = open_checkpoint(converted), open_source(source)
    for name in ("config", "bos_token_id", "eos_token_ids"):
        if getattr(ours, name) != getattr(theirs, name):
            yield f"{name} is {getattr(ours, name)}, the source has {getattr(theirs, name)}"
    for name, file in tokenizer_files(source).items():
        copy = ours.directory / name
        if not copy.is_file() or file.read_bytes() != copy.read_bytes():
            yield f"file {name} {'differs' if copy.is_file() else 'is missing'}"
    if ours.config != theirs.config:
        return
    for path in tqdm(parameter_shapes(ours.config), desc="verify", disable=None):
        try:
            same = same_bits(ours.read(path), read_as(theirs, path, ours.dtype))
        except ValueError as error:
            yield str(error)
        else:
            if not same:
                yield f"array {path!r} differs from the source"


def logit_difference(source: str | Path, converted: str | Path, tokens: int = 500, seed: int = 0) -> float:
    """max|difference| / max|logit| between our model and Hugging Face's, in float32, on random tokens.

    Both compute with the converted dtype's values. Holds both models in memory.

    Raises:
        ImportError: when torch or transformers is not installed.
    """
    import jax
    import jax.numpy as jnp
    import torch
    import transformers

    from pipedec_jax.model import llama

    ours = open_checkpoint(converted)
    tokens = min(tokens, ours.config.context)
    prompt = np.random.default_rng(seed).integers(ours.config.vocab_size, size=(1, tokens), dtype=np.int32)

    transformers.utils.logging.disable_progress_bar()
    model = transformers.LlamaForCausalLM.from_pretrained(source).eval()
    with torch.no_grad():
        # Parameters only: casting the module would round the rotary frequencies too.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, ours.dtype)).float()
        expected = model(torch.from_numpy(prompt).long()).logits.numpy()

    weights = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), ours.read_all())
    found = np.asarray(llama.forward(ours.config, weights, jnp.asarray(prompt)))
    return float(np.abs(found - expected).max() / np.abs(expected).max())
