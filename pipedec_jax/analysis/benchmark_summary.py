"""What a benchmark found: medians with their spread, as JSON, as Markdown tables and as plots.

Every figure carries what it is: *ticks* (counted by the engine; no clock is in it), *modeled* (from bytes of weights
read, or a calibration's seconds) or *measured* (wall clock). Every ratio names its baseline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

Row = Mapping[str, Any]
"""The figures of one question's answers, from `analysis.benchmark`."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """The figures of an answer, and of those that the same turn got from the baselines, where these were run."""

    own: Row
    pp: Row | None
    """PP on as many stages."""
    plain: Row | None
    """PP on one stage: plain decoding on one device."""


Kind = Literal["ticks", "modeled", "measured"]


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and spread of a figure over answers."""

    count: int
    median: float
    q1: float
    """A quarter of the answers are below it."""
    q3: float
    """A quarter of the answers are above it."""
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Of the values that there are; `None` without any."""
        found = [value for value in values if value is not None]
        if not found:
            return None
        least, q1, median, q3, most = np.quantile(found, (0, 0.25, 0.5, 0.75, 1)).tolist()
        return cls(len(found), median, q1, q3, least, most)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of an answer."""

    kind: Kind
    heading: str
    """Of its column, but for the kind."""
    value: Callable[[Turn], float | None]
    baseline: str | None = None
    """Of a ratio."""
    digits: int = 2


def _over(value: float | None, other: float | None) -> float | None:
    return value / other if value is not None and other else None


def _hit_rate(turn: Turn) -> float | None:
    hits = turn.own["hits"]
    return None if hits is None else _over(hits, hits + turn.own["misses"])


def _tpot_ms(turn: Turn) -> float | None:
    seconds = turn.own["measured_tpot_s"]
    return None if seconds is None else 1e3 * seconds


def _tpot_over(baseline: Row | None, own: Row) -> float | None:
    return None if baseline is None else _over(baseline["measured_tpot_s"], own["measured_tpot_s"])


PP = "pp on as many stages"
PLAIN = "pp on one stage, which is plain decoding on one device"

FIGURES = {
    "ticks_per_token": Figure("ticks", "ticks per token", lambda turn: turn.own["ticks"] / turn.own["new_tokens"]),
    "hit_rate": Figure("ticks", "hit rate", _hit_rate, digits=3),
    "tokens_per_refill": Figure(
        "ticks", "tokens per refill", lambda turn: turn.own["new_tokens"] / len(turn.own["accept_lengths"])
    ),
    "drafted_per_kept": Figure(
        "ticks", "draft tokens computed per token kept", lambda turn: _over(turn.own["guesses"], turn.own["hits"])
    ),
    "modeled_speedup_vs_pp": Figure(
        "modeled", "modeled time: pp / this", lambda turn: turn.own["modeled_speedup_vs_pp"], PP
    ),
    "ttft_ms": Figure("measured", "TTFT, ms", lambda turn: 1e3 * turn.own["measured_ttft_s"], digits=1),
    "tpot_ms": Figure("measured", "TPOT, ms", _tpot_ms),
    "tokens_per_s": Figure(
        "measured", "tokens/s", lambda turn: turn.own["new_tokens"] / turn.own["measured_wall_s"], digits=1
    ),
    "measured_speedup_vs_pp": Figure("measured", "TPOT: pp / this", lambda turn: _tpot_over(turn.pp, turn.own), PP),
    "measured_speedup_vs_plain": Figure(
        "measured", "TPOT: plain / this", lambda turn: _tpot_over(turn.plain, turn.own), PLAIN
    ),
}
"""By name in the summary, in the order of the tables' columns."""

AROUND = {
    "compile_s": "compiling, s (measured)",
    "cold_s": "start of a process to its first text, nothing kept, s (measured)",
    "warm_s": "the same, programs kept, s (measured)",
}
"""What a setting takes beside its answers, by name in the summary; columns of the measured table."""

