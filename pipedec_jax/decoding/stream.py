"""One answer under way: runs the engine piece by piece, turns tokens into text, ends at stop strings."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from pipedec_jax.checks import NotCopied
from pipedec_jax.decoding.result import FinishReason, Generation, Token
from pipedec_jax.decoding.text import TextStream
from pipedec_jax.own_settings import own_settings
from pipedec_jax.pipeline.progress import Progress
from pipedec_jax.sampling import Sampling
from pipedec_jax.soundness import NotFiniteError
from pipedec_jax.tokenizer import Tokenizer


class Engine(Protocol):
    """What a stream needs of `pipedec_jax.pipeline.engine.Engine`."""

    compile_seconds: float

    def start(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        end_tokens: Sequence[int],
        drafter_params: object = None,
    ) -> None:
        """Prefill a prompt."""
        ...

    def run(self, new_tokens: int) -> Progress:
        """Commit at least that many more tokens, unless the answer is complete before."""
        ...


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked request, ready to be decoded."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    end_tokens: tuple[int, ...]
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    drafter_params: object = None


class Stream(NotCopied, Iterator[str]):
    """Iterates over the pieces of an answer's text; afterwards `result` holds the whole answer.

    A caller may stop iterating at any time. When the decoder starts another answer, an unfinished one is cut off.

    Args:
        engine: that decodes; prefill starts at once.
        tokenizer: of the target.
        request: what to decode.
        method: how the engine decodes.
        speedup: gives the modeled speedup over PP for a tick cost per token.
        chunk: tokens to commit before the host looks again; changes when text is seen, never the answer.
        lag: ticks from a token's sending to that of its guesses at the earliest.
        turn: held while the engine works; shared by all streams of one engine.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        request: Request,
        method: str,
        speedup: Callable[[float], float],
        chunk: int,
        lag: int = 1,
        turn: threading.Lock | None = None,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._request = request
        self._method = method
        self._speedup = speedup
        self._chunk = chunk
        self._lag = lag
        self._turn = turn or threading.Lock()
        self._read: tuple[TextStream | None, int, int] = (None, 0, 0)
        """The text so far, how many tokens it has read, and how many characters were given to the caller; no text while
        it reads, nor after an interrupt in that, so that it is made anew and never reads a token twice."""
        self._progress: Progress | None = None
        self._result: Generation | None = None
        self._superseded = False
        self._clock = _Clock(engine)
        self._first_s = 0.0
        with self._clock, own_settings():
            engine.start(
                request.prompt,
                max_new_tokens=request.max_new_tokens,
                sampling=request.sampling,
                end_tokens=request.end_tokens,
                drafter_params=request.drafter_params,
            )

    @property
    def result(self) -> Generation:
        """The whole answer.

        Raises:
            RuntimeError: while there is text to come.
        """
        if self._result is None:
            raise RuntimeError("the answer is not complete: iterate over the stream to its end first")
        return self._result

    def partial(self) -> Generation | None:
        """The answer as far as it has come, after an interrupt or an error; `None` while there is no token.

        It begins with the text of all pieces so far, and may have more: what was held back because it might have become
        a stop string, and tokens committed before an error.
        """
        progress = self._progress
        if self._result is not None or progress is None or not progress.tokens:
            return self._result
        # The stream's own text may have been interrupted in the middle of a piece.
        text = self._new_text()
        text.feed(progress.tokens[: len(progress.tokens) - self._ended(progress)])
        text.finish()
        count = len(progress.tokens) if text.stopped_at is None else text.stopped_at + 1
        return self._generation(progress, text.text, count, "interrupted")

    def supersede(self) -> None:
        """Told by the decoder when its engine goes on to another answer."""
        self._superseded = True

    def __next__(self) -> str:
        """The next piece of text, never empty.

        Raises:
            NotFiniteError: when the target gives NaN or infinity; `partial` then has what was committed.
            RuntimeError: when the decoder has started another answer in the meantime.
        """
        while self._result is None:
            with self._turn:
                if self._superseded:
                    raise RuntimeError("this stream was cut off: its decoder has started another answer")
                piece = self._advance()
            if piece:
                return piece
        raise StopIteration

    def _advance(self) -> str:
        """Run the engine once and return what text that gave; sets the result when the answer has ended."""
        first = self._progress is None
        with self._clock, own_settings():
            try:
                # The first token alone, so that its time is known.
                progress = self._engine.run(1 if first else self._chunk)
            except NotFiniteError as error:
                self._progress = error.progress
                raise
        if first:
            self._first_s = self._clock.seconds
        self._progress = progress
        ids = progress.tokens
        ended = self._ended(progress)
        text, count, given = self._read
        self._read = (None, 0, given)
        text = self._new_text() if text is None else text
        piece = text.feed(ids[count : len(ids) - ended])
        complete = progress.done or text.stopped_at is not None
        if complete:
            piece += text.finish()
        if count == 0:  # made anew, it gives all of it
            piece = piece[given:]
        if not complete:
            self._read = (text, len(ids), given + len(piece))
        # The text may have stopped before an end token, or only with what was held back.
        elif text.stopped_at is not None:
            self._result = self._generation(progress, text.text, text.stopped_at + 1, "stop")
        else:
            self._result = self._generation(progress, text.text, len(ids), "end" if ended else "length")
        return piece

    def _new_text(self) -> TextStream:
        return TextStream(self._tokenizer, self._request.prompt, self._request.stop)

    def _ended(self, progress: Progress) -> bool:
        """Whether the last token is an end token, which is not text, whether or not the tokenizer calls it special."""
        return progress.done and progress.tokens[-1] in self._request.end_tokens

    def _generation(self, progress: Progress, text: str, count: int, reason: FinishReason) -> Generation:
        """The answer of the first `count` tokens; how far the pipe had got beyond them leaves no trace in it."""
        guessed = 0 if self._method == "pp" else count - 1
        hits = progress.hits
        tokens = tuple(
            Token(
                id=progress.tokens[i],
                tick=progress.ticks[i],
                hit=hits[i] if i < guessed else None,
                delay=progress.delays[i] if i < guessed and hits[i] else None,
                logprob=progress.logprobs[i] if self._request.logprobs else None,
            )
            for i in range(count)
        )
        rest_s = self._clock.seconds - self._first_s
        return Generation(
            text=text,
            tokens=tokens,
            prompt_tokens=len(self._request.prompt),
            finish_reason=reason,
            method=self._method,
            modeled_cost=progress.costs[count - 1],
            modeled_speedup_vs_pp=self._speedup(progress.costs[count - 1] / count),
            compile_s=self._clock.compile_seconds,
            ttft_s=self._first_s,
            tpot_s=rest_s / (count - 1) if count > 1 else None,
            lag=self._lag,
        )


class _Clock:
    """Adds up the time spent in its `with` blocks, with compiling apart.

    What a caller does between two pieces of text is not the decoder's time.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._compiled_before = engine.compile_seconds
        self._begun = 0.0
        self._total = 0.0

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._total += time.perf_counter() - self._begun

    @property
    def compile_seconds(self) -> float:
        """Seconds spent compiling."""
        return self._engine.compile_seconds - self._compiled_before

    @property
    def seconds(self) -> float:
        """Seconds spent on everything else."""
        return self._total - self.compile_seconds
