"""What the devices have committed of an answer, as the host reads it, and the error where they cannot go on."""

from __future__ import annotations

import dataclasses

import jax

from pipedec_jax.pipeline.stage import Target
from pipedec_jax.pipeline.state import Shared
from pipedec_jax.pipeline.tick import stuck
from pipedec_jax.soundness import NotFiniteError
from pipedec_jax.transcript import MISS


@dataclasses.dataclass(frozen=True)
class Progress:
    """What has been committed since `Engine.start`. Lists have one entry per new token."""

    tokens: list[int]
    ticks: list[int]
    """Tick in which each token was committed, counted from 1 at the root's entry into the pipe."""
    costs: list[float]
    """What all ticks up to that one have cost (`EngineSettings.costs`, `HierarchySettings.tick_cost`)."""
    delays: list[int]
    """Ticks between the sending of each token's parent and its own: 0 in one batch, 1 in the next, more for a late hit;
    -1 for a miss."""
    logprobs: list[float]
    """The target's log-probability of the token, at temperature 1 and without filters."""
    nodes: int
    """Rows sent into the pipe so far: nodes of the tree; of a hierarchy, tokens that the target read."""
    done: bool
    """Whether an end token or the length limit was reached."""

    @property
    def hits(self) -> list[bool]:
        """Whether each token was in the pipe, as a child of the one before, when the target chose it."""
        return [delay != MISS for delay in self.delays]


NOTHING = Progress([], [], [], [], [], nodes=0, done=False)
"""Before the first token."""


def read_progress(shared: Shared, prompt_length: int, before: Progress = NOTHING) -> Progress:
    """What the devices have committed after a prompt of so many tokens; waits for them.

    What was read `before` is not made numbers of again: looks at a long answer would take longer and longer.
    """
    text, nodes = jax.device_get((shared.text, shared.sent))
    new = slice(prompt_length + len(before.tokens), int(text.length))
    return Progress(
        tokens=before.tokens + text.token[new].tolist(),
        ticks=before.ticks + text.tick[new].tolist(),
        costs=before.costs + text.cost[new].tolist(),
        delays=before.delays + text.delay[new].tolist(),
        logprobs=before.logprobs + text.log_prob[new].tolist(),
        nodes=int(nodes),
        done=bool(text.done),
    )


def check_sound(shared: Shared, target: Target, progress: Progress) -> None:
    """Raise `NotFiniteError` where the target's next choice would come from NaN or infinity."""
    shared = jax.device_get(shared)
    place, sent = int(stuck(shared)), int(shared.tree.sent_tick[shared.tree.root])
    if place:
        # A row is at one stage a tick; the last one and the logits share theirs.
        raise not_finite_error(target, place, 0 if shared.spoiled else sent + place - 1, progress)


def not_finite_error(target: Target, place: int, tick: int, progress: Progress) -> NotFiniteError:
    """The error of a place as in `soundness`; `tick` is counted as if the logits came after the last stage."""
    stages, split = target.split.stages, target.split
    if place > stages:
        return NotFiniteError(None, stages, None, tick - 1, progress)
    first = split.first[place - 1]
    return NotFiniteError(place, stages, (first + 1, first + split.count[place - 1]), tick, progress)
