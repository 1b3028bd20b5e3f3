"""The prediction tree as plain Python objects, to hold the array tree against. Nothing of the package is used here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(eq=False)
class Node:
    """One guessed token. `index` is the place it has in the array tree."""

    index: int
    token: int
    position: int
    parent: Node | None = None
    log_prob: float = 0.0
    """Of the path from the root to this node."""
    children: list[Node] = dataclasses.field(default_factory=list)
    rank: int = 0
    guesses: list[tuple[int, float]] | None = None
    """Tokens and log-probabilities given this node, once drafted."""
    slot: int | None = None
    sent_tick: int = 0
    choice: int | None = None

    def path(self) -> list[Node]:
        """This node and all above it."""
        return [self, *(self.parent.path() if self.parent else [])]

    def subtree(self) -> list[Node]:
        """This node and all below it."""
        return [self, *(node for child in self.children for node in child.subtree())]


class PlainTree:
    """A tree of `Node` with the operations of `pipedec_jax.tree`, and the cache slots of `pipedec_jax.cache`."""

    def __init__(self, capacity: int, slots: int, token: int, position: int) -> None:
        self.capacity, self.slots = capacity, slots
        self.committed: set[int] = set()
        self.root = Node(index=0, token=token, position=position)

    def living(self) -> dict[int, Node]:
        """All nodes by index."""
        return {node.index: node for node in self.root.subtree()}

    def commit_root(self) -> None:
        """The root's token is final: its slot holds text from now on."""
        if self.root.slot is not None:
            self.committed.add(self.root.slot)

    def plant(self, token: int) -> None:
        """Drop everything: the token after the root's becomes a new root."""
        self.commit_root()
        self.root = Node(index=0, token=token, position=self.root.position + 1)

    def add(self, rows: Iterable[tuple[int, int]]) -> list[int]:
        """Make nodes of guesses `(parent's index, rank)`; their indices, `capacity` for none."""
        before = self.living()
        free = [index for index in range(self.capacity) if index not in before]
        indices = []
        for parent_index, rank in rows:
            parent = before.get(parent_index)
            if parent is None or parent.guesses is None or not free:
                indices.append(self.capacity)
                continue
            token, log_prob = parent.guesses[rank]
            child = Node(free.pop(0), token, parent.position + 1, parent, parent.log_prob + log_prob, rank=rank)
            parent.children.append(child)
            indices.append(child.index)
        return indices

    def candidates(self) -> dict[tuple[int, int], float]:
        """Path log-probability of the nodes that wait, with rank -1, and of the guesses that are no nodes."""
        waiting = {(node.index, -1): node.log_prob for node in self.root.subtree() if not node.sent_tick}
        if not self.root.sent_tick:
            waiting[self.root.index, -1] = float("inf")
        return waiting | self.open_guesses()

    def take(self, scores: dict[tuple[int, int], float], size: int) -> list[int]:
        """The best candidates as nodes, none without its parent."""
        chosen = sorted(scores, key=lambda candidate: (-scores[candidate], candidate))[:size]
        ready = {node.index for node in self.root.subtree() if node.sent_tick}
        ready |= {index for index, rank in chosen if rank < 0}
        living = self.living()
        whole = [all(above.index in ready for above in living[index].path()) for index, _ in chosen]
        rows = [
            (i if keep and rank >= 0 else self.capacity, rank) for keep, (i, rank) in zip(whole, chosen, strict=True)
        ]
        new = self.add(rows)
        return [
            new[row] if rank >= 0 else index if whole[row] else self.capacity
            for row, (index, rank) in enumerate(chosen)
        ]

    def free_slots(self) -> list[int]:
        """Slots that hold neither text nor a node, in order."""
        taken = self.committed | {node.slot for node in self.root.subtree() if node.slot is not None}
        return [slot for slot in range(self.slots) if slot not in taken]

    def give_slots(self, indices: Sequence[int]) -> None:
        """Give slots to the nodes that have none, in order, while there are any."""
        living = self.living()
        wanting = [living[index] for index in indices if living[index].slot is None]
        for node, slot in zip(wanting, self.free_slots(), strict=False):
            node.slot = slot

    def send(self, indices: Sequence[int], tick: int) -> None:
        """Mark nodes as sent."""
        for index in indices:
            self.living()[index].sent_tick = tick

    def guess(self, index: int, guesses: list[tuple[int, float]]) -> None:
        """What a drafter guesses to follow a node."""
        self.living()[index].guesses = guesses

    def open_guesses(self) -> dict[tuple[int, int], float]:
        """Path log-probability of every guess that is not a node, by the index of its parent and its rank."""
        return {
            (node.index, rank): node.log_prob + log_prob
            for node in self.root.subtree()
            for rank, (_, log_prob) in enumerate(node.guesses or ())
            if rank not in [child.rank for child in node.children] and log_prob > float("-inf")
        }

    def drop(self, indices: Sequence[int]) -> None:
        """Remove nodes and all below them."""
        for node in self.root.subtree():
            node.children = [child for child in node.children if child.index not in indices]

    def record(self, index: int, choice: int) -> None:
        """The target's next token after a node."""
        self.living()[index].choice = choice

    def find_child(self, token: int) -> int:
        """The root's child with this token: the first that was sent, else the first; `capacity` for none."""
        found = [child for child in self.root.children if child.token == token]
        sent = [child for child in found if child.sent_tick]
        return min((child.index for child in sent or found), default=self.capacity)

    def advance(self, index: int) -> None:
        """Make a child of the root the root; what does not descend from it is gone."""
        self.commit_root()
        self.root = self.living()[index]
        self.root.parent = None
        base = self.root.log_prob
        for node in self.root.subtree():
            node.log_prob -= base
