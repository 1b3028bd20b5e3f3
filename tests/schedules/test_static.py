"""The static tree: drafted level by level, then the best of all levels in one batch."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pipedec_jax import tree
from pipedec_jax.schedules.static import StaticSchedule

LOG = jnp.log(jnp.asarray([[0.5, 0.3, 0.2], [0.3, 0.2, 0.1], [0.3, 0.2, 0.1]], jnp.float32))
"""Of each node's guesses 1, 2 and 3, by its level."""


def test_every_step_extends_the_best_of_the_level_before_and_the_best_of_all_are_sent() -> None:
    schedule = StaticSchedule(width=5, level=2)
    nodes = tree.plant(schedule.capacity(2), 3, jnp.int32(0), jnp.int32(0))
    extended = []
    for step, log_prob in enumerate(LOG):
        nodes, frontier = schedule.frontier(nodes, step)
        token = jnp.broadcast_to(jnp.arange(1, 4, dtype=jnp.int32), (len(frontier), 3))
        nodes = tree.guess(nodes, frontier, token, jnp.broadcast_to(log_prob, token.shape))
        extended.append([(int(nodes.token[i]), int(nodes.position[i])) for i in np.asarray(frontier) if i < 11])
    # Though the root's third guess, 0.2, is likelier than all of the second level.
    assert extended == [[(0, 0)], [(1, 1), (2, 1)], [(1, 2), (2, 2)]]
    nodes, batch = schedule.next_batch(nodes)
    chosen = sorted((int(nodes.position[i]), int(nodes.token[i])) for i in np.asarray(batch))
    assert chosen == [(0, 0), (1, 1), (1, 2), (1, 3), (2, 1)]
    assert int(jnp.sum(nodes.alive)) == 5, "what is not sent goes"
