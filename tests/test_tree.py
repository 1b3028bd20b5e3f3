"""The array tree and its slots against a plain Python tree, under any sequence of operations."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pipedec_jax import cache, tree
from pipedec_jax.schedules.base import Schedule, take
from pipedec_jax.tree import NO_SLOT, PredictionTree
from tests.tree_model import PlainTree
from tests.tree_mutants import MUTANTS

TOKENS = 4
"""So few that duplicates and matches are frequent."""
CHILDREN = 3
"""Guesses for each node."""

OPERATIONS: dict[str, Callable[..., Any]] = {
    "plant": tree.plant,
    "guess": tree.guess,
    "add": tree.add,
    "score": Schedule(width=1).score,
    "take": lambda nodes, score, size: take(nodes, score, size, nodes.sent),
    "send": tree.send,
    "record": tree.record,
    "find_child": tree.find_child,
    "advance": tree.advance,
    "drop": tree.drop,
    "closed": tree.closed,
    "mark": tree.mark,
    "give_slots": cache.give_slots,
    "owners": cache.owners,
    "tree_rows": cache.tree_rows,
}
"""What is tested. Mutants replace one of them."""

STATIC = {"plant": (0, 1), "owners": (1,), "take": (2,)}
"""Arguments that are sizes."""


@functools.cache
def compiled(capacity: int, adds: int, width: int, slots: int, mutant: str = "") -> tuple[SimpleNamespace, Counter]:
    """The operations under jit for one set of sizes, and how often each has been traced."""
    traces: Counter = Counter()
    right: dict[str, Callable[..., Any]] = {}
    operations = OPERATIONS
    if mutant:  # the others are compiled once for all mutants
        right = vars(compiled(capacity, adds, width, slots)[0])
        operations = {mutant.split(":")[0]: MUTANTS[mutant]}

    def jitted(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def traced(*arguments: Any) -> Any:
            traces[name] += 1
            return operation(*arguments)

        return jax.jit(traced, static_argnums=STATIC.get(name, ()))

    return SimpleNamespace(**right | {name: jitted(name, operation) for name, operation in operations.items()}), traces


SEEDS = st.integers(0, 2**16)
"""Hypothesis chooses the operations; what each works on follows from a number of its own, which is much faster."""


def some(seed: int, items: list[Any], most: int) -> list[Any]:
    """A random selection, in random order."""
    random = np.random.default_rng(seed)
    count = min(int(random.integers(len(items) + 1)), most)
    return [items[i] for i in random.permutation(len(items))[:count]]


def ints(values: Any, size: int, fill: int) -> np.ndarray:
    """A padded int32 array."""
    return np.asarray([*values, *[fill] * (size - len(values))], np.int32)


def host(pytree: Any) -> Any:
    """The same pytree of NumPy arrays, which are much faster to look into one by one."""
    return jax.tree.map(np.asarray, pytree)


class TreeMachine(RuleBasedStateMachine):
    """Does everything to both trees and compares them after every operation."""

    sizes = (12, 6, 4, 20)
    """C, rows of an add, W, S."""
    mutant = ""

    def __init__(self) -> None:
        super().__init__()
        self.C, self.M, self.W, self.S = self.sizes
        self.op, self.traces = compiled(*self.sizes, mutant=self.mutant)
        self.tick = 0

    @initialize(token=st.integers(0, TOKENS - 1), position=st.integers(0, 5))
    def begin(self, token: int, position: int) -> None:
        self.plain = PlainTree(self.C, self.S, token, position)
        self.array: PredictionTree = self.op.plant(self.C, CHILDREN, np.int32(token), np.int32(position))

    def committed(self) -> np.ndarray:
        return np.isin(np.arange(self.S), list(self.plain.committed))

    @rule(token=st.integers(0, TOKENS - 1))
    def plant(self, token: int) -> None:
        self.array = self.op.plant(self.C, CHILDREN, np.int32(token), np.int32(self.plain.root.position + 1))
        self.plain.plant(token)

    @rule(seed=SEEDS)
    def add(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        guesses = list(self.plain.open_guesses())
        chosen = [guesses[i] for i in random.permutation(len(guesses))[: self.M]]
        # Sometimes any place: a dead or undrafted one, or none. No guess may be made a node without a chance.
        rows = [
            (int(random.choice([i for i in range(self.C + 1) if i not in drafted])), 0)
            if random.random() < 0.3
            else row
            for row in chosen
            for drafted in [[node.index for node in self.plain.root.subtree() if node.guesses]]
        ]
        parents, ranks = ([row[i] for row in rows] for i in (0, 1))
        self.array, index = self.op.add(self.array, ints(parents, self.M, self.C), ints(ranks, self.M, 0))
        assert index.tolist() == [*self.plain.add(rows), *[self.C] * (self.M - len(rows))]

    @rule(seed=SEEDS)
    def take(self, seed: int) -> None:
        """The best candidates by the base schedule's score, or by one under which children may come first."""
        scores, score = self.plain.candidates(), np.asarray(self.op.score(self.array))
        if seed % 2:
            score = np.where(score > -np.inf, np.random.default_rng(seed).integers(9, size=score.shape), score)
            scores = {(index, rank): float(score[index, 1 + rank]) for index, rank in scores}
        self.array, index = self.op.take(self.array, score.astype(np.float32), self.W)
        found = self.plain.take(scores, self.W)
        assert index.tolist() == [*found, *[self.C] * (self.W - len(found))]

    @rule(seed=SEEDS)
    def send(self, seed: int) -> None:
        """Send waiting nodes, none before its parent, as the tick does: a node without a slot stays behind."""
        self.tick += 1
        waiting = [node for node in self.plain.root.subtree() if not node.sent_tick]
        wanted = some(seed, waiting, len(waiting))
        chosen: list[int] = []
        for node in sorted(wanted, key=lambda node: node.position):
            if len(chosen) < self.W and (node.parent is None or node.parent.sent_tick or node.parent.index in chosen):
                chosen.append(node.index)
        self.give_slots_to(chosen)
        living = self.plain.living()
        batch = [index for index in chosen if living[index].slot is not None]
        self.array = self.op.send(self.array, ints(batch, self.W, self.C), np.int32(self.tick))
        self.plain.send(batch, self.tick)

    @rule(seed=SEEDS)
    def give_slots(self, seed: int) -> None:
        """As a draft step does, to nodes not sent yet, none before its parent."""
        nodes = some(seed, self.plain.root.subtree(), self.W)
        chosen: list[int] = []
        for node in sorted(nodes, key=lambda node: node.position):
            if node.parent is None or node.parent.slot is not None or node.parent.index in chosen:
                chosen.append(node.index)
        self.give_slots_to(chosen)

    def give_slots_to(self, nodes: list[int]) -> None:
        self.array, served = self.op.give_slots(self.array, self.committed(), ints(nodes, self.W, self.C))
        self.plain.give_slots(nodes)
        living = self.plain.living()
        expected = [i if living[i].slot is not None else self.C for i in nodes]
        assert served.tolist() == [*expected, *[self.C] * (self.W - len(nodes))]

    @rule(seed=SEEDS)
    def guess(self, seed: int) -> None:
        """As a draft step does."""
        random = np.random.default_rng(seed)
        undrafted = [node for node in self.plain.root.subtree() if node.guesses is None]
        nodes = [node.index for node in some(seed, undrafted, self.W)]
        tokens = random.integers(TOKENS, size=(self.W, CHILDREN))
        log_probs = random.integers(-40, 0, size=(self.W, CHILDREN)) / 8  # sums of eighths are exact in float32
        log_probs = np.where(random.random(log_probs.shape) < 0.2, -np.inf, log_probs)
        given = np.where(random.random(log_probs.shape) < 0.5, np.nan, -np.inf)
        given = np.where(log_probs == -np.inf, given, log_probs)  # no number is no guess
        self.array = self.op.guess(
            self.array, ints(nodes, self.W, self.C), tokens.astype(np.int32), given.astype(np.float32)
        )
        for row, index in enumerate(nodes):
            self.plain.guess(index, list(zip(tokens[row].tolist(), log_probs[row].tolist(), strict=True)))

    @rule(seed=SEEDS)
    def drop(self, seed: int) -> None:
        nodes = [node.index for node in some(seed, self.plain.root.subtree()[1:], self.W)]
        self.array = self.op.drop(self.array, np.isin(np.arange(self.C), nodes))
        self.plain.drop(nodes)

    @rule(seed=SEEDS)
    def closed(self, seed: int) -> None:
        nodes = [node.index for node in some(seed, self.plain.root.subtree(), self.W)]
        ready = np.random.default_rng(seed).random(self.C) < 0.6
        found = self.op.closed(self.array, ints(nodes, self.W, self.C), ready)
        living = self.plain.living()
        kept = [all(ready[above.index] for above in living[i].path()) for i in nodes]
        expected = [i if keep else self.C for i, keep in zip(nodes, kept, strict=True)]
        assert found.tolist() == [*expected, *[self.C] * (self.W - len(nodes))]

    @rule(seed=SEEDS)
    def record(self, seed: int) -> None:
        unknown = [node.index for node in self.plain.root.subtree() if node.sent_tick and node.choice is None]
        nodes = some(seed, unknown, self.W)
        choices = np.random.default_rng(seed).integers(TOKENS, size=len(nodes)).tolist()
        log_prob = np.linspace(-1, 0, self.W, dtype=np.float32)
        self.array = self.op.record(self.array, ints(nodes, self.W, self.C), ints(choices, self.W, 0), log_prob)
        recorded = np.asarray(self.array.choice_log_prob)
        for place, (index, choice) in enumerate(zip(nodes, choices, strict=True)):
            self.plain.record(index, choice)
            assert recorded[index] == log_prob[place]

    @rule(seed=SEEDS)
    def several(self, seed: int) -> None:
        """What a tick does, in one go: chance alone seldom gets far."""
        self.guess(seed)
        self.take(seed)
        self.send(seed)
        self.record(seed)

    @precondition(lambda self: self.plain.root.children)
    @rule(seed=SEEDS)
    def advance(self, seed: int) -> None:
        child = np.random.default_rng(seed).choice([node.index for node in self.plain.root.children])
        self.array = self.op.advance(self.array, np.int32(child))
        self.plain.advance(child)

    @invariant()
    def living_nodes_agree(self) -> None:
        array, living = host(self.array), self.plain.living()
        assert np.flatnonzero(array.alive).tolist() == sorted(living)
        assert int(array.root) == self.plain.root.index
        for index, node in living.items():
            assert array.token[index] == node.token
            assert array.parent[index] == (node.parent.index if node.parent else self.C)
            assert array.position[index] == node.position
            assert array.log_prob[index] == node.log_prob
            assert array.slot[index] == (NO_SLOT if node.slot is None else node.slot)
            assert array.sent_tick[index] == node.sent_tick
            assert array.known[index] == (node.choice is not None)
            assert array.drafted[index] == (node.guesses is not None)
            assert node.parent is None or array.child_index[index] == node.rank
            if node.choice is not None:
                assert array.choice[index] == node.choice
        waiting = [index for index, node in living.items() if not node.sent_tick]
        assert np.flatnonzero(array.waiting).tolist() == sorted(waiting)

    @invariant()
    def candidates_are_nodes_that_wait_and_guesses_that_are_no_nodes(self) -> None:
        score = np.asarray(self.op.score(self.array))
        found = {(int(i), int(k) - 1): float(score[i, k]) for i, k in np.argwhere(score > -np.inf)}
        assert found == self.plain.candidates()

    @invariant()
    def the_child_of_every_token_is_found(self) -> None:
        for token in range(TOKENS):
            assert int(self.op.find_child(self.array, np.int32(token))) == self.plain.find_child(token)

    @invariant()
    def ancestor_bits_are_the_paths_of_living_nodes_and_nothing_else(self) -> None:
        bits = {(i, node.index) for i, top in self.plain.living().items() for node in top.path()}
        assert {(int(i), int(j)) for i, j in np.argwhere(np.asarray(self.array.ancestor))} == bits

    @invariant()
    def a_sent_node_has_a_slot_of_its_own_and_so_have_its_ancestors(self) -> None:
        slots, living = np.asarray(self.array.slot), self.plain.living()
        assert all(slots[i] != NO_SLOT for i, node in living.items() if node.sent_tick)
        slot = {i: int(slots[i]) for i in living if slots[i] != NO_SLOT}
        assert all(0 <= s < self.S for s in slot.values())
        assert len(set(slot.values())) == len(slot)
        assert not set(slot.values()) & self.plain.committed
        assert all(above.index in slot for i in slot for above in self.plain.living()[i].path())
        owner = {s: i for i, s in slot.items()}
        owners = self.op.owners(self.array, self.S).tolist()
        assert owners == [owner.get(s, self.C) for s in range(self.S)]

    @invariant()
    def rows_see_the_text_and_their_own_path(self) -> None:
        nodes = [*sorted(self.plain.living()), self.C]
        for start in range(0, len(nodes), self.W):
            batch = nodes[start : start + self.W]
            rows = host(self.op.tree_rows(self.array, self.committed(), ints(batch, self.W, self.C)))
            for row, index in enumerate([*batch, *[self.C] * (self.W - len(batch))]):
                node = self.plain.living().get(index)
                path = {above.slot for above in node.path() if above.slot is not None} if node else set()
                assert set(np.flatnonzero(rows.mask[row]).tolist()) == self.plain.committed | path
                assert rows.slot[row] == (NO_SLOT if node is None or node.slot is None else node.slot)
                assert rows.position[row] == (node.position if node else 0)

    @invariant()
    def nothing_is_compiled_twice(self) -> None:
        assert all(count == 1 for count in self.traces.values()), self.traces


