"""llama.cpp through its Python binding: plain, with a draft model, and with tokens looked up in the text.

The binding's plain functions are called, not its `Llama` class, which copies and filters logits in Python: that would
charge llama.cpp for what is not its own. Its speculation is that of llama.cpp's own example `speculative-simple`.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipedec_jax.peers.answer import Answer

FLOAT32 = 0
"""ggml's number for the type, here of the KV cache: by default it is float16."""


class Context:
    """A model in memory and the text it has read.

    Args:
        path: GGUF file.
        vocab_size: ids that are tokens.
        slots: of the cache.
        threads: that compute.

    Raises:
        ImportError: without the package `llama-cpp-python`.
        ValueError: when llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, vocab_size: int, slots: int, threads: int) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self._api = api = llama_cpp
        self._silence = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self._silence, ctypes.c_void_p(0))
        self._model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {path}")
        params = api.llama_context_default_params()
        params.n_ctx = slots
        params.n_batch = params.n_ubatch = slots
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = FLOAT32
        self._context = api.llama_init_from_model(self._model, params)
        self._memory = api.llama_get_memory(self._context)
        self._batch = api.llama_batch_init(slots, 0, 1)
        self._vocab_size = vocab_size
        self.read: list[int] = []
        """Tokens in the cache."""

    def feed(self, tokens: Sequence[int], scored: int) -> np.ndarray:
        """Read tokens; logits `[scored, V]` after each of the last ones, good until the next call.

        Raises:
            RuntimeError: when llama.cpp fails.
        """
        batch, begun = self._batch, len(self.read)
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = begun + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = index >= len(tokens) - scored
        status = self._api.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode failed with status {status}")
        self.read += tokens
        logits = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (scored, self._vocab_size))

    def keep(self, count: int) -> None:
        """Forget all but the first `count` tokens."""
        if count < len(self.read):
            self._api.llama_memory_seq_rm(self._memory, 0, count, -1)
            del self.read[count:]


class LlamaCpp:
    """Greedy decoding by llama.cpp.

    Args:
        target: of the text.
        draft: that guesses, or nobody.
        guesses: at most before each verification; of `draft`, or else looked up. 0 is plain decoding.
        least_chance: drafting ends with a guess that is less probable than this to the draft.
    """

    def __init__(
        self, target: Context, draft: Context | None = None, guesses: int = 0, least_chance: float = 0.0
    ) -> None:
        self._target, self._draft = target, draft
        self._guesses, self._least_chance = guesses, least_chance
        self._look_up: Any = None
        if guesses and draft is None:
            from llama_cpp.llama_speculative import (  # pyright: ignore[reportMissingImports]
                LlamaPromptLookupDecoding,
            )

            self._look_up = LlamaPromptLookupDecoding(num_pred_tokens=guesses)

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Answer:
        """See `Peer`."""
        begun = time.perf_counter()
        target, text, end = self._target, list(prompt), len(prompt) + new_tokens
        for context in (target, self._draft):
            if context is not None:
                context.keep(0)
        text.append(int(target.feed(text, 1)[0].argmax()))
        first = time.perf_counter()
        while len(text) < end:
            guesses = self._guess(text, min(self._guesses, end - len(text) - 1))
            best = target.feed([text[-1], *guesses], 1 + len(guesses)).argmax(axis=1).tolist()
            right = next((i for i, guess in enumerate(guesses) if guess != best[i]), len(guesses))
            text += best[: right + 1]
            target.keep(len(text) - 1)
        done = time.perf_counter()
        return Answer(tuple(text[len(prompt) :]), first - begun, done - begun)

    def _guess(self, text: list[int], most: int) -> list[int]:
        """At most so many tokens after the text."""
        if most <= 0:
            return []
        if self._look_up is not None:
            return [int(token) for token in self._look_up(np.asarray(text, np.intc))[:most]]
        draft = self._draft
        if draft is None:
            return []
        # What it has read of guesses that were wrong is forgotten; of the text it always lacks the last token.
        same = next((i for i, (a, b) in enumerate(zip(draft.read, text, strict=False)) if a != b), len(draft.read))
        draft.keep(min(same, len(text) - 1))
        tokens, guesses = text[len(draft.read) :], []
        while len(guesses) < most:
            logits = draft.feed(tokens, 1)[0]
            guess = int(logits.argmax())
            if self._least_chance and 1 / float(np.exp(logits - logits[guess]).sum()) < self._least_chance:
                break
            guesses.append(guess)
            tokens = [guess]
        return guesses
