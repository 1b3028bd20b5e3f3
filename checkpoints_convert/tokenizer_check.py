"""Whether the tokenizer that goes along with the weights can be read, and belongs to them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from checkpoints_convert.checkpoint import Checkpoint
from pipedec_jax.tokenizer import Tokenizer


def read_tokenizer(files: dict[str, bytes], directory: Path) -> Tokenizer:
    """The tokenizer in some files, by name.

    Raises:
        FileNotFoundError: when none of them is one.
        ValueError: when it cannot be read; the message names `directory`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for name, data in files.items():
            (Path(scratch) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(scratch) / name).write_bytes(data)
        try:
            return Tokenizer.load(scratch)
        except ValueError as error:
            raise ValueError(str(error).replace(scratch, str(directory))) from error


def padding(rows: int, tokens: int | None) -> str | None:
    """A line for a model with more rows of vocabulary than tokens; `None` for others, or where that is not known."""
    if tokens is None or tokens >= rows:
        return None
    ids = f"id {tokens} is" if tokens == rows - 1 else f"ids {tokens} to {rows - 1} are"
    return f"{rows} rows of vocabulary for {tokens} tokens of the tokenizer: {ids} padding, and never chosen"


def check_tokenizer(checkpoint: Checkpoint, files: dict[str, bytes]) -> None:
    """Read a tokenizer from the very bytes that are to be stored, and compare its ids with the model's rows.

    Added tokens may have no row in the embedding (in some published models padding has none): they cannot be decoded,
    and `pipedec_jax.load` knows. Rows without a token are padding.

    Args:
        checkpoint: the model, whose directory is named in errors.
        files: tokenizer and generation files by name.

    Raises:
        ValueError: when the tokenizer cannot be read, one of its own tokens has no row, or the token that begins or
            one that ends a text has none.
    """
    try:
        own = read_tokenizer(files, checkpoint.directory).backend.backend_tokenizer.get_vocab(with_added_tokens=False)
    except ValueError as error:
        raise ValueError(
            f"{error}; nothing was written: fetch the tokenizer again, or put the one in that the model was trained "
            "with"
        ) from error
    rows = checkpoint.config.vocab_size
    if not own or max(own.values()) >= rows:
        raise ValueError(
            f"the tokenizer in {checkpoint.directory} has ids up to {max(own.values(), default=-1)}, the embedding "
            f"{rows} rows (0 to {rows - 1}); they belong to different models"
        )
    ids = [("bos_token_id", [] if checkpoint.bos_token_id is None else [checkpoint.bos_token_id])]
    for key, tokens in (*ids, ("eos_token_id", checkpoint.eos_token_ids)):
        for token in tokens:
            if token >= rows:
                raise ValueError(
                    f"{checkpoint.directory}: {key} names token {token}, the embedding has {rows} rows; correct "
                    "config.json or generation_config.json"
                )
