"""Plain pipeline parallelism (PP): the root alone walks all stages, which otherwise idle."""

from __future__ import annotations

import dataclasses

from pipedec_jax.schedules.base import Schedule


@dataclasses.dataclass(frozen=True)
class PlainSchedule(Schedule):
    """Sends the root, then nothing until its choice is known: the base schedule with one row and no guesses."""

    width: int = 1

    @property
    def level_by_level(self) -> bool:
        """There is one row in the pipe."""
        return True
