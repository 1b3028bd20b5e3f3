"""How a model's layers are split over stages."""

from __future__ import annotations

import dataclasses

from pipedec_jax.config import check_exit


@dataclasses.dataclass(frozen=True)
class StageSplit:
    """Layers of each stage: `first[k]` up to `first[k] + count[k]`."""

    count: tuple[int, ...]
    """Layers of each stage, none zero."""
    exit: int = 0
    """Stages of the exit path (e), which ends with a stage's last layer; 0 where there is none."""

    @property
    def stages(self) -> int:
        """Number of stages (N)."""
        return len(self.count)

    @property
    def first(self) -> tuple[int, ...]:
        """The first layer of each stage."""
        return tuple(sum(self.count[:k]) for k in range(self.stages))

    @property
    def longest(self) -> int:
        """Layers of the longest stage, to which all are padded."""
        return max(self.count)

    @property
    def shortest(self) -> int:
        """Layers of the shortest stage: those that every stage has."""
        return min(self.count)


def split_layers(layers: int, stages: int) -> StageSplit:
    """Split as evenly as possible; the first stages get what is over (the head is not on the last stage's path).

    Raises:
        ValueError: when there are more stages than layers, or no stage.
    """
    if stages < 1:
        raise ValueError(f"stages must be at least 1, not {stages}")
    if stages > layers:
        raise ValueError(f"stages ({stages}) must not exceed the target's layers ({layers})")
    even, over = divmod(layers, stages)
    return StageSplit(tuple(even + (k < over) for k in range(stages)))


LIKELY_RATE = 0.8
"""Share of guesses at an exit that are accepted, by which the stages of an exit path are chosen (PPSD reports 0.81)."""


def split_at_exit(
    layers: int, stages: int, exit_layer: int, head: float = 0.0, exit_stages: int | None = None
) -> StageSplit:
    """Split so that a stage ends at the exit, and the longest stage, the exit head included, is as short as can be.

    More stages on the exit path may shorten that stage, and with it every tick, but a hit then takes as many ticks.

    Args:
        layers: of the target (L).
        stages: all of them (N).
        exit_layer: layers of the exit path (E).
        head: what the exit head adds to the last stage of that path, in layers.
        exit_stages: stages of the exit path (e); by default as many as make the time of a token shortest, a tick being
            the longest stage and `LIKELY_RATE` of the guesses accepted.

    Raises:
        ValueError: when the exit is not inside the target, or either side of it has more stages than layers, or none.
    """
    check_exit(exit_layer, layers)
    if not 2 <= stages <= layers:
        raise ValueError(
            f"an exit needs from 2 stages to as many as the target's layers ({layers}), not {stages}: its own, and one "
            "behind it"
        )
    fewest, most = max(1, stages - (layers - exit_layer)), min(exit_layer, stages - 1)
    if exit_stages is not None and not fewest <= exit_stages <= most:
        raise ValueError(
            f"exit_stages must be {fewest} to {most} for {stages} stages and an exit after {exit_layer} of {layers} "
            f"layers, not {exit_stages}"
        )

    def split(e: int, last: int) -> StageSplit:
        before = split_layers(exit_layer - last, e - 1).count if e > 1 else ()
        return StageSplit((*before, last, *split_layers(layers - exit_layer, stages - e).count), exit=e)

    def token(split: StageSplit) -> float:
        longest = max(split.longest, split.count[split.exit - 1] + head)
        return longest * (LIKELY_RATE * split.exit + (1 - LIKELY_RATE) * stages)

    possible = [exit_stages] if exit_stages else range(fewest, most + 1)
    lasts = {e: range(exit_layer - e + 1, 0, -1) if e > 1 else [exit_layer] for e in possible}
    return min((split(e, last) for e in possible for last in lasts[e]), key=token)
