"""PipeDec's levels: what loses its place is not tried again; best-first tries it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pipedec_jax import tree
from pipedec_jax.schedules.base import Schedule
from pipedec_jax.schedules.best_first import BestFirstSchedule
from pipedec_jax.schedules.levels import LevelSchedule


def batches(schedule: Schedule, chances: list[list[float]]) -> list[list[tuple[int, int]]]:
    """Tokens and positions of each tick's batch where every node is given the guesses of its level, 1 and up."""
    nodes = tree.plant(16, len(chances[0]), jnp.int32(0), jnp.int32(0))
    sent = []
    for tick, level in enumerate(chances, start=1):
        nodes, batch = schedule.next_batch(nodes)
        nodes = tree.send(nodes, batch, jnp.int32(tick))
        token = jnp.broadcast_to(jnp.arange(1, len(level) + 1, dtype=jnp.int32), (len(batch), len(level)))
        nodes = tree.guess(nodes, batch, token, jnp.broadcast_to(jnp.log(jnp.asarray(level)), token.shape))
        sent.append([(int(nodes.token[i]), int(nodes.position[i])) for i in np.asarray(batch) if i < nodes.capacity])
    return sent


@pytest.mark.parametrize(
    ("schedule", "third"),
    [(LevelSchedule(2), [(1, 2), (2, 2)]), (BestFirstSchedule(2), [(3, 1), (1, 2)])],
    ids=["levels", "best first"],
)
def test_a_guess_that_lost_its_place_is_a_candidate_of_best_first_alone(
    schedule: Schedule, third: list[tuple[int, int]]
) -> None:
    found = batches(schedule, [[0.5, 0.3, 0.2], [0.3, 0.2, 0.1], [0.3, 0.2, 0.1]])
    # The root; its two best; then the third of it, or the best of theirs.
    assert found == [[(0, 0)], [(1, 1), (2, 1)], third]
