"""The prediction tree in a few ticks: how it grows, where its nodes are in the pipe, and what the target prunes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from pipedec_jax.plots.style import COMMITS, FAINT, INK, pyplot, visible
from pipedec_jax.recording.history import Node, Recording, Tick

STATES = {
    "text": (COMMITS["hit"][0], "white", "becomes text in this tick (hit)"),
    "flying": ("#0072B2", "white", "in the pipe (number: its stage)"),
    "known": ("#004C7A", "white", "through the pipe, its next token known"),
    "waiting": ("white", INK, "not sent yet"),
    "pruned": ("#E3E3E3", "#777777", "pruned at the end of this tick"),
    "root": ("#FFF2CC", INK, "root: the text's last token"),
    "missed": (COMMITS["miss"][0], "white", "the target's token, not in the pipe: new root (miss)"),
}
"""Fill, ink and meaning of a node, by what it is at the end of a tick."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a node is drawn: levels below the root, and its line."""

    level: int
    line: float


def telling_ticks(recording: Recording) -> list[int]:
    """Up to three ticks worth a look: as the tree first fills the pipe, the hit that prunes most, and the next miss."""
    ticks = {one.number: one for one in recording.ticks}
    found = [min(len(ticks), max(1, recording.layout.stages - 1))]
    hits = [one for one in ticks.values() if any(commit.delay is not None for commit in one.committed)]
    if hits:
        found.append(max(hits, key=lambda one: len(one.pruned)).number)
    misses = [one.number for one in ticks.values() if any(commit.delay is None for commit in one.committed)]
    later = [number for number in misses if number > found[-1]] or misses[-1:]
    return sorted({*found, *later[:1]})


def draw_tree(recording: Recording, ticks: Sequence[int], most: int = 20) -> Any:
    """The tree at the end of each of these ticks as a matplotlib figure, a panel each.

    Args:
        recording: of an answer.
        ticks: by number.
        most: nodes of a panel; where there are more, the likeliest are shown, with what is above them.

    Raises:
        ValueError: for a tick that the recording does not have.
        ImportError: without matplotlib.
    """
    if most < 2:
        raise ValueError(f"a tree needs at least 2 nodes to be seen, not {most}")
    there = {one.number: one for one in recording.ticks}
    for number in ticks:
        if number not in there:
            raise ValueError(f"there is no tick {number}: the recording has 1 to {len(there)}")
    if not ticks:
        raise ValueError("give at least one tick")
    plt = pyplot()
    shown = [(there[number], chosen_nodes(recording, there[number], most)) for number in ticks]
    places = [layout(recording, one, nodes) for one, nodes in shown]
    levels = [max(place.level for place in panel.values()) + 1 for panel in places]
    lines = [max(place.line for place in panel.values()) + 2 for panel in places]
    figure, panels = plt.subplots(
        len(shown),
        1,
        figsize=(max(8.0, 1.1 * max(levels)), 0.24 * sum(lines) + 0.3 * len(shown) + 0.8),
        height_ratios=lines,
        squeeze=False,
        layout="constrained",
    )
    states: set[str] = set()
    for axes, (one, nodes), panel, height in zip(panels[:, 0], shown, places, lines, strict=True):
        states |= _draw_panel(axes, recording, one, nodes, panel, (max(levels), height))
    _legend(figure, states)
    return figure


def chosen_nodes(recording: Recording, one: Tick, most: int) -> list[Node]:
    """The nodes of a tick to be drawn, each after its parent: all, or what became text and the likeliest others."""
    tree = [recording.nodes[number] for number in one.tree]
    texts = {commit.node for commit in one.committed}
    likeliest = sorted(tree, key=lambda node: (node.number != one.root, node.number not in texts, -node.log_prob))
    # What stays and what goes in turn, so that both are seen.
    kinds = [[node for node in likeliest if (node.pruned == one.number) is gone] for gone in (False, True)]
    order = [node for pair in itertools.zip_longest(*kinds) for node in pair if node is not None]
    kept: set[int] = set()
    for node in order:
        path = {node.number}
        while node.number != one.root and node.parent is not None:
            node = recording.nodes[node.parent]
            path.add(node.number)
        if len(kept | path) <= most:
            kept |= path
    return sorted((node for node in tree if node.number in kept), key=lambda node: (node.position, node.number))


