"""Kinds of numbers that options take, as `type` of argparse: those out of range are errors before any work begins."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable


def from_1(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def from_0(text: str) -> int:
    """A whole number of at least 0, such as a seed."""
    return _whole(text, 0)


def up_to_1(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, "from 0 to 1", lambda value: 0 <= value <= 1)


def over_0(text: str) -> float:
    """A finite number over 0."""
    return _number(text, "over 0", lambda value: 0 < value < math.inf)


def amount(text: str) -> float:
    """A finite number of at least 0."""
    return _number(text, "of at least 0", lambda value: 0 <= value < math.inf)


def process_shape(text: str) -> str:
    """Such as `2x1`: numbers of processes, and of devices of each."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"must be processes x devices of each, such as 2x1, not {text!r}")
    return text


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
    return int(text)


def _number(text: str, where: str, fits: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"must be a number {where}, not {text!r}")
    return value