TABLES: dict[str, tuple[Kind, ...]] = {
    "Ticks, and time modeled from them": ("ticks", "modeled"),
    "Wall clock of this machine, measured": ("measured",),
}

LEGEND = f"""\
Medians over answers, with quartiles in brackets. *ticks*: counted, and the same on any machine; *modeled*: from the
bytes of weights that the slowest rank reads in each tick, or from a calibration's seconds; *measured*: wall clock of
this machine, compiling apart. Baselines of ratios: pp is {PP}; plain is
{PLAIN}. Stages are the target's devices; devices counts the draft's as well.
Hit rate: tokens that were in the pipe when the target chose them. Tokens per refill: tokens from each filling of the
pipe. Draft tokens computed per token kept: guesses that the target's stages were sent, over hits. Compiling: at the
first prompt, all programs together. Start-up (--start-ups): in processes of their own."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """Who was run, as the tables name it."""

    method: str
    stages: int
    """Of the target."""
    devices: int
    """All that were in use, the draft's included."""
    width: int | None
    """Most guesses in a tick; `None` under PP."""
    models: tuple[str, ...] = ()
    """Their names, the target last; where they lie is said once for all contenders."""
    chosen: tuple[str, ...] = ()
    """What the decoder chose by itself, and why, as lines (`report`)."""


