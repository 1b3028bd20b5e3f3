"""The draft steps of a tick as they get into the tree."""

from __future__ import annotations

import jax
import numpy as np

from pipedec_jax import tree
from pipedec_jax.pipeline.drafting import keep_guesses
from pipedec_jax.pipeline.state import DraftSteps

CAPACITY = 12


def test_the_last_step_that_extends_a_place_has_its_guesses() -> None:
    """A node that a later step dropped has left its place to another, which that step extended."""
    nodes = jax.jit(tree.plant, static_argnums=(0, 1))(CAPACITY, 2, np.int32(9), np.int32(4))
    node = np.asarray([[0, 3], [3, CAPACITY], [CAPACITY, 5]], np.int32)
    token = np.arange(12, dtype=np.int32).reshape(3, 2, 2)
    steps = DraftSteps(node, node, node, token, -1.0 - token.astype(np.float32))
    kept = jax.jit(keep_guesses)(nodes, steps)
    expected = {0: [0, 1], 3: [4, 5], 5: [10, 11]}
    assert {place: kept.guess_token[place].tolist() for place in expected} == expected
    assert {place: (-1 - kept.guess_log_prob[place]).tolist() for place in expected} == expected
    assert np.flatnonzero(kept.drafted).tolist() == [0, 3, 5]
