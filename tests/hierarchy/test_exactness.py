"""Tokens equal plain decoding's: two, three and four models, every form, whatever is late; and the rules' own ticks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from pipedec_jax.hierarchy.engine import HierarchyEngine
from pipedec_jax.hierarchy.program import KnownModel
from pipedec_jax.modeled.hierarchy import draw_words, simulate
from pipedec_jax.pipeline.engine import make_request
from pipedec_jax.plots.passes import draw_passes, pass_events
from pipedec_jax.sampling import Sampling
from pipedec_jax.soundness import NotFiniteError
from tests.exactness import check_ticks
from tests.hierarchy.families import LONGEST, SmallPair, decode, engine, load, plain, settings, sources, x64
from tests.oracle import GREEDY, Draw
from tests.plots.test_perfetto import checked
from tests.random_pairs import VOCAB, as_source, prompt_of, target_weights

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")

NEW = 40
TWO = settings(stages=(1, 1), passes=(4,))
THREE = settings(stages=(1, 1, 1), passes=(4, 2), width=5)
FOUR = settings(stages=(2, 1, 2, 2), passes=(3, 1, 1), width=4)
"""The smallest model, one between and the target over two stages; each pipe is filled with what the one below said."""
DRAWN = Draw(0.8, seed=3)
FILTERED = Draw(0.9, top_k=30, top_p=0.95, seed=3)
CASES = {
    "two": (TWO, DRAWN),
    "two, greedy": (TWO, GREEDY),
    "three": (THREE, FILTERED),
    "three, greedy": (THREE, Draw(1.0, top_k=1, seed=3)),
    "four": (FOUR, FILTERED),
    "four, greedy": (FOUR, Draw(1.0, top_k=1, seed=3)),
}
"""A program per model and mode; the forms share them. The most likely token alone is greedy in a program that draws."""
FORMS = ({"form": "lockstep"}, {"form": "free"})


@pytest.fixture(autouse=True)
def wide() -> Iterator[None]:
    with x64():
        yield


def run(base, draw, seed, length, pieces=(), delay=None, **changes):
    """One answer by a shared engine in some form, checked token by token."""
    decoder = engine(base)
    kept = decoder.settings
    load(decoder, seed)
    decoder.settings, decoder.delay = dataclasses.replace(kept, **changes), delay
    draw = dataclasses.replace(draw, seed=draw.seed + seed) if draw.temperature else draw
    try:
        progress = decode(decoder, prompt_of(length, seed), NEW, draw, pieces=pieces)
        figures = decoder.figures()
    finally:
        decoder.settings, decoder.delay = kept, None
    assert progress.tokens == plain(seed, prompt_of(length, seed), NEW, GREEDY if draw.top_k == 1 else draw)
    assert progress.done
    check_ticks(progress, base.stages[-1])
    return progress, figures


@pytest.mark.parametrize("form", FORMS, ids=[form["form"] for form in FORMS])
@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_plain_decodings(case: str, form: dict) -> None:
    base, draw = CASES[case]
    for seed, length in enumerate((17, 1, 30)):
        progress, figures = run(base, draw, seed, length, pieces=(1, 5) if seed else (), **form)
        if form["form"] == "lockstep":  # the pace of free-running models is the machine's
            assert figures[0].rollbacks > 0, "nothing was ever wrong"
            assert sum(progress.hits) > 0, "nothing was ever right"


@pytest.mark.parametrize("form", FORMS, ids=[form["form"] for form in FORMS])
def test_a_recording_tells_what_the_figures_count(form: dict) -> None:
    decoder = engine(THREE)
    with pytest.raises(ValueError, match="record=True"):
        decoder.recording()
    decoder._recorded = []
    try:
        progress, figures = run(THREE, FILTERED, 1, 17, pieces=(1, 5), **form)
        recording = decoder.recording(("small", "middle", "large"))
    finally:
        decoder._recorded = None
    assert list(recording.tokens) == progress.tokens
    for steps, figure in zip(recording.steps, figures, strict=True):
        assert [step.number for step in steps] == list(range(1, len(steps) + 1))
        assert sum(step.passes for step in steps) == figure.passes
        assert sum(step.rolled_back for step in steps) == figure.rollbacks
        assert sum(step.undone for step in steps) == figure.undone
        assert sum(step.gained - step.undone for step in steps) == steps[-1].length
    numbers = range(1, len(recording.steps[-1]) + 1)
    assert [text for number in numbers for text in recording.new_tokens(number)] == list(recording.texts)
    events = checked(pass_events(recording))
    assert sum(event["name"] == "rollback" for event in events) == sum(figure.rollbacks for figure in figures)
    if form["form"] == "lockstep":
        ticks = {len(steps) for steps in recording.steps[:-1]}
        assert ticks == {len(recording.steps[-1])}
        figure = draw_passes(recording)
        assert "not time" in figure.axes[0].get_xlabel()
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["large", "middle", "small"]
        matplotlib.pyplot.close(figure)
        with pytest.raises(ValueError, match="the recording has 1 to"):
            draw_passes(recording, 1000, 1001)


def test_prompts_of_one_capacity_are_compiled_once() -> None:
    run(TWO, DRAWN, 0, 17)
    before = engine(TWO).compile_seconds
    run(TWO, DRAWN, 1, 3)
    assert engine(TWO).compile_seconds == before > max(model.compile_seconds for model in engine(TWO).models)


@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_plain_decodings_when_models_are_late_at_random(case: str) -> None:
    base, draw = CASES[case]
    for seed, share, form in ((3, 0.5, "free"), (4, 0.1, "free"), (5, 0.2, "lockstep")):
        late = functools.partial(_late, np.random.default_rng(seed), share)
        run(base, draw, seed, 9, delay=late, form=form)


def _late(random: np.random.Generator, share: float, index: int) -> float:
    return float(random.random() < share) * 0.01 * random.random()


def test_drafting_and_verifying_in_turns() -> None:
    for lookahead in (1, 3):
        progress, figures = run(TWO, DRAWN, 1, 20, method="speculative", passes=(lookahead,))
        # At most the lookahead and the target's own token in a round.
        assert figures[1].passes * (lookahead + 1) >= NEW
        assert figures[1].passes == progress.ticks[-1]
        assert figures[1].passes < NEW


@pytest.mark.parametrize("method", ["pipespec", "speculative"])
def test_the_host_dispatches_ahead_but_nothing_that_the_missing_tokens_cannot_need(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    decoder = engine(TWO)
    load(decoder, 0)
    monkeypatch.setattr(decoder, "settings", dataclasses.replace(decoder.settings, method=method))
    waited: list[int] = []
    enough = decoder.enough

    def watched(packed: Any, goal: int) -> bool:
        waited.append(decoder._published[-1] is not packed)
        return enough(packed, goal)

    monkeypatch.setattr(decoder, "enough", watched)
    decoder.start(prompt_of(17, 0), max_new_tokens=NEW)
    decoder.run(1)
    assert (decoder.figures()[-1].passes, any(waited)) == (1, False), "the first token's time is one tick, or round"
    decoder.run(NEW)
    assert any(waited)


def test_after_an_interrupt_while_models_prefill_there_is_no_answer_to_go_on_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = engine(TWO)
    decoder.start(prompt_of(17, 0), max_new_tokens=NEW)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decoder.models[1], "prefill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoder.start(prompt_of(3, 1), max_new_tokens=NEW)
    with pytest.raises(RuntimeError, match=r"call start\(\)"):
        decoder.run(4)
    run(TWO, DRAWN, 1, 3)


def test_after_an_interrupt_inside_a_step_the_next_prompt_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = engine(TWO)
    decoder.start(prompt_of(17, 0), max_new_tokens=NEW)
    decoder.run(2)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(decoder.models[0], "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoder.run(4)
    with pytest.raises(RuntimeError, match=r"begin a new one \(generate\(\) or stream\(\) of a decoder"):
        decoder.run(4)
    run(TWO, DRAWN, 1, 3)


def test_an_end_token_ends_the_answer() -> None:
    prompt = prompt_of(17, 0)
    text = plain(0, prompt, NEW)
    end = next(token for i, token in enumerate(text) if i > 6 and token not in text[:i])
    decoder = engine(TWO)
    load(decoder, 0)
    assert prompt[-1] not in text, "an end token that is the prompt's last one ends nothing"
    for ends in ((end, VOCAB - 1), (prompt[-1], end)):
        progress = decode(decoder, prompt, NEW, end_tokens=ends)
        assert progress.done
        assert progress.tokens == text[: text.index(end) + 1]


def test_a_draft_that_is_the_target_is_never_rolled_back() -> None:
    """The test that finds bugs on the draft's side (cache holes, positions, masks), which never change a token."""
    decoder = engine(FOUR)
    target = sources(0, 4)[-1]
    two_layers = sources(0, 2)[0]
    for model, source in zip(decoder.models, [two_layers, two_layers, target, target], strict=True):
        model.place_weights(source, VOCAB)
    decode(decoder, prompt_of(17, 0), NEW, FILTERED)
    figures = decoder.figures()
    # The first two are one model: only those above contradict them, the one that is ahead more often.
    assert figures[0].rollbacks >= figures[1].rollbacks > 0
    assert figures[2].rollbacks == 0


