"""Hit curves: ticks per token of methods by stages and width, read from a file, and what lies between its points.

A file holds rows as `scripts/compare_schedules.py --out` and `scripts/compare_exits.py --out` write them. Nothing in it
depends on a machine; all of it depends on the models, the text and the sampling.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipedec_jax.checks import check_count
from pipedec_jax.pipeline.settings import METHODS

DRAFTED = ("stpp", "pipedec", "best-first")
"""Methods of a curve that draft with a model on a rank of its own."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a line of the curve holds for, at any number of stages."""

    method: str
    drafter: str
    width: int
    """Most nodes of a batch, of STPP of a level (W)."""
    children: int
    draft_steps: int
    """Draft steps in a tick (R); of STPP, levels of its tree."""


@dataclasses.dataclass(frozen=True)
class HitCurve:
    """What a file says."""

    lines: Mapping[Setting, Mapping[int, float]]
    """Of the methods with a draft model: ticks per token by stages, stages rising."""
    exits: Mapping[float, float]
    """Of PPSD's chain: the share of guesses that the target accepts, by the exit's share of its layers."""
    about: str = ""
    """Where it comes from, in a line."""


def read_hit_curve(values: Mapping[str, Any]) -> HitCurve:
    """Take a curve from a file's content.

    Rows of other methods, of trees at an exit and those without a draft model are passed over.

    Raises:
        ValueError: when there are no rows, a row lacks something, or a value is impossible.
    """
    rows = values.get("rows")
    if not isinstance(rows, list) or not rows:
        raise ValueError('a hit curve needs a list of "rows", as compare_schedules.py --out writes them')
    lines: dict[Setting, dict[int, float]] = {}
    exits: dict[float, float] = {}
    for number, row in enumerate(rows, 1):
        try:
            _read_row(row, lines, exits)
        except (ValueError, TypeError, KeyError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"row {number} of the hit curve: {what}") from None
    about = values.get("about", "")
    return HitCurve(
        lines={setting: dict(sorted(points.items())) for setting, points in lines.items()},
        exits=dict(sorted(exits.items())),
        about=str(about[0] if isinstance(about, list) and about else about or ""),
    )


def _read_row(row: Any, lines: dict[Setting, dict[int, float]], exits: dict[float, float]) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"it must be an object, not {row!r}")
    method, stages, width = row["method"], _count(row, "stages"), _count(row, "width")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    rate, ticks = _number(row, "hit_rate"), _number(row, "ticks_per_token")
    if not 0 <= rate <= 1 or ticks <= 0:
        raise ValueError(f"need a hit rate from 0 to 1 and ticks per token over 0, not {rate!r} and {ticks!r}")
    exit_layer = row.get("exit_layer")
    if method == "ppsd" and width == 1:
        layers = sum(row["layers_by_stage"])
        if not 0 < _count(row, "exit_layer") < layers:
            raise ValueError(f"exit_layer must lie inside the {layers} layers, not {exit_layer!r}")
        exits[row["exit_layer"] / layers] = rate
    elif method in DRAFTED and exit_layer is None and row.get("drafter", "model") in ("model", "both"):
        steps, children = _count(row, "draft_steps"), _count(row, "children")
        setting = Setting(method, row.get("drafter", "model"), width, children, steps)
        lines.setdefault(setting, {})[stages] = ticks


def _count(row: Mapping[str, Any], name: str) -> int:
    check_count(name, row[name])
    return row[name]


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a number, not {value!r}")
    return float(value)


def ticks_at(setting: Setting, points: Mapping[int, float], stages: int) -> float | None:
    """Ticks per token at a number of stages; `None` where the points do not say.

    At a hit rate that stays the same, `h + (1 - h) n` is a straight line over the stages n, so points are joined by
    straight lines, the last of which goes on (never down; it takes two points). With one stage nothing is in flight and
    every token takes a tick: there the first line begins. A static tree gives so many tokens in a round of n + 1 ticks;
    it is these tokens that lie on straight lines, and they stay as they are before the first point and after the last.

    Args:
        setting: what the points hold for.
        points: ticks per token by stages, stages rising.
        stages: of the target (n), at least 1.
    """
    least, most = min(points), max(points)
    if setting.method == "stpp":
        tokens = {n: (n + 1) / ticks for n, ticks in points.items()}
        return (stages + 1) / _between(tokens, min(max(stages, least), most))
    if stages <= most:
        return _between({1: 1.0, **points}, stages)
    if len(points) == 1:
        return None
    before = sorted(points)[-2]
    slope = (points[most] - points[before]) / (most - before)
    return points[most] + max(0.0, slope) * (stages - most)


def beyond(setting: Setting, points: Mapping[int, float], stages: int) -> bool:
    """Whether the line has to be continued over its last point."""
    return setting.method != "stpp" and stages > max(points)


def lines_at(curve: HitCurve, stages: int) -> list[tuple[Setting, float, bool]]:
    """Settings with their ticks per token at a number of stages, and whether their line was continued for it.

    Lines that end before it are left out where another of the same method and drafter does not.
    """
    reach = {(x.method, x.drafter) for x, points in curve.lines.items() if not beyond(x, points, stages)}
    found = []
    for setting, points in curve.lines.items():
        over = beyond(setting, points, stages)
        ticks = ticks_at(setting, points, stages)
        if ticks is not None and not (over and (setting.method, setting.drafter) in reach):
            found.append((setting, ticks, over))
    return found


def _between(points: Mapping[int, float], place: int) -> float:
    """The value at `place`, from the first point to the last, on straight lines through the points."""
    return float(np.interp(place, list(points), list(points.values())))
