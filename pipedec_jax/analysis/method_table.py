"""Runs methods over the same prompts and gathers what a table of results needs; every answer is compared with PP's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pipedec_jax.decoding.decoder import Decoder
from pipedec_jax.decoding.result import Generation


@dataclasses.dataclass(frozen=True)
class MethodRow:
    """One setting's sums over all prompts. Ratios name their baseline: PP on the same number of target stages."""

    method: str
    stages: int
    width: int
    children: int
    draft_steps: int
    """Draft steps in a tick; of STPP, levels of the tree."""
    drafter: str
    prompts: int
    tokens: int
    ticks: int
    hits: int
    misses: int
    late_hits: int
    """Hits that were sent more than a tick after their parent; counted in `hits` as well."""
    ticks_late: int
    """Ticks by which late hits came later than on-time ones."""
    modeled_speedup_vs_pp: float
    """From bytes of weights read, the draft's steps charged; mean over the prompts weighted by tokens."""

    @property
    def ticks_per_token(self) -> float:
        """Ticks over tokens."""
        return self.ticks / self.tokens

    @property
    def hit_rate(self) -> float:
        """Hits over hits and misses."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def ticks_speedup_vs_pp(self) -> float:
        """PP's ticks (stages times tokens) over these."""
        return self.stages * self.tokens / self.ticks

    def to_dict(self) -> dict[str, Any]:
        """Fields and ratios, JSON-ready."""
        ratios = ("ticks_per_token", "hit_rate", "ticks_speedup_vs_pp")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in ratios}


class TokensDifferError(AssertionError):
    """A method gave other tokens than plain pipeline parallelism."""


def gather(decoder: Decoder, prompts: Sequence[str], answers: Sequence[list[int]], **options: Any) -> MethodRow:
    """Run one decoder over the prompts and compare with the known answers.

    Raises:
        TokensDifferError: when an answer is not the expected one, token by token.
    """
    results: list[Generation] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        result = decoder.generate(prompt, **options)
        if result.token_ids != answer:
            first = next(
                (i for i, (a, b) in enumerate(zip(result.token_ids, answer, strict=False)) if a != b),
                min(len(result.token_ids), len(answer)),
            )
            raise TokensDifferError(
                f"{decoder.method} with {decoder.stages} stages and width {decoder.width} differs from PP at new "
                f"token {first} of prompt {prompt[:40]!r}"
            )
        results.append(result)
    tokens = sum(len(result.token_ids) for result in results)
    weighted = sum(len(result.token_ids) / result.modeled_speedup_vs_pp for result in results)
    return MethodRow(
        method=decoder.method,
        stages=decoder.stages,
        width=decoder.width,
        children=decoder.children,
        draft_steps=decoder.settings.steps,
        drafter=decoder.drafter if isinstance(decoder.drafter, str) else type(decoder.drafter).__name__,
        prompts=len(results),
        tokens=tokens,
        ticks=sum(result.ticks for result in results),
        hits=sum(result.hits or 0 for result in results),
        misses=sum(result.misses or 0 for result in results),
        late_hits=sum((token.delay or 0) > 1 for result in results for token in result.tokens[:-1]),
        ticks_late=sum(max(0, (token.delay or 0) - 1) for result in results for token in result.tokens[:-1]),
        modeled_speedup_vs_pp=tokens / weighted,
    )


def sweep(
    make: Callable[..., Decoder],
    prompts: Sequence[str],
    settings: Iterable[Mapping[str, Any]],
    report: Callable[[MethodRow], None],
    **options: Any,
) -> list[MethodRow]:
    """Every setting over the same prompts, each compared with one-stage PP's tokens.

    Args:
        make: makes a decoder from the arguments in a setting.
        prompts: texts.
        settings: arguments of `Decoder`.
        report: called with each row as it is done.
        options: of `Decoder.generate`.
    """
    plain = make(method="pp", stages=1)
    answers = [plain.generate(prompt, **options).token_ids for prompt in prompts]
    rows = []
    for setting in settings:
        rows.append(gather(make(**setting), prompts, answers, **options))
        report(rows[-1])
    return rows
