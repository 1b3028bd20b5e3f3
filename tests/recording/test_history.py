"""The life of nodes where a place of the tree changes hands, told from ticks made by hand."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest

from pipedec_jax.recording.history import Answer, Layout, read_history
from pipedec_jax.transcript import MISS

NONE = 4
"""No place: the tree's capacity."""
LAYOUT = Layout("pipedec", stages=3, width=1, drafter=False)


def frame(tick: int, nodes: dict[int, tuple[int, int, int, int]], pipe: list[int], choice: int, left: list[int]) -> Any:
    """A tick in which the tree has these nodes at these places: token, place of the parent, position and sending."""
    token, parent, position, sent = (
        np.asarray([nodes.get(place, (0, NONE, 0, 0))[k] for place in range(NONE)], np.int32) for k in range(4)
    )
    return types.SimpleNamespace(
        tick=np.int32(tick),
        cost=np.float32(2 * tick),
        pipe=np.asarray(pipe, np.int32)[:, None],
        frontier=np.zeros((0, 1), np.int32),
        token=token,
        parent=parent,
        position=position,
        log_prob=np.zeros(NONE, np.float32),
        sent_tick=sent,
        choice=np.full(NONE, choice, np.int32),
        alive=np.isin(np.arange(NONE), list(nodes)),
        root=np.int32(next(iter(nodes))),
        left=np.isin(np.arange(NONE), left),
        new_root=np.int32(left[0]),
    )


def frames() -> list[Any]:
    """A root with two guesses below it; then a guess and one below the other are replaced; a hit, and a miss."""
    first = {0: (5, NONE, 3, 1), 1: (6, 0, 4, 0), 2: (8, 0, 4, 0), 3: (4, 2, 5, 0)}
    second = {0: (5, NONE, 3, 1), 1: (7, 0, 4, 2), 2: (8, 0, 4, 0), 3: (4, 1, 5, 0)}
    return [
        frame(1, first, [0, NONE, NONE], 0, [0, 1, 2, 3]),
        frame(2, second, [1, 0, NONE], 0, [0, 1, 2, 3]),
        frame(3, second, [NONE, 1, 0], 7, [1, 3]),
        frame(4, {1: (7, 0, 4, 2), 2: (8, 1, 5, 0), 3: (4, 1, 5, 0)}, [NONE, NONE, 1], 9, [0]),
    ]


def test_a_place_that_changes_hands_holds_another_node() -> None:
    recording = read_history(frames(), LAYOUT, Answer([7, 9], [3, 4], [1, MISS]))
    told = [
        (node.token, node.parent, node.position, node.born, node.sent, node.committed, node.pruned)
        for node in recording.nodes
    ]
    assert told == [
        (5, None, 3, 1, 1, 0, None),
        (6, 0, 4, 1, None, None, 2),
        (8, 0, 4, 1, None, None, 3),
        (4, 2, 5, 1, None, None, 2),
        (7, 0, 4, 2, 2, 3, None),
        (4, 4, 5, 2, None, None, 4),
        (8, 4, 5, 4, None, None, 4),
        (9, None, 5, 4, None, 4, None),
    ]
    assert [(node.chosen, node.choice) for node in recording.nodes if node.sent] == [(3, 7), (4, 9)]
    assert [one.tree for one in recording.ticks] == [(0, 1, 2, 3), (0, 2, 4, 5), (0, 2, 4, 5), (4, 5, 6)]
    assert [one.pruned for one in recording.ticks] == [(), (), (2,), (5, 6)]
    assert [(one.root, one.new_root, one.bubbles, one.cost) for one in recording.ticks] == [
        (0, 0, 2, 2.0),
        (0, 0, 1, 2.0),
        (0, 4, 1, 2.0),
        (4, 7, 2, 2.0),
    ]


@pytest.mark.parametrize(("tokens", "tick"), [([8, 9], 3), ([7, 4], 4)])
def test_ticks_that_are_not_the_answers_are_an_error(tokens: list[int], tick: int) -> None:
    with pytest.raises(ValueError, match=f"tick {tick} does not fit the answer"):
        read_history(frames(), LAYOUT, Answer(tokens, [3, 4], [1, 1]))
