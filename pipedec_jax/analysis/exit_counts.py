"""Ticks of PPSD's chain as whole numbers, counted beside what hits and misses predict and beside the form in layers."""

from __future__ import annotations

import dataclasses

from pipedec_jax.analysis.method_table import MethodRow
from pipedec_jax.analysis.simulator import Simulator
from pipedec_jax.config import LlamaConfig
from pipedec_jax.drafters.replay import ReplayAtExit, random_text
from pipedec_jax.modeled.closed_forms import ppsd_speedup
from pipedec_jax.modeled.exit_cost import ppsd_ticks
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.pipeline.split import StageSplit


@dataclasses.dataclass(frozen=True)
class ChainCount:
    """What a chain took over one or several answers."""

    split: StageSplit
    """Layers by stage, and the stages of the exit path."""
    answers: int
    tokens: int
    """Of all answers together, as the numbers below."""
    hits: int
    misses: int
    ticks: int

    @property
    def predicted(self) -> int:
        """Ticks by hits and misses: a fill for each answer, e for each hit, a refill for each miss."""
        fills = (self.answers - 1) * self.split.stages
        return fills + ppsd_ticks(self.split.stages, self.split.exit, self.hits, self.misses)

    @property
    def exact(self) -> bool:
        """Whether they are those counted."""
        return self.ticks == self.predicted

    @property
    def rate(self) -> float:
        """Share of the guesses that the target accepted (a)."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def speedup(self) -> float:
        """PP's ticks over those counted."""
        return self.split.stages * self.tokens / self.ticks

    @property
    def speedup_in_layers(self) -> float | None:
        """`L / (a E + (1 - a) L)` at that rate; `None` where stages are not equal, for which it does not hold."""
        if len(set(self.split.count)) > 1:
            return None
        exit_layers = sum(self.split.count[: self.split.exit])
        return float(ppsd_speedup(self.rate, exit_layers, sum(self.split.count)))


def replayed(
    target: LlamaConfig, stages: int, exit_layer: int, rates: list[float], tokens: int = 500, seed: int = 0
) -> list[ChainCount]:
    """One answer at each acceptance rate, by the replay drafter at the exit; simulated.

    Args:
        target: its geometry.
        stages: all of them (N).
        exit_layer: layers of the exit path (E).
        rates: shares of the text's tokens that are guessed right.
        tokens: of the text.
        seed: of the text, and of which are right.
    """
    vocab = min(97, target.vocab_size)
    text, at_rate = random_text(tokens, vocab, seed)
    settings = EngineSettings(method="ppsd", stages=stages, exit_layer=exit_layer, width=1, children=1)
    drafter = ReplayAtExit(children=1, vocab_size=vocab)
    simulator = Simulator(target, None, settings, vocab_size=vocab, drafter=drafter)
    counts = []
    for rate in rates:
        progress = simulator.run(text[:1], text[1:], drafter_params=at_rate(rate))
        hits = sum(progress.hits[:-1])
        counts.append(ChainCount(simulator.split, 1, tokens, hits, tokens - 1 - hits, progress.ticks[-1]))
    return counts


def of_row(row: MethodRow, split: StageSplit) -> ChainCount:
    """What a row of a table of methods counted."""
    return ChainCount(split, row.prompts, row.tokens, row.hits, row.misses, row.ticks)
