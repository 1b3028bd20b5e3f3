"""The recording of an answer, told on the host: nodes with a life of their own, and what every rank did in each tick.

On the devices a place of the tree is used again and again. Here every node has a number that it keeps: from the tick in
which it was guessed, through the pipe, to that in which it became text or was pruned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipedec_jax.transcript import MISS

if TYPE_CHECKING:
    from pipedec_jax.recording.tape import Frame

Fate = Literal["text", "pruned", "open"]
"""Became a token of the answer, was dropped, or neither when the recording ended."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What ranks there are."""

    method: str
    stages: int
    """Of the target (N)."""
    width: int
    """Most rows of a batch (W)."""
    drafter: bool
    """Whether the drafter has a rank of its own, behind the stages."""
    exit: int = 0
    """The stage that drafts too, after its layers; 0 for none."""

    @property
    def ranks(self) -> list[str]:
        """Their names, in order; that of the stage that drafts too says so."""
        stages = [f"stage {stage}{', exit' if stage == self.exit else ''}" for stage in range(1, self.stages + 1)]
        return [*stages, *(["draft"] if self.drafter else [])]


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer's tokens, as `pipeline.progress.Progress` has them."""

    tokens: Sequence[int]
    ticks: Sequence[int]
    delays: Sequence[int]


@dataclasses.dataclass
class Node:
    """A guessed token, or the root of a new tree. Ticks are `None` for what has not happened."""

    number: int
    token: int
    text: str
    parent: int | None
    """Its parent's number; `None` for the first root and for one that followed a miss."""
    position: int
    """Of the token in the text."""
    log_prob: float
    """Of the path from the root of that time, as the drafter saw it."""
    born: int
    """The tick in which it became a node (for a root after a miss, that of the miss)."""
    sent: int | None = None
    """The tick in which it entered the pipe: it is at stage k in tick `sent + k - 1`."""
    chosen: int | None = None
    """The tick in which it left the last stage, so that the target's token after it was known."""
    choice: int | None = None
    """That token."""
    committed: int | None = None
    """The tick in which it became text; 0 for the prompt's last token."""
    pruned: int | None = None
    """The tick at whose end it was dropped."""

    @property
    def fate(self) -> Fate:
        """What became of it."""
        return "text" if self.committed is not None else "pruned" if self.pruned is not None else "open"


@dataclasses.dataclass(frozen=True)
class Commit:
    """A token of the answer in the tick in which it was committed."""

    index: int
    """In the answer."""
    node: int
    delay: int | None
    """Ticks between the sending of the token before it and its own; `None` for a miss, which was not in the pipe."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one stage has in a tick. A stage without a batch has a bubble."""

    sent: int
    """The tick in which the batch entered the pipe."""
    size: int
    """Rows it then had."""
    live: tuple[int, ...]
    """The nodes that are still alive, by number; the other rows are dead."""

    @property
    def dead(self) -> int:
        """Rows whose nodes were pruned since."""
        return self.size - len(self.live)


@dataclasses.dataclass(frozen=True)
class DraftStep:
    """A draft step, one of maybe several in a tick."""

    extended: tuple[int | None, ...]
    """The nodes that were extended, by number; `None` for one that the next step dropped again."""
    guesses: tuple[tuple[tuple[int, float], ...], ...]
    """For each of them, tokens and log-probabilities given the node."""


@dataclasses.dataclass(frozen=True)
class Tick:
    """One tick."""

    number: int
    """From 1 on, at the first root's entry into the pipe."""
    cost: float
    """What it cost (`EngineSettings.costs`): modeled."""
    stages: tuple[Batch | None, ...]
    """What each stage had."""
    drafts: tuple[DraftStep, ...]
    root: int
    """The root before the target's choices were followed."""
    tree: tuple[int, ...]
    """All nodes then, with this tick's guesses that were picked, by number."""
    committed: tuple[Commit, ...]
    new_root: int
    pruned: tuple[int, ...]
    """Nodes of `tree` that were dropped at the end of the tick."""

    @property
    def bubbles(self) -> int:
        """Stages without a batch."""
        return sum(batch is None for batch in self.stages)


