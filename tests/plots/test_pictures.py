"""What is drawn of a recording: which cells and nodes, under which labels, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipedec_jax.plots import timeline, tree
from pipedec_jax.plots.rates import draw_over_rates
from pipedec_jax.plots.style import COMMITS, DEAD, TEXT, save, visible
from tests.recording.test_recording import CHEAP, METHODS, recorded

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")
pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def areas(axes, colour: str) -> float:
    """Summed heights of the rectangles of a colour, in cells."""
    wanted = matplotlib.colors.to_rgba(colour)
    found = [patch.get_height() for patch in axes.patches if patch.get_fill() and patch.get_facecolor() == wanted]
    return sum(found) / timeline.CELL


@pytest.mark.parametrize("name", METHODS)
def test_a_timeline_has_every_row_bubble_and_token_of_its_ticks(name: str) -> None:
    _, recording = recorded(name)
    figure = timeline.draw_timeline(recording)
    axes = figure.axes[0]
    rows, width = recording.rows(), recording.layout.width
    assert areas(axes, TEXT) * width == pytest.approx(rows["text"])
    assert areas(axes, DEAD) * width == pytest.approx(rows["dead"])
    bubbles = [patch for patch in axes.patches if patch.get_linestyle() == ":"]
    idle = sum(not any(draft.extended for draft in one.drafts) for one in recording.ticks if recording.layout.drafter)
    assert len(bubbles) == rows["bubbles"] + idle
    marks = [line for line in axes.lines if line.get_marker() in {mark for _, mark in COMMITS.values()}]
    assert len(marks) == len(recording.tokens)
    assert [label.get_text() for label in axes.get_yticklabels()] == [*recording.layout.ranks, "new tokens"]
    assert "not time" in axes.get_xlabel()
    assert recording.layout.method in axes.get_title(loc="left")


def test_ticks_that_are_not_there_are_refused() -> None:
    _, recording = recorded(CHEAP[0])
    with pytest.raises(ValueError, match="the recording has 1 to"):
        timeline.draw_timeline(recording, 1000)
    with pytest.raises(ValueError, match="there is no tick 0"):
        tree.draw_tree(recording, [0])
    with pytest.raises(ValueError, match="at least 2 nodes"):
        tree.draw_tree(recording, [1], most=1)


def test_a_tree_shows_each_node_once_under_its_parent_with_what_it_becomes() -> None:
    _, recording = recorded(CHEAP[0])
    for one in recording.ticks:
        nodes = tree.chosen_nodes(recording, one, 1000)
        assert {node.number for node in nodes} == set(one.tree)
        places = tree.layout(recording, one, nodes)
        assert len({(place.level, place.line) for place in places.values()}) == len(nodes)
        for node in nodes:
            if node.number != one.root:
                assert places[node.parent].level == places[node.number].level - 1
        states = {node.number: tree.state(one, node) for node in nodes}
        assert {number for number, found in states.items() if found == "pruned"} == set(one.pruned) - {one.root}
    ticks = tree.telling_ticks(recording)
    figure = tree.draw_tree(recording, ticks, most=6)
    assert len(figure.axes) == len(ticks) <= 3
    for axes, number in zip(figure.axes, ticks, strict=True):
        one = recording.ticks[number - 1]
        assert f"end of tick {number}: {len(one.tree)} nodes" in axes.get_title(loc="left")
        assert len(axes.texts) <= 6 + 1


def test_a_small_panel_keeps_the_root_and_what_is_above_each_node() -> None:
    _, recording = recorded(CHEAP[0])
    one = max(recording.ticks, key=lambda one: len(one.tree))
    nodes = tree.chosen_nodes(recording, one, 7)
    numbers = {node.number for node in nodes}
    assert 2 <= len(nodes) <= 7 < len(one.tree)
    assert one.root in numbers
    assert all(node.number == one.root or node.parent in numbers for node in nodes)


def test_tokens_are_drawn_on_one_line_whatever_they_hold(tmp_path: Path) -> None:
    assert visible("a b\n\t$x\x00") == "a·b↵→\\$x?"
    assert len(visible("x" * 50)) == 12
    _, recording = recorded(CHEAP[0])
    for name in ("one.svg", "two.svg"):
        save(timeline.draw_timeline(recording, 1, 5), tmp_path / "new" / name)
    one, two = (path.read_bytes() for path in sorted((tmp_path / "new").iterdir()))
    assert one == two
    assert b"<svg" in one


def test_panels_over_a_rate_have_their_own_lines_and_one_scale() -> None:
    drawn = {f"{n} stages": lambda panel, n=n: panel.plot([0, 1], [1, n], label=f"line {n}") for n in (2, 4)}
    figure = draw_over_rates(drawn, "hit rate", "ticks", width=3.0)
    first, second = figure.axes
    assert [panel.get_title() for panel in figure.axes] == ["2 stages", "4 stages"]
    assert [panel.lines[0].get_ydata()[1] for panel in figure.axes] == [2, 4]
    assert {(panel.get_xlabel(), panel.get_yscale()) for panel in figure.axes} == {("hit rate", "log")}
    assert (first.get_ylabel(), second.get_ylabel()) == ("ticks", "")
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["line 2"]