def layout(recording: Recording, one: Tick, nodes: Sequence[Node]) -> dict[int, Place]:
    """Where each node goes: parents beside their first child, likelier children above."""
    children: dict[int, list[Node]] = {}
    root = recording.nodes[one.root]
    for node in nodes:
        if node.number != one.root and node.parent is not None:
            children.setdefault(node.parent, []).append(node)
    places: dict[int, Place] = {}
    lines = 0

    def put(node: Node) -> float:
        nonlocal lines
        below = sorted(children.get(node.number, []), key=lambda child: -child.log_prob)
        found = [put(child) for child in below]
        if not found:
            found, lines = [lines], lines + 1
        places[node.number] = Place(node.position - root.position, found[0])
        return found[0]

    put(root)
    return places


def state(one: Tick, node: Node) -> str:
    """What a node is at the end of a tick."""
    for commit in one.committed:
        if commit.node == node.number:
            return "text" if commit.delay is not None else "missed"
    if node.number == one.root:
        return "root"
    if node.pruned == one.number:
        return "pruned"
    if node.sent is None or node.sent > one.number:
        return "waiting"
    return "known" if node.chosen is not None and node.chosen <= one.number else "flying"


def _draw_panel(
    axes: Any,
    recording: Recording,
    one: Tick,
    nodes: Sequence[Node],
    places: dict[int, Place],
    size: tuple[float, float],
) -> set[str]:
    states: set[str] = set()
    for node in nodes:
        place = places[node.number]
        if node.parent in places and node.number != one.root:
            above = places[node.parent]
            faint = node.pruned == one.number
            axes.plot(
                [above.level, above.level + 0.5, above.level + 0.5, place.level],
                [above.line, above.line, place.line, place.line],
                color="#CFCFCF" if faint else FAINT,
                lw=0.8,
                zorder=1,
            )
        states.add(_draw_node(axes, one, node, place))
    misses = [recording.nodes[commit.node] for commit in one.committed if commit.delay is None]
    for node in misses:
        if node.number not in places:
            level = node.position - recording.nodes[one.root].position
            bottom = max(place.line for place in places.values()) + 1
            _box(axes, Place(level, bottom), visible(node.text, 10), "missed")
            states.add("missed")
    axes.set_xlim(-0.4, size[0] - 0.4)
    axes.set_ylim(size[1] - 0.6, -0.6)
    axes.axis("off")
    hidden = len(one.tree) - len(nodes)
    title = f"end of tick {one.number}: {len(one.tree)} nodes, {len(one.pruned)} of them pruned"
    title += f" ({hidden} less likely ones not drawn)" if hidden else ""
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    return states


def _draw_node(axes: Any, one: Tick, node: Node, place: Place) -> str:
    found = state(one, node)
    label = visible(node.text, 10)
    if found == "flying":
        assert node.sent is not None
        label += f" {one.number - node.sent + 1}"
    _box(axes, place, label, found)
    return found


def _box(axes: Any, place: Place, label: str, found: str) -> None:
    fill, ink, _ = STATES[found]
    edge = FAINT if found in ("waiting", "root") else fill
    style = {"boxstyle": "round,pad=0.25", "fc": fill, "ec": edge, "lw": 0.8}
    if found == "waiting":
        style["ls"] = ":"
    axes.text(place.level, place.line, label, ha="center", va="center", fontsize=7, color=ink, bbox=style, zorder=2)


def _legend(figure: Any, states: Iterable[str]) -> None:
    from matplotlib.patches import Patch  # pyright: ignore[reportMissingImports]

    found = set(states)
    handles = [
        Patch(fc=fill, ec=FAINT if fill == "white" else fill, label=meaning)
        for name, (fill, _, meaning) in STATES.items()
        if name in found
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
