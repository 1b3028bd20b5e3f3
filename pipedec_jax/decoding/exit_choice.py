"""Which exit head drafts: the one that was asked for, or of those stored the one that is predicted to be quickest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from pipedec_jax.drafters.base import Drafter
from pipedec_jax.exit_store import find_exit_head, fitting_heads, stored_agreement, stored_exit_heads
from pipedec_jax.loading import Model
from pipedec_jax.model.exit_head import ExitHead, ExitHeadConfig
from pipedec_jax.modeled.closed_forms import eesd_ticks_per_token, ppsd_ticks_per_token
from pipedec_jax.modeled.cost import byte_costs, layer_bytes, split_over
from pipedec_jax.modeled.exit_cost import eesd_tick_costs, exit_tick_costs
from pipedec_jax.pipeline.fit import check_places
from pipedec_jax.pipeline.methods import make_split
from pipedec_jax.pipeline.settings import EXIT_ONLY, EngineSettings
from pipedec_jax.pipeline.split import LIKELY_RATE, StageSplit


@dataclasses.dataclass(frozen=True)
class ExitForecast:
    """What drafting with one stored head would take, *predicted*."""

    head: ExitHeadConfig
    split: StageSplit
    rate: float
    """Share of guesses that are accepted: the agreement recorded with the head, else `LIKELY_RATE`."""
    recorded: bool
    """Whether that was recorded."""
    ticks: float
    """Ticks per token, by the closed form of the method."""
    layers: float
    """Work per token in layers of the target, a tick lasting as long as the longest stage with the exit head, and a
    rank's slices of both vocabularies."""

    def __str__(self) -> str:
        known = "recorded" if self.recorded else "not recorded, taken for"
        return (
            f"{self.head.name}: {self.layers:.1f} layers' work and {self.ticks:.2f} ticks a token, predicted; "
            f"agreement {known} {self.rate:.1%}"
        )


def pick_exit(
    target: Model,
    settings_at: Callable[..., EngineSettings],
    method: str,
    exit_layer: int | None,
    head: ExitHead | str | None,
    drafter: Drafter | str,
) -> tuple[EngineSettings, ExitHeadConfig | None, tuple[ExitForecast, ...]]:
    """The settings with their exit, its head, and where that was left open, what was predicted, the quickest first.

    Args:
        target: the target.
        settings_at: makes the settings, given `exit_layer`.
        method: of the settings.
        exit_layer: as given to `Decoder`.
        head: as given to `Decoder`.
        drafter: as given to `Decoder`; beside one of one's own there is no head.

    Raises:
        ValueError: for settings or a head that cannot be.
        FileNotFoundError: when there is no such head.
    """
    chosen: tuple[ExitForecast, ...] = ()
    if exit_layer is None and method in EXIT_ONLY and isinstance(head, ExitHead):
        exit_layer = head.config.exit_layer
    elif exit_layer is None and method in EXIT_ONLY and isinstance(drafter, str):
        chosen = forecast_exits(target, settings_at, method, head if isinstance(head, str) else None)
        exit_layer, head = chosen[0].head.exit_layer, chosen[0].head.name
    settings = settings_at(exit_layer=exit_layer)
    if head is not None and exit_layer is None:
        raise ValueError("exit_head is for an exit: give exit_layer too, or leave it out")
    if head is not None and not isinstance(drafter, str):
        raise ValueError(f"exit_head is not used beside a drafter of your own ({type(drafter).__name__}): leave it out")
    if isinstance(head, ExitHead):
        return settings, head.config, chosen
    if settings.exit_layer is None or not isinstance(drafter, str):
        return settings, None, chosen
    return settings, find_exit_head(target, settings.exit_layer, head), chosen


def forecast_exits(
    target: Model, settings_at: Callable[..., EngineSettings], method: str, head: str | None = None
) -> tuple[ExitForecast, ...]:
    """What each stored head that fits is predicted to take, the quickest first; reads no weight.

    Heads whose agreement was recorded come before others. Parts are charged the weights they read, as where the stages
    of an exit path are chosen, with a calibration too: that knows one head alone.

    Args:
        target: the target.
        settings_at: makes the settings, given `exit_layer`.
        method: `ppsd` or `eesd`.
        head: how the heads' names begin, with or without the exit layer.

    Raises:
        ValueError: for settings that cannot be, or when no stored head fits so many stages.
        FileNotFoundError: when none is stored, or none of that name.
    """
    where, stored = target.name, stored_exit_heads(target)
    if head == "target":
        raise ValueError("the untrained head fits every exit: give exit_layer (--exit-layer) with exit_head 'target'")
    other = (
        f"train one with scripts/train_exit_head.py --target {where} --exit-layer E, or use the untrained one "
        "(--exit-head target --exit-layer E)"
    )
    if not stored:
        raise FileNotFoundError(
            f"method {method!r} drafts at an exit of the target: give exit_layer (--exit-layer), or have heads stored "
            f"to choose from, of which {where} has none; {other}"
        )
    layers = sorted({one.exit_layer for one in stored})
    named = [one for layer in layers for one in fitting_heads(stored, layer, head)]
    if not named:
        names = ", ".join(one.name for one in stored)
        raise FileNotFoundError(f"{where} has no exit head {head} (stored: {names}); {other}")
    found: list[ExitForecast] = []
    reasons: dict[str, list[str]] = {}  # heads by what is wrong with them
    for one in named:
        settings = settings_at(exit_layer=one.exit_layer)
        check_places(settings)
        try:
            split = make_split(settings, target.config, one)
        except ValueError as error:
            reasons.setdefault(str(error), []).append(one.name)
        else:
            found.append(_forecast(target, settings, one, split))
    if not found:
        each = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        raise ValueError(f"no stored exit head fits: {each}")
    return tuple(sorted(found, key=lambda one: (not one.recorded, one.layers)))


def describe_choice(forecasts: Sequence[ExitForecast]) -> list[str]:
    """Lines that say what was chosen, and of what; none where nothing was."""
    if not forecasts:
        return []
    best = forecasts[0]
    return [
        f"chosen: exit after layer {best.head.exit_layer}, head {best.head.name}, predicted quickest for "
        f"{best.split.stages} stages (--exit-layer E takes another)",
        *(f"  {one}" for one in forecasts),
    ]


def _forecast(target: Model, settings: EngineSettings, head: ExitHeadConfig, split: StageSplit) -> ExitForecast:
    agreement = stored_agreement(target, head)
    most = min(settings.width, settings.children)
    recorded = [count for count in map(int, agreement) if count <= most]
    rate = agreement[str(max(recorded))] if recorded else LIKELY_RATE
    costs = split_over(byte_costs(target.config, None, 1, head), target.config, settings.tensor_parallel)
    if settings.method == "eesd":
        ticks = float(eesd_ticks_per_token(rate, settings.draft_length, split.exit, split.stages))
        (tick,) = eesd_tick_costs(costs, split, settings.draft_length).stage.cost
    else:
        ticks = float(ppsd_ticks_per_token(rate, split.exit, split.stages))
        parts = exit_tick_costs(costs, split, 1)
        tick = parts.stage.at(1) + parts.slices(1, 1)
    return ExitForecast(head, split, rate, bool(recorded), ticks, ticks * tick / layer_bytes(target.config, 1))