SIZES = {
    "roomy": (12, 6, 4, 20),
    "an add larger than the tree": (5, 8, 3, 9),
    "more rows sent than slots": (9, 4, 6, 4),
    "one place": (1, 2, 2, 3),
}


def run_machine(sizes: tuple[int, int, int, int], mutant: str = "", **settings: Any) -> None:
    """Run the machine over random sequences of operations."""
    machine = type("Machine", (TreeMachine,), {"sizes": sizes, "mutant": mutant})
    run_state_machine_as_test(machine, settings=hypothesis.settings(stateful_step_count=40, **settings))


@pytest.mark.parametrize("sizes", SIZES)
def test_array_tree_equals_plain_tree_after_any_operations(sizes: str) -> None:
    run_machine(SIZES[sizes], max_examples=50)


HARD_TO_CATCH = {
    *("closed:looks at parents alone", "drop:leaves what is below", "add:extends undrafted parents"),
    *("add:keeps a dead node's choice known", "add:keeps a dead node's drafted mark", "add:keeps a dead node's slot"),
    *("add:keeps a dead node's sent tick", "add:extends dead parents"),
}
"""Mutants that take so many sequences that only `pytest -m slow` tries them."""


@pytest.mark.parametrize(
    "mutant", [pytest.param(name, marks=[pytest.mark.slow] if name in HARD_TO_CATCH else []) for name in MUTANTS]
)
def test_a_broken_operation_is_caught(mutant: str) -> None:
    phases = (hypothesis.Phase.generate,)
    with pytest.raises((AssertionError, hypothesis.errors.FlakyFailure)):
        run_machine(SIZES["roomy"], mutant, max_examples=300, phases=phases, derandomize=True)
