"""What an answer is: its text and tokens, how each token came, and what it took."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

FinishReason = Literal["end", "stop", "length", "interrupted"]
"""An end token, a stop string, or `max_new_tokens`; or there was more to come (`Stream.partial`)."""


FIGURES = (
    "prompt_tokens",
    "new_tokens",
    "token_ids",
    "text",
    "finish_reason",
    "ticks",
    "ticks_per_token",
    "hits",
    "misses",
    "late_hits",
    "modeled_cost",
    "modeled_speedup_vs_pp",
    "compile_s",
    "ttft_s",
    "tpot_s",
)
"""What `Generation.to_dict` holds. Names may be added, none changes."""


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of an answer."""

    id: int
    tick: int
    """The tick it was committed in, counted from 1 at the root's entry into the pipe (prefill does not count)."""
    hit: bool | None
    """Whether it was already in the pipe when the target chose it. `None` under PP, where nothing is guessed, and for
    the last token, which nothing follows that a hit could speed up."""
    delay: int | None
    """Ticks between the sending of the token before it and its own: 0 when both were sent at once, 1 when one followed
    the other, more for a late hit; `None` where there is no hit."""
    logprob: float | None
    """The target's log-probability at temperature 1, without filters; `None` unless asked for."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """An answer, cut where it ended."""

    text: str
    """What the tokens add to the prompt's text. Special tokens do not show; a stop string is cut off."""
    tokens: tuple[Token, ...]
    """Up to and including the end token, or the token that completes the stop string."""
    prompt_tokens: int
    """Number of tokens of the prompt."""
    finish_reason: FinishReason
    method: str
    """How it was decoded, such as `pipedec`."""
    modeled_cost: float
    """What its ticks cost: bytes of weights that the slowest ranks read, or the calibration's seconds; not measured."""
    modeled_speedup_vs_pp: float
    """Modeled time of PP on as many stages over this answer's (`pipedec_jax.modeled.cost`); not measured."""
    compile_s: float
    """Seconds spent on compiling and on making the caches; 0 when both were there. Not part of the two below."""
    ttft_s: float
    """Time to first token: seconds from the call to the first token, prefill included."""
    tpot_s: float | None
    """Time per output token after the first, in seconds; `None` for a single token."""
    lag: int = 1
    """Ticks from a token's sending to that of its guesses at the earliest: 1, or the stages of the exit path."""

    @property
    def token_ids(self) -> list[int]:
        """The ids of `tokens`."""
        return [token.id for token in self.tokens]

    @property
    def new_tokens(self) -> int:
        """Number of tokens of the answer."""
        return len(self.tokens)

    @property
    def ticks(self) -> int:
        """Ticks from the root's entry into the pipe to the one that commits the last token."""
        return self.tokens[-1].tick

    @property
    def ticks_per_token(self) -> float:
        """`ticks / new_tokens`; the number of stages under PP."""
        return self.ticks / self.new_tokens

    @property
    def hits(self) -> int | None:
        """Tokens, but for the last, that were in the pipe when they were chosen; `None` under PP."""
        return self._count(True)

    @property
    def misses(self) -> int | None:
        """Tokens, but for the last, that were not; `hits + misses == new_tokens - 1`. `None` under PP."""
        return self._count(False)

    @property
    def late_hits(self) -> int | None:
        """Hits sent more than `lag` ticks after the token before them; counted in `hits` too. `None` under PP."""
        return None if self.method == "pp" else sum((token.delay or 0) > self.lag for token in self.tokens[:-1])

    def to_dict(self) -> dict[str, Any]:
        """The figures and the text, JSON-ready; `tokens` only by their ids."""
        return {name: getattr(self, name) for name in FIGURES}

    def _count(self, hit: bool) -> int | None:
        if self.method == "pp":
            return None
        return sum(token.hit is hit for token in self.tokens[:-1])