def summarize(
    contenders: Mapping[str, Contender],
    rows: Mapping[str, Sequence[Row]],
    warm_ups: Iterable[Mapping[str, Any]],
    start_ups: Iterable[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """All figures of all contenders, JSON-ready.

    Args:
        contenders: by name.
        rows: by the same names, their answers to the same questions.
        warm_ups: `decoder` (a name) and `measured_compile_s`.
        start_ups: `decoder` (a name), `measured_cold_s` of one start of a process and `measured_warm_s` of some more.
    """
    warm_ups = list(warm_ups)
    started = {row["decoder"]: row for row in start_ups}
    pipes = {contender.stages: rows[name] for name, contender in contenders.items() if contender.method == "pp"}
    found = []
    for name, contender in contenders.items():
        turns = list(_turns(rows[name], pipes.get(contender.stages), pipes.get(1)))
        figures = {key: _described(figure, Spread.of(map(figure.value, turns))) for key, figure in FIGURES.items()}
        compiled = Spread.of(row["measured_compile_s"] for row in warm_ups if row["decoder"] == name)
        figures["compile_s"] = {"kind": "measured", "baseline": None} | (
            dataclasses.asdict(compiled) if compiled else {}
        )
        own = started.get(name, {"measured_cold_s": None, "measured_warm_s": []})
        for key, values in (("cold_s", [own["measured_cold_s"]]), ("warm_s", own["measured_warm_s"])):
            spread = Spread.of(values)
            figures[key] = {"kind": "measured", "baseline": None} | (dataclasses.asdict(spread) if spread else {})
        found.append(
            {
                "name": name,
                **dataclasses.asdict(contender),
                "models": list(contender.models),
                "chosen": list(contender.chosen),
                "totals": _totals([turn.own for turn in turns]),
                "figures": figures,
                "categories": {
                    category: _totals(
                        [turn for row in rows[name] if row["category"] == category for turn in row["turns"]]
                    )
                    for category in _categories(rows[name])
                },
            }
        )
    first = next(iter(rows.values()))
    return {
        "questions": len(first),
        "answers": sum(len(row["turns"]) for row in first),
        "turns_left_out": {str(row["question_id"]): row["left_out"] for row in first if row["left_out"]},
        "contenders": found,
    }


def tables(summary: Mapping[str, Any]) -> str:
    """Markdown of a summary."""
    parts = []
    for title, kinds in TABLES.items():
        chosen = {name: figure for name, figure in FIGURES.items() if figure.kind in kinds}
        headings = ["method", "stages", "devices", "width"]
        if "ticks" in kinds:
            headings.append("ticks per token, all answers together (ticks)")
        headings += [f"{figure.heading} ({figure.kind})" for figure in chosen.values()]
        if "measured" in kinds:
            headings += AROUND.values()
        lines = []
        for row in summary["contenders"]:
            cells = [row["method"], str(row["stages"]), str(row["devices"]), str(row["width"] or "-")]
            if "ticks" in kinds:
                cells.append(f"{row['totals']['ticks_per_token']:.2f}")
            cells += [_cell(row["figures"][name], figure.digits) for name, figure in chosen.items()]
            if "measured" in kinds:
                cells += [_cell(row["figures"][name], 1) for name in AROUND]
            lines.append(cells)
        parts.append(f"### {title}\n\n{_markdown(headings, lines)}")
    categories = list(summary["contenders"][0]["categories"])
    if len(categories) > 1:
        lines = [
            [category, str(summary["contenders"][0]["categories"][category]["answers"])]
            + [f"{row['categories'][category]['ticks_per_token']:.2f}" for row in summary["contenders"]]
            for category in categories
        ]
        headings = ["category", "answers", *(row["name"] for row in summary["contenders"])]
        parts.append(f"### Ticks per token by category (ticks)\n\n{_markdown(headings, lines)}")
    return "\n\n".join([*parts, LEGEND]) + "\n"


def plot(summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw bars of medians with quartiles: ticks per token, and measured TPOT.

    Returns:
        The files, SVG.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure as Picture  # pyright: ignore[reportMissingImports]

    written = []
    for name, label in (("ticks_per_token", "ticks per token (ticks)"), ("tpot_ms", "TPOT, ms (measured)")):
        shown = [row for row in summary["contenders"] if "median" in row["figures"][name]]
        if not shown:
            continue
        picture = Picture(figsize=(7, 1 + 0.35 * len(shown)), layout="constrained")
        axes = picture.subplots()
        medians = np.array([row["figures"][name]["median"] for row in shown])
        around = np.array([[row["figures"][name][end] for row in shown] for end in ("q1", "q3")])
        axes.barh([row["name"] for row in shown], medians, xerr=np.abs(around - medians), capsize=3, color="tab:blue")
        axes.invert_yaxis()
        axes.set_xlabel(f"{label}, median and quartiles of {summary['answers']} answers")
        axes.grid(axis="x", alpha=0.3)
        path = folder / f"{name}.svg"
        picture.savefig(path, metadata={"Date": None})
        written.append(path)
    return written


def _turns(rows: Sequence[Row], pp: Sequence[Row] | None, plain: Sequence[Row] | None) -> Iterable[Turn]:
    """Every turn's figures beside those of the same turn under the baselines."""
    for index, row in enumerate(rows):
        for count, turn in enumerate(row["turns"]):
            yield Turn(turn, *(other[index]["turns"][count] if other is not None else None for other in (pp, plain)))


def _described(figure: Figure, spread: Spread | None) -> dict[str, Any]:
    return {"kind": figure.kind, "baseline": figure.baseline} | (dataclasses.asdict(spread) if spread else {})


def _totals(turns: Sequence[Row]) -> dict[str, Any]:
    """Sums over answers, all in or of ticks."""
    sums: dict[str, int | None] = {}
    for name in ("prompt_tokens", "new_tokens", "ticks", "hits", "misses", "guesses"):
        values = [turn[name] for turn in turns]
        sums[name] = None if None in values else sum(values)
    return {
        "kind": "ticks",
        "answers": len(turns),
        **sums,
        "refills": sum(len(turn["accept_lengths"]) for turn in turns),
        "ticks_per_token": sum(turn["ticks"] for turn in turns) / sum(turn["new_tokens"] for turn in turns),
    }


def _categories(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["category"] for row in rows))


def _cell(figure: Mapping[str, Any], digits: int) -> str:
    if "median" not in figure:
        return "-"
    median, q1, q3 = (f"{figure[name]:.{digits}f}" for name in ("median", "q1", "q3"))
    return median if figure["count"] == 1 else f"{median} [{q1}, {q3}]"


def _markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
