"""Hugging Face transformers' `generate` on CPU: plain, with an assistant model, and with prompt look-up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipedec_jax.peers.answer import Answer


def load_torch(directory: Path) -> Any:
    """A model's float32 weights as transformers holds them."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


class HuggingFace:
    """Greedy decoding by transformers.

    Args:
        model: from `load_torch`.
        options: of `generate`: `assistant_model` or `prompt_lookup_num_tokens`.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        self._model = model
        self._options = options

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Answer:
        """See `Peer`."""
        import torch

        clock = _FirstToken()
        with torch.inference_mode():
            begun = time.perf_counter()
            text = self._model.generate(
                torch.tensor([list(prompt)]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=new_tokens,
                min_new_tokens=None,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                streamer=clock,
                **self._options,
            )
            done = time.perf_counter()
        return Answer(tuple(text[0, len(prompt) :].tolist()), (clock.first or done) - begun, done - begun)


class _FirstToken:
    """A streamer: `generate` puts the prompt, then tokens as they come."""

    def __init__(self) -> None:
        self._puts = 0
        self.first: float | None = None

    def put(self, _: Any) -> None:
        self._puts += 1
        if self._puts == 2:
            self.first = time.perf_counter()

    def end(self) -> None:
        pass
