"""Tokens to text, one token at a time, whole characters only.

All pieces together are what the tokenizer decodes the whole sequence to. The work per token is constant.
"""

from __future__ import annotations

import codecs
import string
from collections.abc import Sequence
from typing import Protocol

from pipedec_jax.tokenizer import PieceRules, Tokenizer

Piece = tuple[int, str]
"""Some text, and the index of the token that completes it."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_PROMPT = -1


def byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level token maps spell bytes (GPT-2's table); printable ones spell themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class Detokenizer:
    """Text of a growing token sequence.

    Args:
        tokenizer: gives the tokens' strings and the rules that turn them into text.
        prompt: the tokens before the first one fed. Their text is not given, but it decides whether the first token
            keeps its leading space, and completes a character that the prompt left open.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._reader = _reader(tokenizer.rules)
        self._fed = 0
        for piece in map(tokenizer.piece, prompt):
            if piece:
                self._reader.read(_PROMPT, piece)
        self._reader.forget()

    def feed(self, token: int) -> list[Piece]:
        """Take the next token; returns the text that has become certain, in order. Indices count fed tokens."""
        index = self._fed
        self._fed += 1
        piece = self._tokenizer.piece(token)
        return self._reader.read(index, piece) if piece else []

    def finish(self) -> list[Piece]:
        """The text that was still waiting for a token; an unfinished character becomes U+FFFD."""
        return self._reader.finish(max(self._fed - 1, 0))


class _Reader(Protocol):
    """What makes text of the strings of tokens, one kind of tokenizer each."""

    def read(self, index: int, piece: str) -> list[Piece]:
        """Take a token's string; returns the text that has become certain."""
        ...

    def forget(self) -> None:
        """Start the text here; only a character that is still open stays."""
        ...

    def finish(self, index: int) -> list[Piece]:
        """What was still open, for the last token, `index`."""
        ...


class _ByteLevelReader:
    """Each character of a token is a byte; the bytes of all tokens together are UTF-8."""

    def __init__(self) -> None:
        self._bytes = byte_alphabet()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self, index: int, piece: str) -> list[Piece]:
        # A token that was added as plain text may hold characters outside the alphabet.
        known = all(character in self._bytes for character in piece)
        data = bytes(self._bytes[character] for character in piece) if known else piece.encode()
        text = self._utf8.decode(data)
        return [(index, text)] if text else []

    def forget(self) -> None:
        pass

    def finish(self, index: int) -> list[Piece]:
        text = self._utf8.decode(b"", final=True)
        return [(index, text)] if text else []


class _ByteFallbackReader:
    """Tokens are text, but `<0xE6>` is a byte.

    A run of byte tokens counts as characters only if the whole run is valid UTF-8, so its text is certain only when
    the run has ended; otherwise each byte becomes U+FFFD.
    """

    def __init__(self, rules: PieceRules) -> None:
        self._rules = rules
        self._strip = rules.strip
        self._run: list[tuple[int, int]] = []

    def read(self, index: int, piece: str) -> list[Piece]:
        for old, new in self._rules.replace:
            piece = piece.replace(old, new)
        byte = _fallback_byte(piece)
        if byte is not None:
            self._run.append((index, byte))
            return []
        return self._stripped([*self._end_run(), (index, piece)])

    def forget(self) -> None:
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        utf8.decode(bytes(byte for _, byte in self._run))
        still_open = len(utf8.getstate()[0])
        ended, self._run = self._run[: len(self._run) - still_open], self._run[len(self._run) - still_open :]
        if ended:
            self._strip = 0

    def finish(self, index: int) -> list[Piece]:
        return self._stripped(self._end_run())

    def _end_run(self) -> list[Piece]:
        run, self._run = self._run, []
        try:
            text = bytes(byte for _, byte in run).decode()
        except UnicodeDecodeError:
            return [(index, REPLACEMENT) for index, _ in run if index != _PROMPT]
        pieces, end = [], -1
        for character in text:
            end += len(character.encode())
            pieces.append((run[end][0], character))
        return pieces

    def _stripped(self, pieces: list[Piece]) -> list[Piece]:
        """Take the spaces off the start of the whole text, which is usually the prompt's."""
        kept = []
        for index, text in pieces:
            while self._strip and text:
                self._strip = self._strip - 1 if text[0] == " " else 0
                text = text.removeprefix(" ") if text[0] == " " else text
            if text:
                kept.append((index, text))
        return kept


class _MetaspaceReader:
    """Tokens are text, with a character for a space; the first one of the sequence is without any."""

    def __init__(self, rules: PieceRules) -> None:
        self._mark, self._space = rules.replace[0]
        self._bare = rules.strip > 0

    def read(self, index: int, piece: str) -> list[Piece]:
        text = piece.replace(self._mark, "" if self._bare else self._space)
        self._bare = False
        return [(index, text)] if text else []

    def forget(self) -> None:
        pass

    def finish(self, index: int) -> list[Piece]:
        return []


class _WordReader:
    """Tokens are words with a space between them."""

    def __init__(self) -> None:
        self._space = ""

    def read(self, index: int, piece: str) -> list[Piece]:
        space, self._space = self._space, " "
        return [(index, space + piece)]

    def forget(self) -> None:
        pass

    def finish(self, index: int) -> list[Piece]:
        return []


def _reader(rules: PieceRules) -> _Reader:
    if rules.kind == "byte_level":
        return _ByteLevelReader()
    if rules.kind == "metaspace":
        return _MetaspaceReader(rules)
    return _ByteFallbackReader(rules) if rules.kind == "byte_fallback" else _WordReader()


def _fallback_byte(piece: str) -> int | None:
    """The byte that a token such as `<0xE6>` stands for."""
    if len(piece) != 6 or not piece.startswith("<0x") or not piece.endswith(">"):
        return None
    return int(piece[3:5], 16) if set(piece[3:5]) <= set(string.hexdigits) else None
