"""The choice of models and passes: from times and words that are made up, and what is measured of a small pair."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipedec_jax.hierarchy import choice as choices
from pipedec_jax.hierarchy import measure as measuring
from pipedec_jax.hierarchy import race as races
from pipedec_jax.hierarchy.choice import Choice, choose, choose_in_turns, selections, tried
from pipedec_jax.hierarchy.measure import Measured, Workload, measure
from pipedec_jax.model.parameters import MemorySource, initialize
from tests.analysis.test_tick_cost import CONFIG
from tests.progress_bars import Bars


def made_up(
    rates: tuple[float, ...], seconds: tuple[dict[int, float], ...], length: int = 400, exchange=None, **options
) -> Measured:
    """Each model but the target says the target's token with its own rate; `exchange` is the target's, or of all."""
    models = len(seconds)
    if isinstance(exchange, dict):
        exchange = (*[{}] * (models - 1), exchange)
    options |= {"exchange": exchange or (), "layers": (8,) * models}
    random = np.random.default_rng(0)
    words = random.integers(50, size=(len(rates) + 1, length))
    for model, rate in enumerate(rates):
        words[model] = np.where(random.random(length) < rate, words[-1], 50 + model)
    return Measured(seconds=seconds, words=words, plain=seconds[-1][1], **options)


FLAT = {1: 1.0, 16: 1.0}


def test_a_middle_model_is_left_out_where_it_does_not_pay():
    draft, target = {1: 0.1, 16: 0.1}, FLAT
    worse = made_up((0.85, 0.85), (draft, {1: 0.4, 16: 0.4}, target))
    assert choose(worse).models == (0, 2)
    better = made_up((0.4, 0.97), (draft, {1: 0.2, 16: 0.2}, target))
    assert choose(better).models != (0, 2)
    assert choose(worse, all_models=True).models == (0, 1, 2)


def test_as_many_devices_are_used_as_there_are_processes():
    dear = made_up((0.8, 0.9), ({1: 0.1, 16: 0.1}, {1: 0.4, 16: 0.4}, FLAT), exchange={2: 9.0, 4: 9.0}, shared=0.5)
    assert choose(dear, devices=5).devices < 4
    forced = choose(dear, devices=5, least=4)
    assert forced.devices == 4
    assert forced.stages[-1] > 1, "of the target, which has layers for it"
    assert choose(dear, devices=5, least=2) == choose(dear, devices=5)
    assert choose(dear, least=10).stages == (1, 1, 8), "with two models the target would need nine"
    given = choose(dear, stages=(1, 1, 2), least=4)
    assert (given.models, given.stages) == ((0, 1, 2), (1, 1, 2))
    for stages, used in (((1, 1, 1), (0, 2)), ((1, 3, 1), (1, 2))):
        assert choose_in_turns(dear, stages=stages, least=sum(stages) - 1).models == used


def test_a_tick_is_charged_what_it_takes_to_reach_other_processes():
    alone, apart = (made_up((0.8,), ({1: 0.1, 16: 0.1}, FLAT), dispatch=0.1, shared=shared) for shared in (0.0, 0.7))
    quick, slow = choose(alone, dispatch=True), choose(apart, dispatch=True)
    assert slow.speedup < quick.speedup
    assert slow.tick_seconds == pytest.approx(max(1.0, 0.1 * slow.passes[0]) + 0.8)
    assert choose(apart).speedup == choose(alone).speedup


def test_a_verification_is_narrow_where_rows_are_dear():
    draft = {1: 0.05, 16: 0.05}
    free = choose(made_up((0.8,), (draft, FLAT)))
    dear = choose(made_up((0.8,), (draft, {1: 1.0, 4: 1.1, 16: 4.0})))
    assert free.width > 4 >= dear.width
    assert free.speedup > dear.speedup > 1
    assert free.tick_seconds == pytest.approx(max(1.0, 0.05 * free.passes[0]))
    # A tick that reads one row costs what one row does, where a pass computes no more.
    part = made_up((0.8,), (draft, {1: 1.0, 4: 4.0, 16: 4.0}), one_row=False)
    one = made_up((0.8,), (draft, {1: 1.0, 4: 4.0, 16: 4.0}))
    assert part.costs(1, 4) == [0, 4, 4, 4, 4]
    assert one.costs(1, 4) == [0, 1, 4, 4, 4]
    assert choose(one).speedup > choose(part).speedup
    # The smallest model reads a row at a time, whatever its rows cost.
    narrow = choose(made_up((0.8,), ({1: 0.05, 16: 5.0}, FLAT), one_row=False))
    assert narrow.tick_seconds == pytest.approx(max(1.0, 0.05 * narrow.passes[0]))
    assert narrow.passes[0] > 4


def test_what_a_dispatch_and_stages_add_is_charged():
    measured = made_up((0.8,), ({1: 0.05, 16: 0.05}, FLAT), dispatch=0.5, exchange={2: 0.1, 3: 0.1})
    alone, charged = choose(measured), choose(measured, dispatch=True)
    assert charged.tick_seconds == pytest.approx(1.5)
    assert charged.speedup < alone.speedup
    staged = choose(measured, devices=3)
    assert (staged.stages, staged.devices) == ((1, 2), 3)
    assert staged.speedup > alone.speedup
    assert choose(measured, stages=(1, 2)) == staged
    # Eight layers over three stages: the longest has three of them.
    assert measured.costs(1, 2, stages=3) == pytest.approx([0.1, 3 / 8 + 0.1, 3 / 8 + 0.1])


def test_the_lookahead_is_as_long_as_pays():
    sure = made_up((0.97,), ({1: 0.01, 16: 0.01}, FLAT))
    unsure = made_up((0.4,), ({1: 0.2, 16: 0.2}, FLAT))
    long, short = choose_in_turns(sure, all_models=True), choose_in_turns(unsure, all_models=True)
    assert long.passes[0] > 8 > 2 >= short.passes[0]
    assert long.width == long.passes[0] + 1
    # Of several drafts the one that pays.
    drafts = made_up((0.3, 0.9), ({1: 0.1, 16: 0.1}, {1: 0.1, 16: 0.1}, FLAT))
    assert choose_in_turns(drafts).models == (1, 2)
    assert choose_in_turns(drafts, dispatch=True) == choose_in_turns(drafts)
    # Stages take turns as well, so that they only add their exchange.
    spread = made_up((0.9,), ({1: 0.1, 16: 0.1}, FLAT), exchange=({2: 0.01}, {4: 0.02}))
    alone, pipes = choose_in_turns(spread), choose_in_turns(spread, stages=(2, 4))
    assert pipes.stages == (2, 4)
    drafted = pipes.tick_seconds - (1 + 4 * 0.02)
    assert drafted == pytest.approx(2 * (0.05 + 0.01) * round(drafted / 0.12, 9))
    assert pipes.speedup < alone.speedup


def test_a_round_is_charged_its_rows_and_two_dispatches():
    """Of a draft that costs nothing: all is the verification's, of a row more than were drafted."""
    measured = made_up((0.9,), ({1: 0.0, 16: 0.0}, {1: 1.0, 16: 16.0}))
    for width, most in ((None, 15), (4, 3), (1, 1)):
        found = choices.tried_in_turns(measured, (0, 1), added=0.25, width=width)
        assert [one.passes for one in found] == [(lookahead,) for lookahead in range(1, most + 1)]
        assert [one.width for one in found] == [min(lookahead + 1, width or 16) for lookahead in range(1, most + 1)]
        assert [one.tick_seconds for one in found] == pytest.approx(
            [lookahead + 1.5 for lookahead in range(1, most + 1)]
        )
    three = made_up((0.9, 0.3), ({1: 0.1, 16: 0.1}, {1: 0.1, 16: 0.1}, FLAT))
    assert choose_in_turns(three).models == (0, 2)
    assert choose_in_turns(three, all_models=True).models == (1, 2), "the draft is given"


