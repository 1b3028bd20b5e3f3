"""A panel for each of the papers' closed forms over the acceptance rate, with simulated and counted points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipedec_jax.modeled import closed_forms as forms
from pipedec_jax.modeled.cost import speedup_filled_pipe
from pipedec_jax.plots.style import pyplot

STAGES = (4, 8, 16)
"""Of the filled pipe's panel."""
LOOKAHEADS = (2, 4, 8, 16)
"""Of draft-then-verify's panel."""
DEAR = 3.5
"""Plain steps that a verification took in the PipeSpec paper's own data."""


def draw_closed_forms(
    rates: Sequence[float],
    passes: Sequence[int],
    chance: np.ndarray,
    tokens: np.ndarray,
    counted: np.ndarray,
    classic: np.ndarray,
    filled: np.ndarray,
) -> Any:
    """The figure.

    Args:
        rates: acceptance rates of the points.
        passes: of PipeSpec's draft in a tick.
        chance: `[passes, rates]` simulated share of verifications that find their input valid.
        tokens: the same of tokens per verification, simulated.
        counted: the same in the engine; NaN where it was not run.
        classic: `[LOOKAHEADS, rates]` simulated tokens per round of draft-then-verify.
        filled: `[STAGES, rates]` simulated ticks of PP over those of a filled pipe.
    """
    a = np.linspace(0, 1, 201)
    figure, panels = pyplot().subplots(2, 3, figsize=(15, 8))
    steady, verified, dear, turns, exits, pipes = panels.flat
    for index, count in enumerate(passes):
        (line,) = steady.plot(a, forms.pipespec_steady_chance(a, count - 1), label=f"{count} passes")
        color = {"color": line.get_color()}
        steady.plot(rates, chance[index], "o", **color)
        verified.plot(a, forms.pipespec_tokens(a, count - 1), label=f"{count} passes", **color)
        verified.plot(rates, tokens[index], "o", **color)
        verified.plot(rates, counted[index], "x", **color)
        dear.plot(a, forms.pipespec_speedup(a, count, DEAR), label=f"{count} passes, free-running", **color)
        dear.plot(a, forms.pipespec_lockstep_speedup(a, count, DEAR), "--", **color)
    for index, count in enumerate(LOOKAHEADS):
        (line,) = turns.plot(a, forms.accepted_run(a, count) / (count / 16 + 1), label=f"{count} guesses")
        turns.plot(rates, classic[index] / (count / 16 + 1), "o", color=line.get_color())
    for share in (2, 4, 8):
        (line,) = exits.plot(a, forms.ppsd_speedup(a, 1, share), label=f"exit after 1/{share} of the layers")
        exits.plot(a, forms.eesd_speedup(a, 4, 1, share), "--", color=line.get_color())
    for index, count in enumerate(STAGES):
        (line,) = pipes.plot(a, [speedup_filled_pipe(float(h), count) for h in a], label=f"{count} stages")
        pipes.plot(rates, filled[index], "o", color=line.get_color())
    steady.set_title("PipeSpec: chance that a pass finds its input valid (o simulated)")
    verified.set_title("PipeSpec: tokens per verification (o simulated, x engine)")
    dear.set_title(f"PipeSpec where a verification lasts {DEAR} plain steps,\nover plain decoding (dashed: lockstep)")
    turns.set_title("draft-then-verify over plain decoding,\ndraft 16 times as fast (o simulated)")
    exits.set_title("PPSD over plain decoding, in layers (dashed: EESD, 4 tokens)")
    pipes.set_title("filled pipe, PP's ticks over these (o simulated)")
    for panel in panels.flat:
        panel.title.set_fontsize(10)
        panel.set_xlabel("acceptance")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
        if panel is not steady:
            panel.axhline(1, color="gray", linewidth=0.8)
    figure.tight_layout()
    return figure
