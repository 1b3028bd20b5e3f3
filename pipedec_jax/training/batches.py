"""Training sequences: windows of one long stream of tokens, spread evenly over it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipedec_jax.training.trainer import Batch

GOLDEN = 0.6180339887498949
"""Steps of this fraction of the stream visit it evenly, whatever their number."""


class TextWindows:
    """Windows of documents that were joined to one stream; every window starts with the begin token.

    A prompt always starts with that token, also when it is a piece from the middle of a file, so the models
    must be used to it in front of anything. Where prompts start with none (`begin` is `None`), neither do windows.
    """

    def __init__(self, documents: Sequence[np.ndarray], begin: int | None, seed: int = 0) -> None:
        self._stream = np.concatenate([np.asarray(document, np.int32) for document in documents])
        self._begin = begin
        self._offset = float(np.random.default_rng(seed).random())

    def __call__(self, window: int, B: int, T: int) -> Batch:
        """Sequences `window .. window + B - 1` of length `T`, with the tokens that follow each position."""
        length = T + 1 if self._begin is None else T
        span = len(self._stream) - length + 1
        if span < 1:
            raise ValueError(f"the text has {len(self._stream)} tokens, fewer than one sequence of {length}")
        starts = ((self._offset + (window + np.arange(B)) * GOLDEN) % 1.0 * span).astype(np.int64)
        target = self._stream[starts[:, None] + np.arange(length)]
        if self._begin is None:
            return {"token": target[:, :-1], "target": target[:, 1:]}
        token = np.concatenate((np.full((B, 1), self._begin, np.int32), target[:, :-1]), axis=1)
        return {"token": token, "target": target}
