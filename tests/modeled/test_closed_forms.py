"""The papers' closed forms: against each other, against the simulator, and where their assumptions fail."""

from __future__ import annotations

import argparse

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import plot_closed_forms
from pipedec_jax.modeled import closed_forms as forms
from pipedec_jax.modeled.hierarchy import draw_words, simulate

ACCEPTANCE = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
PASSES = (2, 4, 8, 16)
inside = st.floats(1e-3, 1 - 1e-6)


@given(acceptance=inside, passes=st.integers(2, 200))
def test_a_verification_gives_more_than_one_token_for_every_acceptance(acceptance, passes):
    guesses = forms.pipespec_guesses(passes)
    assert 1 < forms.pipespec_tokens(acceptance, guesses) <= guesses + 1


@given(acceptance=inside, guesses=st.integers(1, 100), start=st.floats(0, 1))
def test_the_steady_chance_is_where_the_transition_leads(acceptance, guesses, start):
    steady = float(forms.pipespec_steady_chance(acceptance, guesses))

    def following(chance):
        return chance * acceptance ** (guesses + 1) + (1 - chance) * acceptance

    assert following(steady) == pytest.approx(steady)
    # The distance shrinks by a - a^(g+1) each pass, which is below 1.
    after = following(start)
    assert abs(after - steady) <= abs(start - steady) * (acceptance - acceptance ** (guesses + 1)) + 1e-12


@given(acceptance=st.floats(0, 1), guesses=st.integers(0, 40))
def test_an_accepted_run_is_the_sum_of_its_chances(acceptance, guesses):
    assert forms.accepted_run(acceptance, guesses) == pytest.approx(sum(acceptance**i for i in range(guesses + 1)))


@given(acceptance=inside, passes=st.integers(2, 64), verification=st.floats(1, 8))
def test_a_dear_verification_can_only_slow_down(acceptance, passes, verification):
    tokens = forms.pipespec_tokens(acceptance, passes - 1)
    assert forms.pipespec_speedup(acceptance, passes) == pytest.approx(tokens)
    lockstep = forms.pipespec_lockstep_speedup(acceptance, passes, verification)
    free = forms.pipespec_speedup(acceptance, passes, verification)
    assert tokens / verification <= lockstep * (1 + 1e-9)
    assert lockstep <= tokens * (1 + 1e-9)
    # A draft that does not wait for the verdict has more ready.
    assert free >= lockstep * (1 - 1e-9)
    assert forms.speculative_speedup(acceptance, passes, passes) < forms.accepted_run(acceptance, passes)


def test_a_gain_at_every_acceptance_is_lost_where_verifying_is_dear():
    """The paper's own data: a verification of its 70B target took 3.5 plain steps."""
    assert forms.pipespec_tokens(0.5, 7) > 1.3
    assert forms.pipespec_lockstep_speedup(0.5, 8, 3.5) < 1
    assert forms.pipespec_speedup(0.5, 8, 3.5) < 1
    assert forms.pipespec_speedup(0.95, 8, 3.5) > 2


def test_the_ends_of_the_range():
    assert forms.pipespec_tokens(0.0, 7) == 1
    assert forms.pipespec_tokens(1.0, 7) == 8
    assert forms.pipespec_speedup(1.0, 8, 2.0) == pytest.approx(8)
    assert forms.pipespec_speedup([0.0, 1.0], 4, 3.5).tolist() == [1, pytest.approx(4)]
    assert forms.speculative_speedup(0.0, 3, 4.0) == 1 / 1.75
    for call in (
        lambda: forms.pipespec_tokens(1.1, 3),
        lambda: forms.pipespec_guesses(0),
        lambda: forms.pipespec_speedup(0.5, 4, 0.5),
        lambda: forms.speculative_speedup(0.5, 3, 0.0),
        lambda: forms.ppsd_ticks_per_token(0.5, 5, 4),
    ):
        with pytest.raises(ValueError, match=r"must"):
            call()


def test_simulated_tokens_per_verification_equal_the_closed_form_within_a_hundredth():
    acceptance, passes = (grid.ravel() for grid in np.meshgrid(ACCEPTANCE, PASSES))
    runs = 160
    words = draw_words([np.repeat(acceptance, runs)], 2000, runs * len(acceptance), seed=0)
    found = simulate(words, [np.repeat(passes, runs)])
    per_tick = found.tokens.reshape(-1, runs).sum(1) / found.ticks.reshape(-1, runs).sum(1)
    expected = forms.pipespec_tokens(acceptance, forms.pipespec_guesses(passes))
    assert np.max(np.abs(per_tick / expected - 1)) < 0.01
    # The guesses are one fewer than the passes.
    assert np.max(np.abs(per_tick / forms.pipespec_tokens(acceptance, passes) - 1)) > 0.2


def test_ppsd_and_its_baseline():
    # HumanEval, a quarter of the layers: 2.53, beside a reported 2.58.
    assert forms.ppsd_speedup(0.8056, 10, 40) == pytest.approx(2.53, abs=0.005)
    assert forms.ppsd_speedup([0.0, 1.0], 10, 40).tolist() == [1, 4]
    assert forms.ppsd_ticks_per_token(0.5, 1, 4) == 2.5
    assert forms.eesd_ticks_per_token([0.0, 1.0], 3, 1, 4).tolist() == [7, 7 / 4]
    # Drafting first and verifying then is below plain decoding unless most guesses are accepted.
    assert forms.eesd_speedup(0.5, 4, 10, 40) < 1.1 < 1.5 < forms.ppsd_speedup(0.5, 10, 40)
    assert forms.eesd_speedup([0.3, 0.9], 1, 10, 40).tolist() == [1, 1]
    assert forms.eesd_speedup(1.0, 4, 10, 40) == 40 * 4 / 70
    assert forms.eesd_speedup(0.2, 8, 10, 40) < 1


@given(acceptance=st.floats(0, 1), layers=st.integers(1, 80), data=st.data())
def test_verifying_while_drafting_is_never_slower_than_plain_decoding(acceptance, layers, data):
    exit_layers = data.draw(st.integers(1, layers))
    speedup = forms.ppsd_speedup(acceptance, exit_layers, layers)
    assert 1 - 1e-9 <= speedup <= layers / exit_layers * (1 + 1e-9)
    assert speedup >= forms.eesd_speedup(acceptance, data.draw(st.integers(1, 16)), exit_layers, layers) * (1 - 1e-9)


@pytest.mark.parametrize("engine", [False, True])
def test_the_table_has_the_engines_columns_only_where_it_was_run(engine, monkeypatch, capsys):
    monkeypatch.setattr(plot_closed_forms, "decode", lambda rates, *_: np.full(len(rates), 1.5))
    options = argparse.Namespace(rates=[0.5, 0.8], passes=[2], runs=4, engine=int(engine))
    *_, counted = plot_closed_forms.two_models(options)
    np.testing.assert_array_equal(counted, [[1.5, 1.5]] if engine else [[np.nan, np.nan]])
    _, *table, _ = capsys.readouterr().out.splitlines()
    assert {line.count("|") for line in table} == {12 if engine else 9}
    assert ("| engine (counted) |" in table[0]) == engine
    assert "nan" not in "".join(table)
