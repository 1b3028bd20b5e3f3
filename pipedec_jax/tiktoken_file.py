"""Meta's `tokenizer.model` since LLaMA 3: tiktoken's text format, one token in base64 and its rank a line.

The special tokens stand in Meta's code, not in the file: 256 of them follow the ordinary tokens, in this order.
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path

from pipedec_jax.small_files import read_small

SPECIAL_TOKENS = 256

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s*")
_NAMED = {
    0: "begin_of_text",
    1: "end_of_text",
    6: "start_header_id",
    7: "end_header_id",
    9: "eot_id",
}
_NAMED_SINCE_3_1 = _NAMED | {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}


def is_tiktoken(file: str | Path) -> bool:
    """Whether a `tokenizer.model` is in this format; otherwise it is sentencepiece's."""
    with Path(file).open("rb") as opened:
        return _LINE.fullmatch(opened.readline(4096)) is not None


def read_ranks(file: str | Path) -> dict[bytes, int]:
    """The ordinary tokens' bytes and ids.

    Raises:
        ValueError: when the file is damaged, or too large.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_small(Path(file)).splitlines()):
        if not line.strip():
            continue
        if _LINE.fullmatch(line) is None:
            raise ValueError(f"line {number + 1} is not a token in base64 and its rank")
        token, rank = line.split()
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except binascii.Error as error:
            raise ValueError(f"line {number + 1} is not valid base64") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError("its tokens are not numbered from 0 without a gap, or not every byte is one")
    return ranks


def special_tokens(since_3_1: bool) -> list[str]:
    """The special tokens in the order of their ids; LLaMA 3 and 3.1 name some differently."""
    named = _NAMED_SINCE_3_1 if since_3_1 else _NAMED
    reserved = iter(range(SPECIAL_TOKENS))
    return [
        f"<|{named[index] if index in named else f'reserved_special_token_{next(reserved)}'}|>"
        for index in range(SPECIAL_TOKENS)
    ]


def begin_and_ends(file: str | Path) -> tuple[int, list[int]]:
    """Ids of the token that begins a text, and of those that end one (end of text, of message, of turn)."""
    first = len(read_ranks(file))
    return first, [first + 1, first + 8, first + 9]
