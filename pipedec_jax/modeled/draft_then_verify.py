"""A simulator of classic speculative decoding: one model drafts some tokens, the target verifies, and they take turns.

It plays the engine's rules (`method="speculative"`) with known words in place of models. All figures are *simulated*.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Sums of one simulated answer."""

    tokens: int
    """Of the target."""
    rounds: int
    """Verifications, each of the lookahead's tokens and the one before them."""
    drafted: int
    """Passes of the draft: the lookahead's in each round, and one more after a round that was right throughout."""


def simulate_rounds(words: NDArray[np.integer], lookahead: int) -> Rounds:
    """Decode a text of known words.

    Args:
        words: `[2, T]`: what the draft says at each position, and the text; the first token is given.
        lookahead: tokens drafted before each verification.

    Raises:
        ValueError: for a lookahead below 1, or a text of no token.
    """
    if lookahead < 1 or words.shape[0] != 2 or words.shape[1] < 2:
        raise ValueError(f"need two rows of at least two words and a lookahead of at least 1, not {lookahead}")
    wrong = np.flatnonzero(words[0, 1:] != words[1, 1:]) + 1
    last, position, rounds, drafted, late = words.shape[1] - 1, 0, 0, 0, False
    while position < last:
        next_wrong = wrong[np.searchsorted(wrong, position + 1)] if len(wrong) and wrong[-1] > position else last + 1
        right = min(int(next_wrong) - position - 1, lookahead)
        rounds, drafted = rounds + 1, drafted + lookahead + late
        late = right == lookahead
        position += right + 1
    return Rounds(tokens=last, rounds=rounds, drafted=drafted)