@functools.cache
def known(models: int) -> HierarchyEngine:
    """So many models on `STAGES`, all but the target of known words."""
    with x64():
        return HierarchyEngine(
            [*[KnownModel(np.zeros(1, np.int32))] * (models - 1), sources(0, 2)[-1]],
            settings(stages=STAGES[models], passes=(2,) * (models - 1), width=4, capacity=80),
            vocab_size=VOCAB,
        )


STAGES = {3: (1, 3, 2), 4: (2, 1, 2, 2)}
"""Of each model, by their number."""
DEEP = {
    3: ((0.6, 0.8), (0.9, 0.9), (1.0, 1.0)),
    4: ((0.6, 0.8, 0.9), (0.9, 0.9, 0.95), (0.3, 1.0, 0.7)),
}
"""Acceptance of each neighbour's pair, by the number of models."""


@pytest.mark.parametrize("models", DEEP)
def test_ticks_and_rollbacks_of_a_deep_hierarchy_are_the_simulators(models: int) -> None:
    decoder, prompt = known(models), prompt_of(9, 0)
    load_target = decoder.models[-1].place_weights
    load_target(sources(0, 2)[-1], VOCAB)
    text = np.asarray([*prompt, *plain(0, prompt, NEW)], np.int32)
    for rates in DEEP[models]:
        for passes, seed in (((5, 2, 2), 0), ((2, 3, 1), 1), ((1, 1, 1), 2)):
            counts = passes[: models - 1]
            words = draw_words(rates, NEW + 1, 1, seed=seed)
            if seed == 1:  # not by neighbours: a smaller model may be right where the larger one is wrong
                words = np.concatenate([draw_words((rate,), NEW + 1, 1, seed + k)[:1] for k, rate in enumerate(rates)])
                words = np.concatenate(
                    (words * (1 + np.arange(len(words), dtype=np.int8)[:, None, None]), 0 * words[:1])
                )
            for model, labels in zip(decoder.models[:-1], words[:-1, 0], strict=True):
                said = text.copy()
                said[len(prompt) - 1 :] = (said[len(prompt) - 1 :] + labels) % VOCAB
                model.place_weights(KnownModel(said), VOCAB)
            decoder.settings = dataclasses.replace(decoder.settings, passes=counts)
            progress = decode(decoder, prompt, NEW)
            assert progress.tokens == text[len(prompt) :].tolist()
            found = simulate(words, counts, width=4, stages=STAGES[models])
            assert progress.ticks[-1] == found.ticks[0]
            figures = decoder.figures()
            assert [figure.rollbacks for figure in figures[:-1]] == found.rollbacks[:, 0].tolist()
            assert [figure.undone for figure in figures[:-1]] == found.undone[:, 0].tolist()


