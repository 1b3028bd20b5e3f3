"""A timeline: ranks against ticks, with what every rank had in every tick, and how each token came."""

from __future__ import annotations

from typing import Any

from pipedec_jax.plots.style import COMMITS, DRAFTED, FAINT, INK, ROWS, pyplot, visible
from pipedec_jax.recording.history import Batch, Recording, Tick

CELL = 0.88
"""Part of a tick's width and of a rank's height that its cell takes."""
MOST_TICKS = 400
MOST_MARKS = 8
"""Tokens of a tick that get a mark."""
LABELLED = 64
"""Ticks up to which tokens are written out."""


def draw_timeline(recording: Recording, first: int = 1, last: int | None = None) -> Any:
    """The ticks from `first` to `last` (by default the recording's last) as a matplotlib figure.

    A cell is a rank in a tick. Its height is the batch's most rows; it is filled from below by the rows that are there.

    Raises:
        ValueError: for ticks that the recording does not have, or too many for one picture.
        ImportError: without matplotlib.
    """
    ticks = pick(recording, first, last)
    plt = pyplot()
    ranks = recording.layout.ranks
    labelled = len(ticks) <= LABELLED
    marks = min(MOST_MARKS, max(len(one.committed) for one in ticks))
    strip = 0.8 + 0.34 * marks + (1.9 if labelled else 0.0)
    figure, axes = plt.subplots(
        figsize=(max(7.5, 1.4 + 0.26 * len(ticks)), 0.46 * (len(ranks) + strip) + 1.3), layout="constrained"
    )
    for one in ticks:
        for rank, batch in enumerate(one.stages):
            _draw_batch(axes, recording, one, rank, batch)
        if recording.layout.drafter:
            _draw_drafting(axes, one, len(ranks) - 1, recording.layout.width)
        _draw_commits(axes, recording, one, labelled)
    axes.set_xlim(ticks[0].number - 0.6, ticks[-1].number + 0.6)
    axes.set_ylim(len(ranks) - 0.45, -0.55 - strip)
    axes.set_yticks([*range(len(ranks)), -1.0], [*ranks, "new tokens"])
    axes.tick_params(axis="y", length=0)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if len(ticks) / step <= 26)
    axes.set_xticks([one.number for one in ticks if one.number % step == 0])
    axes.set_xlabel("tick (counted, not time)")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_title(_title(recording), fontsize=11, loc="left", color=INK)
    _legend(figure, recording, ticks)
    return figure


def pick(recording: Recording, first: int, last: int | None) -> list[Tick]:
    """The ticks from `first` to `last`, both included.

    Raises:
        ValueError: when there are none, or too many.
    """
    ticks = [one for one in recording.ticks if first <= one.number and (last is None or one.number <= last)]
    if not ticks:
        there = f"1 to {len(recording.ticks)}" if recording.ticks else "none"
        raise ValueError(f"no ticks from {first} to {last or 'the last'}: the recording has {there}")
    if len(ticks) > MOST_TICKS:
        raise ValueError(f"{len(ticks)} ticks are too many for one picture: choose {MOST_TICKS} at most")
    return ticks


def _draw_batch(axes: Any, recording: Recording, one: Tick, rank: int, batch: Batch | None) -> None:
    from matplotlib.patches import Rectangle  # pyright: ignore[reportMissingImports]

    left, bottom = one.number - CELL / 2, rank + CELL / 2
    if batch is None:
        axes.add_patch(Rectangle((left, rank - CELL / 2), CELL, CELL, fill=False, ls=":", lw=0.8, ec=FAINT))
        return
    axes.add_patch(Rectangle((left, rank - CELL / 2), CELL, CELL, fc="white", ec="#BDBDBD", lw=0.6))
    fates = [recording.nodes[number].fate for number in batch.live]
    counts = {kind: fates.count(kind) for kind in ROWS if kind != "dead"} | {"dead": batch.dead}
    for kind, count in counts.items():
        height = CELL * count / recording.layout.width
        bottom -= height
        if count:
            axes.add_patch(Rectangle((left, bottom), CELL, height, fc=ROWS[kind][0], lw=0))


def _draw_drafting(axes: Any, one: Tick, rank: int, width: int) -> None:
    """The draft's steps side by side, each as high as it had rows."""
    from matplotlib.patches import Rectangle  # pyright: ignore[reportMissingImports]

    steps = len(one.drafts)
    working = any(draft.extended for draft in one.drafts)
    edge = (
        {"fc": "white", "ec": "#BDBDBD", "lw": 0.6} if working else {"fill": False, "ls": ":", "lw": 0.8, "ec": FAINT}
    )
    axes.add_patch(Rectangle((one.number - CELL / 2, rank - CELL / 2), CELL, CELL, **edge))
    for index, draft in enumerate(one.drafts):
        height = CELL * min(1, len(draft.extended) / width)
        left = one.number - CELL / 2 + index * CELL / steps
        axes.add_patch(Rectangle((left, rank + CELL / 2 - height), 0.9 * CELL / steps, height, fc=DRAFTED, lw=0))


def _draw_commits(axes: Any, recording: Recording, one: Tick, labelled: bool) -> None:
    """Marks above the tick, and the tokens from below upwards."""
    for row, commit in enumerate(one.committed[:MOST_MARKS]):
        colour, mark = COMMITS[recording.kind(commit)]
        axes.plot(one.number, -0.95 - 0.34 * row, mark, color=colour, ms=4.5, mew=0)
    if labelled and one.committed:
        text = "".join(recording.nodes[commit.node].text for commit in one.committed)
        top = -0.95 - 0.34 * min(len(one.committed), MOST_MARKS)
        axes.text(one.number, top, visible(text, 16), rotation=90, ha="center", va="bottom", fontsize=6.5, color=INK)


def _title(recording: Recording) -> str:
    layout = recording.layout
    kinds = [recording.kind(commit) for one in recording.ticks for commit in one.committed]
    return (
        f"{layout.method}, {layout.stages} stages, batches of at most {layout.width}: {len(kinds)} tokens in "
        f"{len(recording.ticks)} ticks"
    )


def _legend(figure: Any, recording: Recording, ticks: list[Tick]) -> None:
    from matplotlib.lines import Line2D  # pyright: ignore[reportMissingImports]
    from matplotlib.patches import Patch  # pyright: ignore[reportMissingImports]

    batches = [batch for one in ticks for batch in one.stages if batch is not None]
    seen = {recording.nodes[number].fate for batch in batches for number in batch.live}
    if any(batch.dead for batch in batches):
        seen.add("dead")
    handles: list[Any] = [Patch(fc=colour, label=name) for kind, (colour, name) in ROWS.items() if kind in seen]
    handles.append(Patch(fill=False, ls=":", ec=FAINT, label="bubble: nothing to do"))
    if recording.layout.drafter:
        handles.append(Patch(fc=DRAFTED, label="rows drafted"))
    kinds = {recording.kind(commit) for one in ticks for commit in one.committed}
    for kind, (colour, mark) in COMMITS.items():
        if kind in kinds:
            handles.append(Line2D([], [], color=colour, marker=mark, ls="", ms=5, label=kind))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
