"""A row of panels of speedups over a rate, on a logarithmic scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipedec_jax.plots.style import pyplot


def draw_over_rates(panels: Mapping[str, Callable[[Any], None]], rate: str, speedup: str, width: float) -> Any:
    """The figure.

    Args:
        panels: by their titles, what draws the lines into each.
        rate: what the horizontal axes are.
        speedup: what the vertical ones are.
        width: of a panel, in inches.
    """
    figure, row = pyplot().subplots(1, len(panels), figsize=(width * len(panels), 3.8), squeeze=False)
    for panel, (title, draw) in zip(row[0], panels.items(), strict=True):
        draw(panel)
        panel.set_title(title)
        panel.set_xlabel(rate)
        panel.set_yscale("log", base=2)
        panel.grid(alpha=0.3)
    row[0][0].set_ylabel(speedup)
    row[0][0].legend(fontsize=7)
    figure.tight_layout()
    return figure