def test_no_model_is_further_ahead_of_the_target_than_it_may_be() -> None:
    decoder, prompt = known(3), prompt_of(9, 0)
    text = np.asarray([*prompt, *plain(0, prompt, NEW)], np.int32)
    decoder.models[-1].place_weights(sources(0, 2)[-1], VOCAB)
    for model in decoder.models[:-1]:
        model.place_weights(KnownModel(text), VOCAB)
    found = []
    for lead in (5, None):
        decoder.settings = dataclasses.replace(decoder.settings, passes=(4, 1), lead=lead)
        decoder.start(prompt, max_new_tokens=NEW)
        ahead = []
        for _ in range(8):
            seen, decoder._published = decoder._published, decoder._tick()
            ahead.append(decoder._length(decoder._published[0]) - decoder._length(seen[-1]))
        found.append(max(ahead))
    assert found[0] == 5 < found[1]


def test_a_round_on_several_stages_gives_the_lookahead_and_a_token() -> None:
    prompt = prompt_of(9, 0)
    text = np.asarray([*prompt, *plain(0, prompt, NEW)], np.int32)
    decoder = HierarchyEngine(
        [KnownModel(text), sources(0, 2)[-1]],
        settings(method="speculative", stages=(2, 2), passes=(3,), capacity=80, tick_cost=0.5),
        vocab_size=VOCAB,
        record=True,
    )
    decoder.models[-1] = known(3).models[-1]  # which is compiled
    decoder.models[-1].place_weights(sources(0, 2)[-1], VOCAB)
    for act in (decoder.recording, lambda: decoder.run(1)):
        with pytest.raises(RuntimeError, match=r"call start\(\)"):
            act()
    for words, tokens in ((text, 4), ((text + 1) % VOCAB, 1)):
        decoder.models[0].place_weights(KnownModel(words), VOCAB)
        progress = decode(decoder, prompt, NEW)
        assert progress.tokens == text[len(prompt) :].tolist()
        assert progress.ticks == [2 * (1 + place // tokens) for place in range(NEW)]
        assert progress.costs == [tick / 2 for tick in progress.ticks]
        assert progress.nodes == decoder.figures()[-1].read >= NEW
        assert decoder.recording().clock == "turn"
        assert decoder.recording().new_tokens(1) == tuple(map(str, progress.tokens[:tokens]))


def test_a_capacity_that_is_given_is_kept_to() -> None:
    capacity = LONGEST + 2 * TWO.stages[-1] + 2
    assert engine(TWO).capacity_for(20) == capacity
    with pytest.raises(ValueError, match=f"but capacity is {capacity}; raise capacity"):
        engine(TWO).capacity_for(capacity)


def test_caches_are_of_the_capacity_and_what_is_made_or_compiled_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = engine(TWO).models[0]
    programs: dict[Any, Any] = {}
    monkeypatch.setattr(model, "_programs", programs)
    sizes, timed = [], []
    for capacity, new in ((80, 0), (40, 0), (40, 0), (40, 1), (80, 0)):
        monkeypatch.setattr(
            model, "_compile", lambda *_, new=new: programs.update({len(programs): None} if new else {})
        )
        before = model.compile_seconds
        model.make_ready(make_request([1], 2, capacity, Sampling()), Sampling().mode, below=False, above=1)
        sizes.append(sum(model.bytes_per_device()["cache"].values()) / capacity)
        timed.append(model.compile_seconds > before)
    assert sizes == [sizes[0]] * 5
    assert sizes[0] > 0
    assert timed == [True, True, False, True, True]


def test_what_a_hierarchy_has_no_use_for_is_refused() -> None:
    with pytest.raises(ValueError, match="a hierarchy takes no drafter_params"):
        engine(TWO).start(prompt_of(3, 0), max_new_tokens=1, drafter_params=())
    words = KnownModel(np.zeros(1, np.int32))
    with pytest.raises(ValueError, match="the target must be a model, not known words"):
        HierarchyEngine([words, words], settings(), vocab_size=VOCAB)


def test_of_a_target_on_two_stages_the_first_one_that_is_unsound_is_named() -> None:
    decoder, pair = known(3), SmallPair(seed=0)
    decoder.settings = dataclasses.replace(decoder.settings, passes=(3, 3), lead=None)  # several words a tick
    text = plain(0, prompt_of(9, 0), NEW)
    token, last = next(token for token in text[5:] if token not in prompt_of(9, 0)), "model.layers.2.mlp.down_proj"
    read = text[: text.index(token) + 1]
    for length, name, row, stage, tokens in (
        (9, "model.embed_tokens", token, 1, read),
        (9, last, 3, 2, []),  # in prefill
        (1, last, 3, 2, []),  # which the last token of a prompt has no part in
    ):
        prompt = prompt_of(length, 0)
        weights = {name: array.copy() for name, array in target_weights(pair).items()}
        weights[f"{name}.weight"][row] = np.nan
        decoder.models[-1].place_weights(as_source(pair.target_config, weights), VOCAB)
        right = np.asarray([*prompt, *text], np.int32)
        # Where words are wrong a token is read after it was chosen, else before, behind others.
        for words in ((right + 1) % VOCAB, right):
            for model in decoder.models[:-1]:
                model.place_weights(KnownModel(words), VOCAB)
            with pytest.raises(NotFiniteError, match=f"stage {stage} of 2") as error:
                decode(decoder, prompt, NEW)
            progress = error.value.progress
            assert progress.tokens == tokens
            if not tokens:
                assert error.value.tick == (0 if length > 1 else 2)
            elif words is right:
                assert 1 < error.value.tick <= progress.ticks[-1]
            else:
                assert error.value.tick == progress.ticks[-1] + 1


def test_no_device_holds_another_models_weights() -> None:
    assert len({row["device"] for row in engine(FOUR).bytes_per_device()}) == sum(FOUR.stages)
    decoder = engine(THREE)
    load(decoder, 0)
    rows = decoder.bytes_per_device()
    assert len({row["device"] for row in rows}) == 3
    for index, row in enumerate(rows):
        assert [name for name in row if "weights" in name] == [f"model {index} weights"]
        assert row[f"model {index} weights"] == sum(
            leaf.nbytes for leaf in jax.tree.leaves(decoder.models[index].weights)
        )
