"""What a race of ways to decode gives, with made-up engines."""

from __future__ import annotations

import types
from typing import Any

import pytest

from pipedec_jax.clock import first_difference
from pipedec_jax.hierarchy import race as racing
from pipedec_jax.hierarchy.choice import Choice
from pipedec_jax.hierarchy.race import race
from pipedec_jax.hierarchy.report import lines
from tests.hierarchy.test_choice import made_up
from tests.progress_bars import Bars

ANSWER = [5, 6, 7, 8]
EXACT, OTHER = (Choice((model, 2), (2,), 4, 2.0, 1e-3, 2.0, (1, 1)) for model in (1, 0))


def raced(monkeypatch: pytest.MonkeyPatch, answers: dict[tuple[Any, str], list[list[int]]]) -> list[racing.Entry]:
    """A race where each way gives these answers in turn, the last one again and again; plain decoding is slowest."""

    def decode(engine: Any, prompt: Any, answer: Any, new_tokens: int, sampling: Any) -> Any:
        left = answers.get((engine.choice, engine.form), [ANSWER])
        tokens = left.pop(0) if len(left) > 1 else left[0]
        return types.SimpleNamespace(tokens=tokens), 9.0 if engine.choice is None else 1.0

    def make(choice: Any) -> Any:
        return types.SimpleNamespace(choice=choice, form="lockstep")

    monkeypatch.setattr(racing, "decode", decode)
    forms = ("lockstep", "free")
    return race([OTHER, EXACT], forms, make, lambda engine, form: setattr(engine, "form", form), [1], 4)


def test_the_fastest_comes_first_and_plain_decoding_is_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(racing, "tqdm", bars := Bars())
    found = raced(monkeypatch, {})
    bars.check(["running the fastest"])
    assert len(found) == 5
    assert found[-1].choice is None
    assert {entry.differs_at for entry in found} == {None}


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_what_gives_other_tokens_in_any_turn_is_left_out_and_said_so(
    monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    """No error: a near tie in float32 may turn, and then plain decoding or another hierarchy is used."""
    near_tie = [ANSWER] * turn + [[5, 6, 9, 8], ANSWER]
    found = raced(monkeypatch, {(OTHER, "lockstep"): [ANSWER[:2]], (OTHER, "free"): near_tie})
    assert [entry.choice for entry in found[:2]] == [EXACT, EXACT]
    assert found[2].choice is None
    assert {entry.form: entry.differs_at for entry in found[3:]} == {"lockstep": 2, "free": 2}
    text = lines(made_up((0.8, 0.9), ({1: 1e-4}, {1: 2e-4}, {1: 1e-3})), found[0].choice, found, ("a", "b", "c"))
    assert [line.endswith("token 2 of its answer is not plain decoding's (rounding)") for line in text[-6:-1]] == (
        [False] * 3 + [True] * 2
    )


def test_where_answers_differ_first() -> None:
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 3, 4], [1, 2, 4]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
