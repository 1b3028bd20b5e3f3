"""Values that are not finite (NaN, infinity) in the target: found where they arise, and never sampled from.

A row of the pipe is sound while every stage's output for it is finite, and then its logits. What a stage finds travels
as one bit a row in the broadcast that a tick makes anyway. A guess may be unsound and hurt nobody: no NaN of it reaches
another row (see `LayerCache.attend`), and it is pruned as any wrong guess is. An answer ends, with an error, where the
target's own next choice would have to be taken from an unsound row.

The place of an unsound row is a small number: 0 for a sound one, k for the output of stage k (from 1), N + 1 for the
logits of N stages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from pipedec_jax.pipeline.progress import Progress

BITS = 31
"""Stages that share an int32 word."""


class NotFiniteError(FloatingPointError):
    """The target gave NaN or infinity where its next token was to be chosen.

    Args:
        stage: whose output was not finite first, from 1; `None` for the logits.
        stages: of the target.
        layers: the first and the last layer of that stage, from 1.
        tick: in which it computed that, from 1 at the root's entry into the pipe; 0 for prefill.
        progress: what was committed before (`pipeline.progress.Progress`).
    """

    def __init__(
        self, stage: int | None, stages: int, layers: tuple[int, int] | None, tick: int, progress: Progress
    ) -> None:
        self.stage, self.tick, self.progress = stage, tick, progress
        self._arguments = (stage, stages, layers, tick, progress)
        tokens = len(progress.tokens)
        if stage is None:
            what = "the target's logits are"
        else:
            span = "" if layers is None else f" (layers {layers[0]} to {layers[1]})"
            if layers and layers[0] == layers[1]:
                span = f" (layer {layers[0]})"
            what = f"the output of the target's stage {stage} of {stages}{span} is"
        when = f"tick {tick}" if tick else "prefill"
        super().__init__(
            f"{what} not finite (NaN or infinity) in {when}, after {tokens} tokens of the answer; no token is chosen "
            "from that. Check the weights (python -m checkpoints_convert verify), or give a dtype that holds more"
        )

    def __reduce__(self) -> tuple[type[NotFiniteError], tuple[Any, ...]]:
        """How it goes to another process, as those of a pool do."""
        return type(self), self._arguments


def not_finite(x_WD: jax.Array, live_W: jax.Array) -> jax.Array:
    """Which living rows hold anything but numbers, `[W]` bool."""
    return live_W & ~jnp.all(jnp.isfinite(x_WD), axis=-1)


def to_bits(bad_W: jax.Array, rank: jax.Array, stages: int) -> jax.Array:
    """One rank's findings as words to add up over the ranks, `[stages / 31, W]` int32: its own bit of each row's."""
    word = jnp.arange(-(-stages // BITS), dtype=jnp.int32)
    mine = (word == rank // BITS)[:, None] & bad_W[None, :]
    return jnp.where(mine, jnp.left_shift(jnp.ones((), jnp.int32), rank % BITS), 0)


def places(words: jax.Array, log_prob_W: jax.Array, stages: int) -> jax.Array:
    """Where the rows of the pipe are unsound first in this tick, `[N, W]` int32.

    Args:
        words: `to_bits` of all ranks, added up.
        log_prob_W: of what the target chose after each row that leaves, not finite if its logits are not.
        stages: N.
    """
    stage = jnp.arange(stages, dtype=jnp.int32)
    bit = jnp.right_shift(words[stage // BITS], (stage % BITS)[:, None]) & 1
    place_NW = bit * (stage + 1)[:, None]
    logits = jnp.where(jnp.isfinite(log_prob_W), 0, stages + 1)
    return place_NW.at[-1].set(jnp.where(place_NW[-1] > 0, place_NW[-1], logits))
