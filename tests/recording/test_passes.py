"""What models of a hierarchy have published, told step by step."""

from __future__ import annotations

import numpy as np
import pytest

from pipedec_jax.recording.passes import PassRecording, Step, read_passes

PROMPT = [7, 8]


def buffer(answer: list[int], passes: int, rollbacks: int = 0, undone: int = 0) -> np.ndarray:
    """As `buffers.pack` gives it: what is stale behind the answer counts for nothing."""
    tokens = [*PROMPT, *answer]
    return np.asarray([len(tokens), passes, rollbacks, undone, 0, *tokens, *[9] * (12 - len(tokens))], np.int32)


def told(method: str = "pipespec", form: str = "lockstep") -> PassRecording:
    published = [
        (0, buffer([], 0)),
        (1, buffer([], 0)),
        (0, buffer([1, 2, 3], 3)),
        (1, buffer([], 1)),
        (1, buffer([1, 5], 2)),
        (0, buffer([1, 5, 6], 5, rollbacks=1, undone=2)),
        (1, buffer([1, 5], 2)),
        (0, buffer([1, 5, 6], 5, rollbacks=2, undone=2)),
    ]
    return read_passes(published, method, form, ["small", "large"], len(PROMPT), lambda token: f"<{token}>")


def test_a_step_is_what_changed_in_it() -> None:
    assert told().steps == (
        (
            Step(model=0, number=1, passes=3, rolled_back=False, undone=0, gained=3, length=3),
            Step(model=0, number=2, passes=2, rolled_back=True, undone=2, gained=2, length=3),
            Step(model=0, number=3, passes=0, rolled_back=True, undone=0, gained=0, length=3),
        ),
        (
            Step(model=1, number=1, passes=1, rolled_back=False, undone=0, gained=0, length=0),
            Step(model=1, number=2, passes=1, rolled_back=False, undone=0, gained=2, length=2),
            Step(model=1, number=3, passes=0, rolled_back=False, undone=0, gained=0, length=2),
        ),
    )


def test_the_answer_is_the_targets_and_a_step_without_a_pass_comes_after_it() -> None:
    recording = told()
    assert (recording.tokens, recording.texts) == ((1, 5), ("<1>", "<5>"))
    assert recording.last == 2
    assert [recording.new_tokens(number) for number in (1, 2, 3)] == [(), ("<1>", "<5>"), ()]


@pytest.mark.parametrize(
    ("method", "form", "clock"),
    [("pipespec", "lockstep", "tick"), ("pipespec", "free", "step"), ("speculative", "lockstep", "turn")],
)
def test_a_steps_number_is_said_to_be_what_all_models_share(method: str, form: str, clock: str) -> None:
    assert told(method, form).clock == clock
