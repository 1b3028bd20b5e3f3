"""Progress bars as a terminal has them, kept: a test sees that they count to their end."""

from __future__ import annotations

import io
from typing import Any

from tqdm import tqdm


class Bar(tqdm):
    """Without the thread that looks after slow bars."""

    monitor_interval = 0


class Bars:
    """Stands for `tqdm` in a module, and keeps every bar that it makes."""

    def __init__(self) -> None:
        self.made: list[Bar] = []

    def __call__(self, *args: Any, **options: Any) -> Bar:
        assert options.pop("disable") is None, "quiet where standard error is no terminal"
        self.made.append(Bar(*args, **options, file=io.StringIO(), disable=False, mininterval=0))
        return self.made[-1]

    def check(self, descriptions: list[str]) -> None:
        """Each was counted to its end, and these they were."""
        assert [bar.desc.removesuffix(": ") for bar in self.made] == descriptions
        assert [bar.n for bar in self.made] == [bar.total for bar in self.made]