@dataclasses.dataclass(frozen=True)
class Recording:
    """All ticks of an answer."""

    layout: Layout
    nodes: tuple[Node, ...]
    """By number."""
    ticks: tuple[Tick, ...]
    lag: int
    """Ticks from a token's sending to that of its guesses at the earliest."""

    @property
    def tokens(self) -> list[int]:
        """The answer's."""
        return [self.nodes[commit.node].token for tick in self.ticks for commit in tick.committed]

    def kind(self, commit: Commit) -> Literal["hit", "late hit", "miss"]:
        """How a token came."""
        if commit.delay is None:
            return "miss"
        return "late hit" if commit.delay > self.lag else "hit"

    def rows(self) -> dict[str, int]:
        """Rows of all stages and ticks by what they were: of later text, pruned later, open, dead; and stages idle."""
        counts = {"text": 0, "pruned": 0, "open": 0, "dead": 0, "bubbles": 0}
        for tick in self.ticks:
            counts["bubbles"] += tick.bubbles
            for batch in tick.stages:
                if batch is not None:
                    counts["dead"] += batch.dead
                    for number in batch.live:
                        counts[self.nodes[number].fate] += 1
        return counts


def read_history(
    frames: Sequence[Frame], layout: Layout, answer: Answer, text: Callable[[int], str] = str
) -> Recording:
    """Tell what frames hold.

    Args:
        frames: of all ticks, in order, their leaves NumPy arrays.
        layout: of the ranks.
        answer: what was committed in them.
        text: of a token.

    Raises:
        ValueError: when frames and answer contradict each other.
    """
    teller = _Teller(layout, text)
    commits: dict[int, list[int]] = {}
    for index, tick in enumerate(answer.ticks):
        commits.setdefault(tick, []).append(index)
    ticks, cost = [], 0.0
    for frame in frames:
        mine = [
            (index, answer.tokens[index], None if answer.delays[index] == MISS else answer.delays[index])
            for index in commits.get(int(frame.tick), [])
        ]
        ticks.append(teller.tell(frame, cost, mine))
        cost = float(frame.cost)
    return Recording(layout, tuple(teller.nodes), tuple(ticks), max(1, layout.exit))


