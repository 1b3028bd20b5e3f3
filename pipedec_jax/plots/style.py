"""Colours, words and saving, the same in all pictures; and where matplotlib is set up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXT, PRUNED, OPEN, DEAD = "#0072B2", "#9BC8E6", "#C9B8E0", "#D9D9D9"
"""Of rows, by what they are: became text, was pruned later, undecided at the end, dead already."""
ROWS = {
    "text": (TEXT, "live, becomes text"),
    "pruned": (PRUNED, "live, pruned later"),
    "open": (OPEN, "live, undecided at the end"),
    "dead": (DEAD, "dead: pruned on its way"),
}
DRAFTED = "#E0A030"
COMMITS = {"hit": ("#009E73", "o"), "late hit": ("#E69F00", "D"), "miss": ("#D55E00", "X")}
"""Colour and mark of a token, by how it came."""
INK, FAINT = "#222222", "#8A8A8A"


def pyplot() -> Any:
    """Matplotlib's, set for files without a screen.

    Raises:
        ImportError: where it is not installed.
    """
    try:
        import matplotlib as mpl  # pyright: ignore[reportMissingImports]
        import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'pipedec_jax[plots]'") from error
    mpl.rcParams["svg.hashsalt"] = "pipedec_jax"  # the same picture is the same file
    return plt


def visible(text: str, most: int = 12) -> str:
    """A token's text on one line, spaces and line ends shown, cut to so many signs; safe for matplotlib."""
    shown = text.replace("\n", "↵").replace("\t", "→").replace(" ", "·")
    shown = "".join(sign if sign.isprintable() else "?" for sign in shown).replace("$", r"\$")
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def save(figure: Any, out: Path) -> None:
    """Write a figure to a file of the kind that its name says (.svg, .png, .pdf), and close it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if out.suffix == ".svg" else None
    figure.savefig(out, dpi=160, metadata=metadata)
    pyplot().close(figure)
