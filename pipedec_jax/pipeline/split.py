"""How a model's layers are split over stages."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class StageSplit:
    """Layers of each stage: `first[k]` up to `first[k] + count[k]`."""

    count: tuple[int, ...]
    """Layers of each stage, none zero."""

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
