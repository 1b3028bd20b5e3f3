"""The simulator of draft-then-verify: against the closed form, a plain playing of the rules, and its limits."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from pipedec_jax.modeled.closed_forms import accepted_run
from pipedec_jax.modeled.draft_then_verify import simulate_rounds
from pipedec_jax.modeled.hierarchy import draw_words


@given(right=st.lists(st.booleans(), min_size=1, max_size=40), lookahead=st.integers(1, 6))
def test_rounds_are_those_of_the_rules_played_token_by_token(right, lookahead):
    words = np.asarray([[0, *(int(not one) for one in right)], [0] * (len(right) + 1)])
    position = rounds = drafted = 0
    read = 0  # tokens of the text that the draft has read
    while position < len(right):
        rounds += 1
        drafted += position + lookahead - read
        accepted = 0
        while accepted < lookahead and position + accepted < len(right) and right[position + accepted]:
            accepted += 1
        read = position + min(accepted + 1, lookahead)
        position += accepted + 1
    found = simulate_rounds(words, lookahead)
    assert (found.tokens, found.rounds, found.drafted) == (len(right), rounds, drafted)


def test_tokens_per_round_equal_the_closed_form_within_a_hundredth():
    for number, acceptance in enumerate((0.3, 0.7, 0.95)):
        for lookahead in (1, 4, 12):
            found = simulate_rounds(draw_words([acceptance], 200_000, 1, seed=number)[:, 0], lookahead)
            assert found.tokens / found.rounds == pytest.approx(accepted_run(acceptance, lookahead), rel=0.01)


def test_bad_numbers_are_refused():
    for words, lookahead in ((np.zeros((2, 5), int), 0), (np.zeros((3, 5), int), 2), (np.zeros((2, 1), int), 2)):
        with pytest.raises(ValueError, match="lookahead"):
            simulate_rounds(words, lookahead)
