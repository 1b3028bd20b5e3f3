"""Runs or simulates methods over the same prompts and gathers what a table of results needs.

Where a method is run, every answer is compared with PP's; where it is simulated, PP's answer is what it is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pipedec_jax.analysis.bound import every_guess, guessed
from pipedec_jax.analysis.simulator import Simulator
from pipedec_jax.clock import TokensDifferError, first_difference
from pipedec_jax.decoding.decoder import Decoder
from pipedec_jax.transcript import MISS


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
    """Hits that were sent later than the drafter can; counted in `hits` as well."""
    ticks_late: int
    """Ticks by which late hits came later than on-time ones."""
    modeled_speedup_vs_pp: float
    """From bytes of weights read or a calibration's seconds, the draft's steps charged."""

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


def run(decoder: Decoder, prompts: Sequence[str], answers: Sequence[list[int]], **options: Any) -> MethodRow:
    """Run one decoder over the prompts and compare with the known answers.

    Raises:
        TokensDifferError: when an answer is not the expected one, token by token.
    """
    delays, ticks, costs = [], [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        result = decoder.generate(prompt, **options)
        first = first_difference(result.token_ids, answer)
        if first is not None:
            raise TokensDifferError(
                f"{decoder.method} with {decoder.stages} stages and width {decoder.width} differs from PP at new "
                f"token {first} of prompt {prompt[:40]!r}"
            )
        delays.append([token.delay for token in result.tokens])
        ticks.append(result.ticks)
        costs.append(result.modeled_cost)
    return _row(decoder, ticks, costs, delays)


def simulate(
    decoder: Decoder,
    prompts: Sequence[str],
    answers: Sequence[list[int]],
    **options: Any,
) -> MethodRow:
    """Count what one decoder would need for the known answers without the target."""
    simulator = Simulator.of(decoder)
    delays, ticks, costs = [], [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        request = decoder.request(prompt, **options)
        progress = simulator.run(request.prompt, answer, sampling=request.sampling)
        delays.append([None if delay == MISS else delay for delay in progress.delays])
        ticks.append(progress.ticks[-1])
        costs.append(progress.costs[-1])
    return _row(decoder, ticks, costs, delays)


def _row(
    decoder: Decoder, ticks: Sequence[int], costs: Sequence[float], delays: Sequence[Sequence[int | None]]
) -> MethodRow:
    """Sums over answers, each by its ticks, what they cost and, for every token, the delay of its hit."""
    tokens = sum(map(len, delays))
    verdicts = [delay for answer in delays for delay in answer[:-1]]
    hits = [delay for delay in verdicts if delay is not None]
    drafter = decoder.drafter if isinstance(decoder.drafter, str) else type(decoder.drafter).__name__
    return MethodRow(
        method=decoder.method,
        stages=decoder.stages,
        width=decoder.width,
        children=decoder.children,
        draft_steps=decoder.settings.steps,
        drafter="none" if decoder.method == "pp" else drafter,
        prompts=len(delays),
        tokens=tokens,
        ticks=sum(ticks),
        hits=len(hits),
        misses=len(verdicts) - len(hits),
        late_hits=sum(delay > decoder.lag for delay in hits),
        ticks_late=sum(max(0, delay - decoder.lag) for delay in hits),
        modeled_speedup_vs_pp=decoder.modeled_speedup_vs_pp(sum(costs) / tokens),
    )


def guesses(decoder: Decoder, prompts: Sequence[str], answers: Sequence[list[int]], **options: Any) -> list[list[bool]]:
    """Whether the decoder's drafter has each token of the answers, but for their last, among its guesses.

    Args:
        decoder: its drafter and models count, its schedule does not.
        prompts: texts.
        answers: from `plain_answers`.
        options: of `Decoder.generate`.
    """
    simulator = every_guess(Simulator.of(decoder))
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        request = decoder.request(prompt, **options)
        found.append(guessed(simulator, request.prompt, answer, request.sampling))
    return found


def plain_answers(make: Callable[..., Decoder], prompts: Sequence[str], **options: Any) -> list[list[int]]:
    """The tokens of plain decoding on one device, by a decoder that `make` makes from `method` and `stages`."""
    return [answer.token_ids for answer in make(method="pp", stages=1).generate_many(prompts, **options)]


def sweep(
    make: Callable[..., Decoder],
    prompts: Sequence[str],
    answers: Sequence[list[int]],
    settings: Iterable[Mapping[str, Any]],
    report: Callable[[MethodRow], None],
    how: Callable[..., MethodRow] = run,
    **options: Any,
) -> list[MethodRow]:
    """Every setting over the same prompts and answers.

    Args:
        make: makes a decoder from the arguments in a setting.
        prompts: texts.
        answers: from `plain_answers`.
        settings: arguments of `Decoder`.
        report: called with each row as it is done.
        how: `run` or `simulate`.
        options: of `Decoder.generate`.
    """
    rows = []
    for setting in settings:
        rows.append(how(make(**setting), prompts, answers, **options))
        report(rows[-1])
    return rows
