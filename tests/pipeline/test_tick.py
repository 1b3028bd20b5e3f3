"""The walk of a tick: the root moves along known choices, prunes, and freezes where the answer is complete."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from pipedec_jax import transcript, tree
from pipedec_jax.pipeline.state import Shared
from pipedec_jax.pipeline.tick import walk
from pipedec_jax.sampling import Sampling
from pipedec_jax.schedules.base import Schedule

CAPACITY, SLOTS, STAGES, WIDTH, PROMPT = 12, 20, 3, 4, 5
CHAIN = [10, 11, 12, 13]
"""Tokens of a chain below the root; the target chooses each of them, and 14 after the last."""


plant, add, send, record = (
    jax.jit(tree.plant, static_argnums=(0, 1)),
    jax.jit(lambda nodes, parent, *guesses: tree.add(tree.guess(nodes, parent[:1], *guesses), parent, np.arange(2))),
    jax.jit(tree.send),
    jax.jit(tree.record),
)


def padded(values: Any, size: int, fill: int) -> np.ndarray:
    return np.asarray([*values, *[fill] * (size - len(values))], np.int32)


def chain(known: int, limit: int = 100, end_tokens: tuple[int, ...] = ()) -> Shared:
    """A root and its chain, all sent one tick after another, and one sibling each; the first `known` have choices."""
    prompt = np.zeros(SLOTS, np.int32)
    prompt[PROMPT - 1] = 9
    nodes = plant(CAPACITY, 2, np.int32(9), np.int32(PROMPT - 1))
    order, parent = [0], 0
    for token in CHAIN:
        guesses = np.asarray([token, token + 50], np.int32)
        log_probs = np.asarray([[-0.5, -1.5]], np.float32)
        nodes, index = add(nodes, np.full(2, parent, np.int32), guesses[None], log_probs)
        parent = int(index[0])
        order += index.tolist()
    slots = PROMPT - 1 + np.arange(len(order), dtype=np.int32)
    levels = [order[:1], *(order[i : i + 2] for i in range(1, len(order), 2))]
    nodes = nodes.replace(slot=nodes.slot.at[np.asarray(order)].set(slots))
    for tick, level in enumerate(levels, start=1):
        nodes = send(nodes, padded(level, WIDTH, CAPACITY), np.int32(tick))
    line = [order[0], *order[1::2]]
    choices = np.asarray([*CHAIN, CHAIN[-1] + 1], np.int32)
    nodes = record(nodes, padded(line[:known], len(line), CAPACITY), choices, -np.ones(len(line), np.float32))
    pipe = np.full((STAGES, WIDTH), CAPACITY, np.int32)
    for stage, level in enumerate(reversed(levels[-STAGES:])):
        pipe[stage, : len(level)] = level
    ends = np.asarray([*end_tokens, *[-1] * (3 - len(end_tokens))], np.int32)
    return Shared(
        tree=nodes,
        text=transcript.begin(jax.numpy.asarray(prompt), np.int32(PROMPT), np.int32(limit), ends),
        committed=np.arange(SLOTS) < PROMPT - 1,
        pipe=pipe,
        tick=np.int32(7),
        cost=np.float32(9.5),
        sent=np.int32(len(order)),
        unsound=np.zeros(CAPACITY, np.int32),
        spoiled=np.int32(0),
        sampling=Sampling().arrays(),
    )


def walked(shared: Shared) -> tuple[Any, list[int]]:
    """The state after a walk, on the host, and the tokens it committed."""
    after = jax.device_get(jax.jit(walk, static_argnums=0)(Schedule(width=1), jax.tree.map(jax.numpy.asarray, shared)))
    return after, after.text.token[PROMPT : int(after.text.length)].tolist()


def test_root_stays_while_its_choice_is_not_known() -> None:
    after, tokens = walked(chain(known=0))
    assert tokens == []
    assert after.tree.root == 0
    assert after.committed.sum() == PROMPT - 1


@pytest.mark.parametrize("known", [1, 2, 3, 4])
def test_root_walks_over_every_known_choice_in_one_tick(known: int) -> None:
    after, tokens = walked(chain(known))
    assert tokens == CHAIN[:known]
    assert after.text.tick[PROMPT : PROMPT + known].tolist() == [7] * known
    assert after.text.delay[PROMPT : PROMPT + known].tolist() == [1] * known
    assert after.tree.token[after.tree.root] == CHAIN[known - 1]
    # The chain below and its siblings' siblings go on; what does not descend from the root is gone.
    assert after.tree.alive.sum() == 1 + 2 * (len(CHAIN) - known)
    assert after.committed.sum() == PROMPT - 1 + known
    flying = after.pipe[after.pipe < CAPACITY]
    assert after.tree.alive[flying].all()


def test_a_choice_that_is_no_child_is_planted_and_empties_the_pipe() -> None:
    after, tokens = walked(chain(known=5))
    assert tokens == [*CHAIN, 14]
    assert after.text.delay[PROMPT : PROMPT + 5].tolist() == [1, 1, 1, 1, transcript.MISS]
    assert after.tree.alive.sum() == 1
    assert not after.tree.sent[after.tree.root]
    assert after.tree.position[after.tree.root] == PROMPT + 4
    assert (after.pipe == CAPACITY).all()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_walk_freezes_at_the_length_limit_in_its_middle(count: int) -> None:
    after, tokens = walked(chain(known=5, limit=PROMPT + count))
    assert tokens == [*CHAIN, 14][:count]
    assert after.text.done
    assert int(after.text.length) == PROMPT + count


@pytest.mark.parametrize("position", range(4))
def test_walk_freezes_at_any_of_the_end_tokens_in_its_middle(position: int) -> None:
    after, tokens = walked(chain(known=5, end_tokens=(99, CHAIN[position])))
    assert tokens == CHAIN[: position + 1]
    assert after.text.done


def test_a_frozen_answer_stays_as_it_is() -> None:
    once, _ = walked(chain(known=5, limit=PROMPT + 2))
    again, _ = walked(once)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True))
