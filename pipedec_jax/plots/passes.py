"""A hierarchy's timeline: models against steps, with the tokens that each gained and lost, and what the target gave."""

from __future__ import annotations

from typing import Any

from pipedec_jax.plots.perfetto import TICK_US, event, named
from pipedec_jax.plots.style import COMMITS, FAINT, INK, TEXT, pyplot, visible
from pipedec_jax.recording.passes import PassRecording, Step

CELL = 0.88
MOST_STEPS = 400
LABELLED = 64
"""Steps up to which the target's tokens are written out."""
CLOCKS = {
    "tick": "tick (counted, not time)",
    "turn": "turn: the draft's passes, then the target's (counted, not time)",
    "step": "step of each model at its own pace: those of different models have no common clock",
}


def draw_passes(recording: PassRecording, first: int = 1, last: int | None = None) -> Any:
    """The steps from `first` to `last` (by default the last) as a matplotlib figure.

    A cell is a step of a model. Its left bar is the tokens that it gained, its right one those it lost by a rollback.

    Raises:
        ValueError: for steps that the recording does not have, or too many for one picture.
        ImportError: without matplotlib.
    """
    longest = recording.last if recording.clock != "step" else max(map(len, recording.steps))
    last = longest if last is None else min(last, longest)
    if not 1 <= first <= last:
        raise ValueError(
            f"no steps from {first} to {last}: the recording has {f'1 to {longest}' if longest else 'none'}"
        )
    if last - first >= MOST_STEPS:
        raise ValueError(f"{last - first + 1} steps are too many for one picture: choose {MOST_STEPS} at most")
    plt = pyplot()
    shown = [[step for step in steps if first <= step.number <= last] for steps in recording.steps]
    most = max(1, *(max(step.gained, step.undone) for steps in shown for step in steps))
    count = last - first + 1
    strip = 1.9 if count <= LABELLED else 0.2
    figure, axes = plt.subplots(
        figsize=(max(7.5, 1.4 + 0.26 * count), 0.5 * (len(shown) + strip) + 1.3), layout="constrained"
    )
    names = list(reversed(recording.names))  # the target on top, beside its tokens
    for line, steps in enumerate(reversed(shown)):
        for step in steps:
            _draw_step(axes, step, line, most, target=line == 0)
            if line == 0 and count <= LABELLED and step.gained:
                text = visible("".join(recording.new_tokens(step.number)), 16)
                axes.text(step.number, -0.62, text, rotation=90, ha="center", va="bottom", fontsize=6.5, color=INK)
    axes.set_xlim(first - 0.6, last + 0.6)
    axes.set_ylim(len(names) - 0.45, -0.55 - strip)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    space = next(space for space in (1, 2, 5, 10, 20, 50, 100) if count / space <= 26)
    axes.set_xticks([number for number in range(first, last + 1) if number % space == 0])
    axes.set_xlabel(CLOCKS[recording.clock])
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    form = f" ({recording.form})" if recording.method == "pipespec" else ""
    title = f"{recording.method}{form}: {len(recording.tokens)} tokens in {recording.last} {recording.clock}s"
    axes.set_title(title + ("" if recording.clock != "step" else " of the target"), fontsize=11, loc="left", color=INK)
    _legend(figure, most)
    return figure


def pass_events(recording: PassRecording) -> dict[str, Any]:
    """The same for Perfetto (see `perfetto.trace_events`); a step is a millisecond on the axis, and is no time."""
    basis = f"{recording.clock}s, 1 ms is 1 {recording.clock}; not time"
    events = [named("process_name", f"{recording.method} ({basis})", 0)]
    for track, (name, steps) in enumerate(zip(recording.names, recording.steps, strict=True)):
        events.append(named("thread_name", name, track))
        for step in steps:
            start = TICK_US * (step.number - 1)
            args: dict[str, Any] = {
                "gained": step.gained,
                "undone": step.undone,
                "holds": step.length,
                "passes": step.passes,
            }
            if track + 1 == len(recording.names):
                args["tokens"] = list(recording.new_tokens(step.number))
            lost = f", -{step.undone}" if step.rolled_back else ""
            label = f"{step.passes} passes: +{step.gained}{lost}" if step.passes else "idle"
            events.append(event("X", label, start, track, dur=TICK_US, args=args))
            if step.rolled_back:
                events.append(event("i", "rollback", start, track, s="t", args={"undone": step.undone}))
    other = {"time": basis, "method": recording.method, "tokens": len(recording.tokens)}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}


def _draw_step(axes: Any, step: Step, line: int, most: int, target: bool) -> None:
    from matplotlib.patches import Rectangle  # pyright: ignore[reportMissingImports]

    left, bottom = step.number - CELL / 2, line + CELL / 2
    idle = not step.passes
    edge = {"ls": ":", "lw": 0.8, "ec": FAINT} if idle else {"lw": 0.6, "ec": "#BDBDBD"}
    axes.add_patch(Rectangle((left, line - CELL / 2), CELL, CELL, fc="white", **edge))
    bars = ((step.gained, COMMITS["hit"][0] if target else TEXT), (step.undone, COMMITS["miss"][0]))
    for side, (count, colour) in enumerate(bars):
        height = CELL * count / most
        if count:
            place = (left + side * CELL / 2, bottom - height)
            axes.add_patch(Rectangle(place, CELL / 2, height, fc=colour, lw=0))


def _legend(figure: Any, most: int) -> None:
    from matplotlib.patches import Patch  # pyright: ignore[reportMissingImports]

    handles = [
        Patch(fc=COMMITS["hit"][0], label="tokens of the answer"),
        Patch(fc=TEXT, label="tokens written, or taken over from above"),
        Patch(fc=COMMITS["miss"][0], label="tokens lost: rolled back"),
        Patch(fc="white", ec=FAINT, ls=":", label="no pass made"),
        Patch(fc="none", ec="none", label=f"full height: {most} tokens"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
