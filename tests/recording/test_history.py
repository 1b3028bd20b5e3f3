"""The life of nodes where a place of the tree changes hands, told from ticks made by hand."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pipedec_jax.recording.history import Answer, Batch, Commit, DraftStep, Layout, read_history
from pipedec_jax.transcript import MISS

NONE = 4
"""No place: the tree's capacity."""
LAYOUT = Layout("pipedec", stages=3, width=1, drafter=False)
ANSWER = Answer([7, 9], [3, 4], [2, MISS])


def frame(
    tick: int,
    nodes: dict[int, tuple[int, int, int, int]],
    pipe: list[int],
    choice: int,
    left: list[int],
    drafted: Sequence[tuple[int, int, int]] = (),
) -> Any:
    """A tick.

    Args:
        tick: its number.
        nodes: of the tree by their places, the root first: token, place of the parent, position and tick of sending.
        pipe: the place at each stage.
        choice: what the target chose.
        left: places of the nodes that live on, the root's first.
        drafted: what a draft step extended, as it then was: place, token and position.
    """
    token, parent, position, sent = (
        np.asarray([nodes.get(place, (0, NONE, 0, 0))[k] for place in range(NONE)], np.int32) for k in range(4)
    )
    rows = [*drafted, *[(NONE, 0, 0)] * (2 - len(drafted))]
    return types.SimpleNamespace(
        tick=np.int32(tick),
        cost=np.float32(2 * tick),
        pipe=np.asarray(pipe, np.int32)[:, None],
        frontier=np.asarray([[row[0] for row in rows]], np.int32),
        frontier_token=np.asarray([[row[1] for row in rows]], np.int32),
        frontier_position=np.asarray([[row[2] for row in rows]], np.int32),
        guess_token=np.asarray([[[4, 9]] * 2], np.int32),
        guess_log_prob=np.asarray([[[-1.0, -np.inf]] * 2], np.float32),
        token=token,
        parent=parent,
        position=position,
        log_prob=-np.arange(NONE, dtype=np.float32),
        sent_tick=sent,
        choice=np.full(NONE, choice, np.int32),
        alive=np.isin(np.arange(NONE), list(nodes)),
        root=np.int32(next(iter(nodes))),
        left=np.isin(np.arange(NONE), left),
        new_root=np.int32(left[0]),
    )


def frames() -> list[Any]:
    """Guesses below a root, of which the next tick replaces some; a hit, a miss, and a batch that is dead then.

    The hit has a twin that is not in the pipe, and what is missed is there, but below another node.
    """
    first = {0: (5, NONE, 3, 1), 1: (6, 0, 4, 0), 2: (8, 0, 4, 0), 3: (4, 2, 5, 0)}
    second = {0: (5, NONE, 3, 1), 1: (7, 0, 4, 2), 2: (7, 0, 4, 0), 3: (4, 1, 5, 0)}
    return [
        frame(1, first, [0, NONE, NONE], 0, [0, 1, 2, 3]),
        frame(2, second, [1, 0, NONE], 0, [0, 1, 2, 3], [(1, 6, 4), (0, 5, 3)]),
        frame(3, second, [NONE, 1, 0], 7, [1, 3]),
        frame(4, {1: (7, 0, 4, 2), 2: (9, 3, 6, 0), 3: (4, 1, 5, 4)}, [3, NONE, 1], 9, [0]),
        frame(5, {0: (9, NONE, 5, 5)}, [0, NONE, NONE], 0, [0]),
    ]


def test_a_place_that_changes_hands_holds_another_node() -> None:
    recording = read_history(frames(), LAYOUT, ANSWER)
    told = [
        (node.token, node.parent, node.position, node.born, node.sent, node.committed, node.pruned)
        for node in recording.nodes
    ]
    assert told == [
        (5, None, 3, 1, 1, 0, None),
        (6, 0, 4, 1, None, None, 2),
        (8, 0, 4, 1, None, None, 2),
        (4, 2, 5, 1, None, None, 2),
        (7, 0, 4, 2, 2, 3, None),
        (7, 0, 4, 2, None, None, 3),
        (4, 4, 5, 2, 4, None, 4),
        (9, 6, 6, 4, None, None, 4),
        (9, None, 5, 4, 5, 4, None),
    ]
    assert [node.log_prob for node in recording.nodes] == [0, -1, -2, -3, -1, -2, -3, -2, 0]
    assert [(node.number, node.chosen, node.choice) for node in recording.nodes if node.chosen] == [
        (0, 3, 7),
        (4, 4, 9),
    ]


def test_a_tick_has_what_was_drafted_sent_committed_and_pruned_in_it() -> None:
    ticks = read_history(frames(), LAYOUT, ANSWER).ticks
    assert [one.tree for one in ticks] == [(0, 1, 2, 3), (0, 4, 5, 6), (0, 4, 5, 6), (4, 6, 7), (8,)]
    assert [one.pruned for one in ticks] == [(), (), (5,), (6, 7), ()]
    assert [(one.root, one.new_root, one.cost) for one in ticks] == [
        (0, 0, 2),
        (0, 0, 2),
        (0, 4, 2),
        (4, 8, 2),
        (8, 8, 2),
    ]
    assert [one.committed for one in ticks] == [(), (), (Commit(0, 4, 2),), (Commit(1, 8, None),), ()]
    assert ticks[4].stages == (Batch(5, 1, (8,)), Batch(4, 1, ()), None)
    assert (ticks[4].bubbles, ticks[4].stages[1].dead if ticks[4].stages[1] else None) == (1, 1)
    # The first row's node had another token when it was extended.
    guess = ((4, -1.0),)
    assert [one.drafts for one in ticks[:2]] == [(DraftStep((), ()),), (DraftStep((None, 0), (guess, guess)),)]


@pytest.mark.parametrize(("tokens", "left", "tick"), [([8, 9], [], 3), ([7, 4], [], 4), ([7, 9], [3], 3)])
def test_ticks_that_are_not_the_answers_are_an_error(tokens: list[int], left: list[int], tick: int) -> None:
    told = frames()
    told[2].left[left] = False
    with pytest.raises(ValueError, match=f"tick {tick} does not fit the answer"):
        read_history(told, LAYOUT, Answer(tokens, [3, 4], [1, 1]))
