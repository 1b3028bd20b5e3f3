"""Checks that many arguments and classes share."""

from __future__ import annotations

from typing import Any

import numpy as np


class NotCopied:
    """Base of what works on devices: two copies would work with the same arrays, each unaware of the other."""

    def __reduce_ex__(self, protocol: object) -> Any:
        """Refuses `copy.copy`, `copy.deepcopy` and `pickle`."""
        name = type(self).__name__
        raise TypeError(
            f"a {name} cannot be copied or pickled: it works on devices; make another one where it is needed"
        )


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise `ValueError` unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