class _Teller:
    """Follows the places of the tree from frame to frame."""

    def __init__(self, layout: Layout, text: Callable[[int], str]) -> None:
        self.layout = layout
        self.text = text
        self.nodes: list[Node] = []
        self.here: dict[int, Node] = {}
        """The node at each place of the tree."""
        self.sizes: dict[int, int] = {}
        """Rows of the batch that each tick sent."""

    def tell(self, frame: Frame, cost: float, commits: Sequence[tuple[int, int, int | None]]) -> Tick:
        """A tick, after all those before it."""
        number = int(frame.tick)
        capacity = len(frame.alive)
        self.read_tree(frame, number)
        living = tuple(sorted(node.number for node in self.here.values()))
        stages = self.read_pipe(frame, number, capacity)
        for place in frame.pipe[-1][frame.pipe[-1] < capacity].tolist():
            node = self.here[place]
            node.chosen, node.choice = number, int(frame.choice[place])
        drafts = tuple(self.read_draft(frame, step, capacity) for step in range(len(frame.frontier)))
        root = self.here[int(frame.root)].number
        committed = tuple(self.commit(frame, *commit) for commit in commits)
        new_root = self.here.get(int(frame.new_root))
        if new_root is None or set(self.here) != set(np.flatnonzero(frame.left).tolist()):
            raise ValueError(f"tick {number} does not fit the answer: its tree is another one than the tokens give")
        return Tick(
            number=number,
            cost=float(frame.cost) - cost,
            stages=stages,
            drafts=drafts,
            root=root,
            tree=living,
            committed=committed,
            new_root=new_root.number,
            pruned=tuple(one for one in living if self.nodes[one].pruned == number),
        )

    def read_tree(self, frame: Frame, number: int) -> None:
        """Find the nodes that are new in this tick, and those that left their place to them."""
        alive = np.flatnonzero(frame.alive)
        before, self.here = self.here, {}
        for place in alive[np.argsort(frame.position[alive], kind="stable")].tolist():
            parent = self.here.get(int(frame.parent[place]))
            node = before.get(place)
            same = node is not None and (node.token, node.position) == (frame.token[place], frame.position[place])
            if node is None or not same or (parent is not None and node.parent != parent.number):
                node = self.new(
                    token=int(frame.token[place]),
                    parent=parent.number if parent else None,
                    position=int(frame.position[place]),
                    log_prob=float(frame.log_prob[place]),
                    born=number,
                )
                if frame.parent[place] == len(frame.alive):  # only the first root is found in a tree
                    node.committed = 0
            if node.sent is None and frame.sent_tick[place]:
                node.sent = int(frame.sent_tick[place])
            self.here[place] = node
        self.drop(before.values(), number)

    def read_pipe(self, frame: Frame, number: int, capacity: int) -> tuple[Batch | None, ...]:
        """What each stage has."""
        self.sizes[number] = int(np.count_nonzero(frame.pipe[0] < capacity))
        stages: list[Batch | None] = []
        for stage, rows in enumerate(frame.pipe):
            size = self.sizes.get(number - stage, 0)
            live = tuple(self.here[place].number for place in rows[rows < capacity].tolist())
            stages.append(Batch(number - stage, size, live) if size else None)
        return tuple(stages)

    def read_draft(self, frame: Frame, step: int, capacity: int) -> DraftStep:
        """What a draft step extended, and by what."""
        extended: list[int | None] = []
        guesses = []
        for row, place in enumerate(frame.frontier[step].tolist()):
            if place == capacity:
                continue
            node = self.here.get(place)
            wanted = frame.frontier_token[step, row], frame.frontier_position[step, row]
            extended.append(node.number if node and (node.token, node.position) == wanted else None)
            pairs = zip(frame.guess_token[step, row].tolist(), frame.guess_log_prob[step, row].tolist(), strict=True)
            guesses.append(tuple((token, log_prob) for token, log_prob in pairs if log_prob > -np.inf))
        return DraftStep(tuple(extended), tuple(guesses))

    def commit(self, frame: Frame, index: int, token: int, delay: int | None) -> Commit:
        """Follow one of the target's choices, as `tick.walk` does."""
        tick = int(frame.tick)
        root = next(node for node in self.here.values() if node.committed is not None)
        children = [
            (node.sent is None, place)
            for place, node in self.here.items()
            if node.parent == root.number and node.token == token
        ]
        if children:
            place = min(children)[1]
            child = self.here[place]
            below = {child.number}
            for node in self.here.values():  # by their positions, as `read_tree` has found them
                if node.parent in below:
                    below.add(node.number)
            before, self.here = self.here, {at: node for at, node in self.here.items() if node.number in below}
            self.drop(before.values(), tick)
        else:
            before, self.here = self.here, {}
            self.drop(before.values(), tick)
            child = self.new(token=token, parent=None, position=root.position + 1, log_prob=0.0, born=tick)
            self.here = {int(frame.new_root): child}
        child.committed = tick
        return Commit(index, child.number, delay)

    def drop(self, nodes: Iterable[Node], number: int) -> None:
        """Prune those that are no longer in the tree."""
        kept = {node.number for node in self.here.values()}
        for node in nodes:
            if node.number not in kept and node.committed is None:
                node.pruned = number

    def new(self, *, token: int, parent: int | None, position: int, log_prob: float, born: int) -> Node:
        """A node with the next number."""
        node = Node(len(self.nodes), token, self.text(token), parent, position, log_prob, born)
        self.nodes.append(node)
        return node
