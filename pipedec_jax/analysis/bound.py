"""The ticks an oracle schedule with the same drafter would need: how much of a method's ticks are the drafter's fault.

The oracle knows which of the drafter's guesses the target will choose and sends that one alone, as soon as it can. It
is held up only where the target's token is none of the K guesses, and by the drafter's pace of R levels a tick.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pipedec_jax.analysis.simulator import Simulator
from pipedec_jax.sampling import Sampling


def guessed(simulator: Simulator, prompt: Sequence[int], answer: Sequence[int], sampling: Sampling) -> list[bool]:
    """For every token of the answer but the last: whether the drafter, given all before it, has it among its guesses.

    Args:
        simulator: from `every_guess`.
        prompt: token ids.
        answer: token ids, at least two.
        sampling: as the answer was drawn.
    """
    return simulator.run(prompt, answer, sampling=sampling).hits[:-1]


def every_guess(simulator: Simulator) -> Simulator:
    """A simulator with the same drafter that sends all of its guesses for the root, whatever they are worth.

    With two stages a root leaves in the tick that its children enter in, so no other candidates compete with them.
    """
    settings = dataclasses.replace(
        simulator.settings,
        method="pipedec",
        stages=2,
        width=simulator.guesses,
        draft_steps=1,
        pool=None,
        exit_stages=None,
    )
    return simulator.with_settings(settings)


def oracle_ticks(stages: int, guessed: Sequence[bool], draft_steps: int = 1) -> int:
    """Ticks of an answer whose tokens, but for the last, were guessed or not.

    A run of L guessed tokens after a root is sent within ceil(L / R) ticks of it; the token after them is known when
    the last of them has left the pipe, N - 1 ticks later, and is sent in the next tick.

    Args:
        stages: of the target (N).
        guessed: from `guessed`.
        draft_steps: levels that are drafted in a tick (R).

    Raises:
        ValueError: when there is no stage or no draft step.
    """
    if stages < 1 or draft_steps < 1:
        raise ValueError(f"need at least one stage and one draft step, not {stages} and {draft_steps}")
    ticks = run = 0
    for right in guessed:
        if right:
            run += 1
        else:
            ticks += stages + -(-run // draft_steps)
            run = 0
    return ticks + stages + -(-run // draft_steps)
