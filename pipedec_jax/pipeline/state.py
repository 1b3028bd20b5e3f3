"""What a decoding method is at compile time, and the state that its ticks carry from one to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import struct

from pipedec_jax.drafters.base import Drafter
from pipedec_jax.pipeline.stage import StageCache, Target, TargetParams
from pipedec_jax.sampling import SamplingArrays, SamplingMode
from pipedec_jax.schedules.base import Schedule
from pipedec_jax.tick_costs import TICKS, TickCosts
from pipedec_jax.transcript import Transcript
from pipedec_jax.tree import PredictionTree


@dataclasses.dataclass(frozen=True)
class System:
    """Everything about a decoding method that is known at compile time."""

    target: Target
    drafter: Drafter
    schedule: Schedule
    sampling: SamplingMode
    draft_steps: int = 1
    """Draft steps in a tick (R)."""
    costs: TickCosts = TICKS
    """What a tick costs by the rows in it."""
    wait: Callable[[jax.Array], jax.Array] | None = None
    """What a stage's rows pass after its layers where a heavier stage is emulated (`analysis.emulation`)."""

    @property
    def stages(self) -> int:
        """The target's stages (N)."""
        return self.target.split.stages

    @property
    def ranks(self) -> int:
        """Places on the stage axis: the stages, then the drafter's ranks."""
        return self.stages + self.drafter.ranks

    @property
    def exit(self) -> int:
        """Stages of the exit path (e), whose last one drafts; 0 where the target has no exit."""
        return self.target.split.exit

    @property
    def drafts_alone(self) -> bool:
        """Whether one rank drafts; otherwise all do the same."""
        return bool(self.drafter.ranks or self.exit)

    @property
    def drafts_ahead(self) -> bool:
        """Whether draft steps may extend what was not sent, and so change the tree by more than guesses."""
        return self.draft_steps > 0 and not self.exit and self.schedule.drafts_ahead

    @property
    def drafting_rank(self) -> int:
        """The drafter's rank: its own, or the exit path's last; the first one where all ranks do the same."""
        return self.stages if self.drafter.ranks else max(0, self.exit - 1)


class Shared(struct.PyTreeNode):
    """The replicated state: the same on every rank."""

    tree: PredictionTree
    text: Transcript
    committed: jax.Array
    """[S] bool: slots that hold committed text."""
    pipe: jax.Array
    """[N, W] int32: the node of every row at every stage, as processed in the last tick; C for none or pruned."""
    tick: jax.Array
    """[] int32: ticks since the first root's entry."""
    cost: jax.Array
    """[] float32: what these ticks have cost (`System.costs`)."""
    sent: jax.Array
    """[] int32: nodes sent so far."""
    unsound: jax.Array
    """[C] int32: where a node that was sent first gave anything but numbers (`soundness`), 0 for nowhere; stale for
    others."""
    spoiled: jax.Array
    """[] int32: the same for the prompt, in prefill."""
    sampling: SamplingArrays


class Local(struct.PyTreeNode):
    """The state that each device has its own of."""

    x: jax.Array
    """[W, D]: activations received from the previous stage."""
    cache: StageCache
    drafter: Any
    """The drafter's state."""


class Weights(struct.PyTreeNode):
    """The weights as one device holds them."""

    target: TargetParams
    drafter: Any


class DraftSteps(struct.PyTreeNode):
    """What the draft steps of a tick extend, and with what: R steps of F nodes, K guesses for each."""

    node: jax.Array
    """[R, F] int32: the frontiers; C for none."""
    token: jax.Array
    """[R, F] int32: their tokens. A node that a later step drops leaves its place to another."""
    position: jax.Array
    """[R, F] int32: their positions in the text."""
    guess_token: jax.Array
    """[R, F, K] int32: what is guessed to follow."""
    guess_log_prob: jax.Array
    """[R, F, K] float32: the log-probabilities of that given the node; minus infinity for none."""


class Moment(struct.PyTreeNode):
    """What passes in a tick and is gone afterwards: for those who look (`recording`). It is the same on all ranks."""

    sent: Shared
    """After sending: what every stage has in this tick."""
    steps: DraftSteps
    grown: Shared
    """With all guesses and the target's choices, before the root walks."""