def test_every_process_has_the_first_ones_choice(monkeypatch: pytest.MonkeyPatch):
    measured = made_up((0.4, 0.97), ({1: 0.1, 16: 0.1}, {1: 0.2, 16: 0.2}, FLAT), exchange=({}, {2: 0.01}, {4: 0.01}))
    made = choose(measured, stages=(1, 2, 4))
    sent = []
    monkeypatch.setattr(choices, "process_count", lambda: 2)
    monkeypatch.setattr(choices.multihost_utils, "broadcast_one_to_all", lambda found: sent.append(found) or sent[0])
    assert choices.agree(made, 3).models == made.models
    other = choices.agree(None, 3)
    assert [array.shape for array in sent[0]] == [array.shape for array in sent[1]]
    for name in ("models", "passes", "width", "stages"):
        assert getattr(other, name) == getattr(made, name)
    assert other.speedup == pytest.approx(made.speedup)


def choice(models: tuple[int, ...], speedup: float) -> Choice:
    return Choice(
        models=models,
        passes=(2,) * (len(models) - 1),
        width=2,
        tokens_per_tick=2,
        tick_seconds=1,
        speedup=speedup,
        stages=(1,) * len(models),
    )


def test_the_fastest_measured_is_first_be_it_plain_decoding():
    """Engines that take a made-up time: the race sorts them by it, whatever was predicted."""
    times = {
        None: 3.0,
        ((0, 1), "lockstep"): 4.0,
        ((0, 1), "free"): 2.0,
        ((0, 2), "lockstep"): 5.0,
        ((0, 2), "free"): 6.0,
    }

    class Clockwork:
        def __init__(self, which):
            self.which, self.form = which, None

    warm = set()

    def run(engine, prompt, answer, new_tokens, sampling):
        assert answer in (None, [7] * new_tokens)
        which = engine.which and (engine.which.models, engine.form)
        seconds = times[which] if which in warm else 0.0  # the first turn does not count, whatever it took
        warm.add(which)
        return types.SimpleNamespace(tokens=[7] * new_tokens), seconds * (new_tokens - 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(races, "decode", run)
        entries = races.race(
            [choice((0, 2), 3.0), choice((0, 1), 2.0)],
            ("lockstep", "free"),
            Clockwork,
            lambda engine, form: setattr(engine, "form", form),
            [1],
            9,
        )
    assert [entry.measured for entry in entries] == pytest.approx([2, 3, 4, 5, 6])
    assert [entry.choice and entry.choice.models for entry in entries[:2]] == [(0, 1), None]
    assert [entry.predicted for entry in entries] == [None, None, 0.5, 0.5, None]


def test_candidates_take_no_more_devices_than_there_are(monkeypatch):
    monkeypatch.setattr(choices, "tqdm", bars := Bars())
    seconds = ({1: 0.05, 16: 0.05}, {1: 0.2, 16: 0.2}, FLAT)
    measured = made_up((0.8, 0.9), seconds, length=100, exchange={2: 0.0, 4: 0.0})
    for devices in (2, 3, 6):
        found = races.candidates(measured, selections(3), None, devices)
        assert len(found) == races.CANDIDATES
        assert found[0].speedup >= found[1].speedup
        assert all(one.devices <= max(devices, len(one.models)) for one in found)
        assert (found[0].stages[-1] > 1) == (devices > 2)
    fixed = races.candidates(measured, selections(3), (2, 1, 4), 2)
    assert all(one.stages == tuple((2, 1, 4)[model] for model in one.models) for one in fixed)
    slow = made_up((0.8,), ({1: 0.05, 16: 0.05}, FLAT), length=100, dispatch=0.5)
    assert races.candidates(slow, selections(2), None, 2)[0].tick_seconds == pytest.approx(1.5)
    bars.check(["simulating hierarchies"] * 5)


def test_a_smaller_model_is_spread_over_stages_where_its_passes_hold_the_others_up():
    """A middle model that is nearly right and nearly as slow as the target."""
    seconds = ({1: 0.1, 4: 0.1}, {1: 0.8, 4: 0.8}, {1: 1.0, 4: 1.0})
    spread = ({2: 0.0}, {2: 0.01, 4: 0.01}, {2: 0.01, 4: 0.01})
    cheap = made_up((0.8, 0.99), seconds, length=60, exchange=spread)
    found = choose(cheap, devices=7)
    assert (found.models, found.stages) == ((0, 1, 2), (1, 2, 4))
    # Nothing that fits beats it.
    places = [(1, b, c) for b in (1, 2, 4) for c in (1, 2, 4) if b + c < 7]
    best = {place: choices.best(tried(cheap, (0, 1, 2), place)).speedup for place in places}
    assert found.speedup == max(best.values()) > 1.1 * best[1, 1, 4]
    assert choose(cheap, devices=5, all_models=True).devices <= 5
    # The smallest model has one token in its pipe, which is none the quicker for having two stages.
    assert (cheap.counts(0), cheap.counts(0, alone=True)) == ([2], [])
    assert {one.stages[0] for one in choices.placed(cheap, (0, 1, 2), None, 7)} == {1}
    # An exchange dearer than what is saved: no pass is quicker, and it is not even tried.
    dear = made_up((0.8, 0.99), seconds, length=60, exchange=({2: 0.1}, {2: 0.5, 4: 0.7}, {2: 0.01}))
    assert [dear.counts(model) for model in range(3)] == [[], [], [2]]
    assert {one.stages for one in choices.placed(dear, (0, 1, 2), None, 9)} == {(1, 1, 1), (1, 1, 2)}


def test_a_smallest_model_on_two_stages_says_a_token_in_two_passes():
    measured = made_up((0.9,), ({1: 0.2, 16: 0.2}, FLAT), length=100, exchange=({2: 0.0}, {}))
    found = {one.passes[0]: one for one in tried(measured, (0, 1), (2, 1)) if one.width == 8}
    alone = {one.passes[0]: one for one in tried(measured, (0, 1)) if one.width == 8}
    assert {1, 2, 4, 6} <= set(found)
    for tokens in (1, 2, 3):
        assert found[2 * tokens].tokens_per_tick == pytest.approx(alone[tokens].tokens_per_tick, rel=0.02)
        assert found[2 * tokens].tick_seconds == pytest.approx(max(1, 0.2 * tokens))


def test_what_is_tried_includes_a_tick_that_is_not_worth_it():
    slow = made_up((0.3,), ({1: 0.9, 16: 0.9}, FLAT))
    assert all(option.passes == (1,) for option in tried(slow, (0, 1)))
    assert choose(slow).speedup == pytest.approx(1, abs=0.1)
    assert selections(3) == [(0, 2), (1, 2), (0, 1, 2)]


def test_no_more_passes_are_tried_than_a_tick_may_have(monkeypatch):
    monkeypatch.setattr(choices, "MOST_PASSES", 5)
    measured = made_up((0.9,), ({1: 0.01, 16: 0.01}, FLAT))
    assert {option.passes for option in tried(measured, (0, 1))} == {(count,) for count in range(1, 6)}


def test_the_target_idles_where_nothing_is_there_to_verify():
    never, often = (made_up((rate,), ({1: 0.1, 16: 0.1}, FLAT)) for rate in (0.0, 0.97))
    idle = [next(one.idle for one in tried(each, (0, 1)) if one.passes == (4,)) for each in (never, often)]
    assert idle[0] == 1
    assert 0 < idle[1] < 0.3


def test_times_are_interpolated_and_go_on_beyond_the_widest():
    measured = made_up((0.5,), (FLAT, {1: 1.0, 4: 1.0, 16: 4.0}))
    assert measured.pass_seconds(1, 10) == 2.5
    assert measured.pass_seconds(1, 32) == 8.0
    assert measured.pass_seconds(0, 32) == 1.0


def test_stages_count_that_make_a_wide_pass_quicker_and_tokens_that_were_not_given():
    wide = made_up((0.5,), (FLAT, {1: 0.1, 16: 10.0}), exchange=({}, {2: 0.2, 4: 9.0}))
    assert wide.counts(1) == [2], "though a pass of one row takes longer"
    said = dataclasses.replace(wide, words=np.asarray([[1, 2, 3], [1, 5, 3]]))
    assert said.agreement(0) == 0.5


def test_the_words_of_models_are_what_they_say_along_the_targets_texts(monkeypatch):
    monkeypatch.setattr(measuring, "tqdm", bars := Bars())
    target = MemorySource(CONFIG, jax.tree.map(lambda x: 4 * x, initialize(CONFIG, jax.random.key(0))))
    measured = measure(
        [target, target],
        Workload([[1, 2, 3], [7]], vocab_size=31, dtype=jnp.float32, new_tokens=20, widths=(2,)),
        devices=jax.devices(),
        stages=((1, 2), (1,)),
    )
    bars.check(["measuring the models"])
    assert measured.words.shape == (2, 41)
    assert measured.words[1, 0] == 3
    assert measured.agreement(0) == 1
    assert [set(seconds) for seconds in measured.seconds] == [{1, 2}, {1, 2}]
    assert [set(added) for added in measured.exchange] == [{2}, set()]
    assert measured.layers == (CONFIG.layers,) * 2
    assert measured.plain > 0
    assert all(second > 0 for seconds in measured.seconds for second in seconds.values())
