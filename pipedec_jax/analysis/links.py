"""What moving arrays between devices costs: a latency for each message, and its bytes over the bandwidth.

The collectives are charged as the quickest of the usual algorithms, so nobody is charged for a bad library.
"""

from __future__ import annotations

import dataclasses
import math

WORD = 4
"""Bytes of a word of the engine's broadcasts, which carry narrower values as whole words (`pipedec_jax.exchange`)."""


@dataclasses.dataclass(frozen=True)
class Link:
    """The way from one device to another; every device has its own, and all may send at once.

    Raises:
        ValueError: for a bandwidth that is not over 0, or a latency under 0.
    """

    bandwidth: float
    """Bytes that a device sends in a second."""
    latency: float
    """Seconds that a message takes however short it is, starting its kernel included."""

    def __post_init__(self) -> None:
        if not 0 < self.bandwidth < math.inf:
            raise ValueError(f"the links' bandwidth must be a finite number over 0, not {self.bandwidth!r}")
        if not 0 <= self.latency < math.inf:
            raise ValueError(f"the links' latency must be a finite number of at least 0, not {self.latency!r}")


def hop_seconds(link: Link, size: float) -> float:
    """Seconds in which `size` bytes go from one device to the next."""
    return link.latency + size / link.bandwidth


def all_reduce_seconds(link: Link, size: float, ranks: int) -> float:
    """Seconds in which all ranks come to know the sum of their arrays of `size` bytes: the quickest of three ways.

    Everything to everybody at once (one message's latency), recursive doubling (log2 of the ranks), and a ring, which
    sends the fewest bytes in 2 (ranks - 1) messages one after the other.
    """
    if ranks < 2:
        return 0.0
    at_once = link.latency + (ranks - 1) * size / link.bandwidth
    doubling = math.ceil(math.log2(ranks)) * hop_seconds(link, size)
    ring = 2 * (ranks - 1) * hop_seconds(link, size / ranks)
    return min(at_once, doubling, ring)


def exchange_seconds(link: Link, ranks: int, rows: int, width: int, item_bytes: int, guesses: int = 0) -> float:
    """Seconds of the collectives of one tick of the engine (`pipedec_jax.pipeline.tick`), one after the other.

    The batch's embeddings are summed over the ranks; the last stage's rows and the guesses (a token and its
    log-probability each) are broadcast; activations move one stage on (small ones too, though these are in the
    broadcast then); four numbers a row of every rank's slice of the head are gathered. Filters of sampling (top-k,
    top-p) gather more, and are not charged.

    Args:
        link: between any two devices.
        ranks: devices of the pipe.
        rows: of a batch (W).
        width: of the target (D).
        item_bytes: of an activation.
        guesses: that a tick makes.
    """
    if ranks < 2:
        return 0.0
    batch = rows * width
    embedded = all_reduce_seconds(link, batch * item_bytes, ranks)
    hidden = all_reduce_seconds(link, (batch * max(1, item_bytes // WORD) + 2 * guesses) * WORD, ranks)
    choices = all_reduce_seconds(link, ranks * rows * 4 * WORD, ranks)
    return embedded + hidden + hop_seconds(link, batch * item_bytes) + choices
