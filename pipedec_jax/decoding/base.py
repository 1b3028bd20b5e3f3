"""What every decoder does with a request: one at a time, as a stream of text or as a whole answer."""

from __future__ import annotations

import abc
import functools
import threading
import weakref
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar, Unpack

import jax
import numpy as np

from pipedec_jax.checks import NotCopied, check_count
from pipedec_jax.decoding import stream
from pipedec_jax.decoding.request_options import RequestOptions, check_prompts
from pipedec_jax.decoding.result import Generation
from pipedec_jax.decoding.stream import Request, Stream
from pipedec_jax.loading import Model
from pipedec_jax.own_settings import check_untraced, own_settings

Prompt = str | Sequence[int] | np.ndarray | jax.Array
"""Text, or token ids: a list, a tuple or an array of one axis."""

INTERRUPT_TOKENS = 64
"""Tokens of a whole answer between two looks of the host, which is where it notices an interrupt."""
STOP_TOKENS = 16
"""The same where a stop string may end the answer: what is decoded beyond it is lost."""


class Engine(stream.Engine, Protocol):
    """What a decoder needs of its engine."""

    def bytes_per_device(self) -> list[dict[str, int | str]]:
        """Bytes of weights and caches on each device."""
        ...


EngineT = TypeVar("EngineT", bound=Engine)


class BaseDecoder(NotCopied, abc.ABC, Generic[EngineT]):
    """Decodes prompts; how, its subclasses say.

    One request runs at a time. Whole answers that several threads ask for are given one after the other; any request
    ends a stream before it that was not read to its end.
    """

    target: Model
    """The model whose tokens are given."""
    method: str
    """How it decodes."""
    lag = 1
    """Ticks from a token's sending to that of its guesses at the earliest."""

    def __init__(self) -> None:
        # Not kept alive: it holds the decoder, whose weights would then wait for the garbage collector.
        self._stream: weakref.ref[Stream] | None = None
        self._turn = threading.Lock()
        self._whole = threading.RLock()
        """Held while a whole answer is decoded, so that no other request cuts it off."""

    @functools.cached_property
    def engine(self) -> EngineT:
        """The engine, with the weights on the devices; made when it is first asked for."""
        check_untraced()
        with own_settings():
            return self._make_engine()

    @abc.abstractmethod
    def _make_engine(self) -> EngineT:
        """Read the weights."""

    @abc.abstractmethod
    def request(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Collection[str] = (),
        logprobs: bool = False,
        drafter_params: Any = None,
    ) -> Request:
        """Check what `generate` and `stream` are given; decodes nothing and reads no weight (see `Decoder.request`)."""

    @abc.abstractmethod
    def modeled_speedup_vs_pp(self, cost_per_token: float) -> float:
        """How many times faster than PP on as many stages of the target an answer is, in modeled time.

        Args:
            cost_per_token: what the answer's ticks cost for each of its tokens.
        """

    def prepare(self) -> EngineT:
        """Convert and read the weights now, where the first answer would: what is wrong with them then shows here."""
        return self.engine

    def generate(self, prompt: Prompt, *, max_new_tokens: int = 128, **options: Unpack[RequestOptions]) -> Generation:
        """Decode an answer.

        Args:
            prompt: text, or token ids (used as they are, also without a begin-of-text token).
            max_new_tokens: most tokens of the answer.
            **options: as for `Decoder.request`.

        Raises:
            ValueError: as `request` does.
        """
        return self._answer(self.request(prompt, max_new_tokens=max_new_tokens, **options))

    def _answer(self, request: Request) -> Generation:
        with self._whole:
            answer = self._begin(request, self._whole_chunk(request))
            for _ in answer:
                pass
        return answer.result

    def stream(
        self, prompt: Prompt, *, max_new_tokens: int = 128, chunk: int = 4, **options: Unpack[RequestOptions]
    ) -> Stream:
        """Decode an answer piece by piece: iterate over the text; afterwards the stream has the `result`.

        Args:
            prompt: text, or token ids.
            max_new_tokens: most tokens of the answer.
            chunk: tokens to decode between two looks at them; changes when text appears, never the answer.
            **options: as for `Decoder.request`.

        Raises:
            ValueError: as `request` does.
        """
        check_count("chunk", chunk)
        request = self.request(prompt, max_new_tokens=max_new_tokens, **options)
        return self._begin(request, min(chunk, request.max_new_tokens))

    def generate_many(
        self, prompts: Iterable[Prompt], *, max_new_tokens: int = 128, **options: Unpack[RequestOptions]
    ) -> list[Generation]:
        """Decode several answers one after another, with the same options and the same compiled program.

        Raises:
            ValueError: as `request` does, of any prompt before the first is decoded, and for one prompt in place of
                several.
        """
        check = functools.partial(self.request, max_new_tokens=max_new_tokens, **options)
        return [self._answer(request) for request in check_prompts(prompts, check)]

    def bytes_per_device(self) -> list[dict[str, int | str]]:
        """Bytes of weights and caches on each device; caches appear with the first prompt."""
        return self.engine.bytes_per_device()

    def _whole_chunk(self, request: Request) -> int:
        """Tokens to decode between two looks, where nobody reads along."""
        return STOP_TOKENS if request.stop else INTERRUPT_TOKENS

    def _begin(self, request: Request, chunk: int) -> Stream:
        check_untraced()
        with self._whole, self._turn:
            before = self._stream() if self._stream is not None else None
            if before is not None:
                before.supersede()
            begun = Stream(
                self.engine,
                self.target.tokenizer,
                request,
                self.method,
                self.modeled_speedup_vs_pp,
                chunk,
                self.lag,
                turn=self._turn,
            )
            self._stream = weakref.ref(begun)
            return begun
