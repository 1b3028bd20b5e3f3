"""What is asked of every peer, and what it gives: greedy tokens, with the time of the first and of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class Answer:
    """A greedy answer to a prompt of token ids."""

    tokens: tuple[int, ...]
    first_s: float
    """Seconds to the first token, the prompt included."""
    seconds: float
    """To the last one."""


class Peer(Protocol):
    """Decodes one prompt at a time."""

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Answer:
        """Exactly so many greedy tokens, end tokens among them."""
        ...
