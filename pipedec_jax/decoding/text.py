"""The text of an answer as it grows: whole characters, and nothing of a stop string."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

from pipedec_jax.decoding.detokenizer import Detokenizer, Piece
from pipedec_jax.tokenizer import Tokenizer


class TextStream:
    """Text of an answer as it grows, cut before the first stop string.

    The answer stops at the first character that completes any of the stop strings; of those that end there, the
    longest is cut off. So where it stops does not depend on how tokens are fed.

    Args:
        tokenizer: of the model.
        prompt: the tokens before the answer.
        stop: the stop strings, none empty. Text of special tokens never shows, so it cannot be matched.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Iterable[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stop = tuple(stop)
        if "" in self._stop:
            raise ValueError("a stop string must not be empty")
        self._pieces: list[str] = []
        self._held = ""  # The longest end of the text that may become a stop string.
        self._length = 0  # Characters given by the detokenizer so far.
        self._ends: list[int] = []  # Where each stretch of text ends, and the token it belongs to.
        self._tokens: list[int] = []
        self.stopped_at: int | None = None
        """Index of the token that completed a stop string."""

    @property
    def text(self) -> str:
        """All text given so far."""
        return "".join(self._pieces)

    def feed(self, tokens: Iterable[int]) -> str:
        """Take more tokens; returns the text that can be shown. Once stopped, nothing more is taken."""
        return self._give(piece for token in tokens for piece in self._next(token))

    def finish(self) -> str:
        """The rest of the text: what was held back because it might have become a stop string or a character."""
        shown = self._give(self._detokenizer.finish() if self.stopped_at is None else ())
        rest, self._held = self._held, ""
        if rest:
            self._pieces.append(rest)
        return shown + rest

    def _next(self, token: int) -> list[Piece]:
        return [] if self.stopped_at is not None else self._detokenizer.feed(token)

    def _give(self, pieces: Iterable[Piece]) -> str:
        shown = "".join(self._take(index, text) for index, text in pieces if self.stopped_at is None)
        if shown:
            self._pieces.append(shown)
        return shown

    def _take(self, index: int, text: str) -> str:
        if not self._stop:
            return text
        self._length += len(text)
        self._ends.append(self._length)
        self._tokens.append(index)
        candidate = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := candidate.find(stop)) >= 0]
        if found:
            end, start = min(found)
            offset = self._length - len(candidate)
            self.stopped_at = self._tokens[bisect.bisect_left(self._ends, offset + end)]
            self._held = ""
            return candidate[:start]
        keep = _open_length(candidate, self._stop)
        self._held = candidate[len(candidate) - keep :]
        return candidate[: len(candidate) - keep]


def _open_length(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    longest = min(len(text), max(len(stop) for stop in stops) - 1)
    for length in range(longest, 0, -1):
        end = text[len(text) - length :]
        if any(stop.startswith(end) for stop in stops):
            return length
    return 0
