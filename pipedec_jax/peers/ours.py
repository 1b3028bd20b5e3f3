"""This project's decoders as peers among peers."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pipedec_jax.decoding.decoder import Decoder
from pipedec_jax.peers.answer import Answer
from pipedec_jax.sampling import GREEDY


class Ours:
    """Greedy decoding by the engine of a decoder; text is not made, as peers make none.

    Args:
        decoder: of any method.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.engine = decoder.engine

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Answer:
        """See `Peer`."""
        begun = time.perf_counter()
        self.engine.start(prompt, max_new_tokens=new_tokens, sampling=GREEDY)
        self.engine.run(1)
        first = time.perf_counter()
        progress = self.engine.run(new_tokens)
        done = time.perf_counter()
        return Answer(tuple(progress.tokens), first - begun, done - begun)
