"""All methods over known answers: ticks are the engines', the best of what is tried is shown, and all is counted."""

import functools

import pytest

import pipedec_jax
from pipedec_jax.analysis import every_method
from pipedec_jax.analysis.every_method import Count, Known, Setting
from pipedec_jax.analysis.questions import Question, of_each_category

QUESTIONS = [
    Question(1, "code", ("def f(x):", "class Stack:"), 1),
    Question(2, "prose", ("The quick brown fox",), 2),
    Question(3, "code", ("import os",), 3),
]


@pytest.fixture(scope="module")
def models(family):
    return {name: pipedec_jax.load(family[name]) for name in ("draft", "target")}


@pytest.fixture(scope="module")
def known(models):
    plain = pipedec_jax.Decoder(models["target"], method="pp", stages=1, prefill_width=16, capacity=128)
    found, left_out = every_method.know(plain, QUESTIONS, "text", 12)
    assert not left_out
    return found


def test_every_turn_is_answered_after_the_ones_before(known):
    assert [one.category for one in known] == ["code", "code", "prose", "code"]
    first, second = known[:2]
    assert second.prompt[: len(first.prompt)] == first.prompt
    assert len(second.prompt) > len(first.prompt) + len(first.answer)


def test_questions_are_taken_from_each_category():
    assert [question.id for question in of_each_category(QUESTIONS, 1)] == [1, 2]
    assert of_each_category(QUESTIONS, 2) == QUESTIONS
    with pytest.raises(ValueError, match="at least 1, not 0"):
        of_each_category(QUESTIONS, 0)


def test_ticks_of_a_hierarchy_are_its_engines(models, known):
    twins = {"twin": models["target"], "target": models["target"]}
    words = {"twin": every_method.say(models["target"], known)}
    for setting in every_method.hierarchies(1, list(twins)):
        if setting.tried != "passes 2":
            continue
        found = every_method.count_hierarchy(twins, setting, known, words)
        decoder = pipedec_jax.HierarchyDecoder(list(twins.values()), **setting.options, prefill_width=16)
        ticks = [decoder.generate(one.prompt, max_new_tokens=len(one.answer)).ticks for one in known]
        assert found.ticks == tuple(ticks), setting.name
        assert found.ranks == 1
        assert sum(ticks) < sum(len(one.answer) for one in known)


def test_what_a_model_says_of_its_own_answers_is_them(models, known):
    said = every_method.say(models["target"], known)
    assert [tuple(words.tolist()) for words in said] == [one.answer for one in known]


def test_pp_takes_a_tick_a_stage_for_each_token(models, known):
    make = functools.partial(every_method.same_family(models), prefill_width=16)
    found = every_method.count(make, Setting("pp", "", 3, "", {"method": "pp"}), known)
    assert found.ticks == tuple(3 * len(one.answer) for one in known)
    (row,) = every_method.rows([found], known, lambda one: one.category == "code")
    assert (row.answers, row.ticks_per_token, row.modeled_speedup_vs_pp, row.hit_rate) == (3, 3.0, 1.0, None)


def test_no_two_settings_of_a_table_share_a_name():
    for stages in (1, 2, 16):
        wanted = [
            *every_method.settings(stages, 16, (2, 4, 8), 8, 4),
            *every_method.hierarchies(stages, ["a", "b", "c"]),
        ]
        assert len({setting.name for setting in wanted}) == len(wanted)
        assert {setting.method for setting in wanted} >= {"pp", "stpp", "pipedec", "best-first", "ppsd", "eesd"}


def test_of_settings_that_compete_a_text_shows_its_best():
    def counted(tried, costs):
        setting = Setting("stpp", "draft model", 2, tried, {})
        return Count(setting, ranks=1, unit=10.0, ticks=(8, 8), costs=costs, hits=(3, 2))

    known = [Known("a", "x", (1,), (2, 3, 4, 5)), Known("b", "x", (1,), (2, 3, 4))]
    counts = [counted("depth 4", (10.0, 40.0)), counted("depth 8", (20.0, 30.0))]
    best = {
        corpus: every_method.rows(counts, known, lambda one, corpus=corpus: one.corpus == corpus)[0]
        for corpus in ("a", "b")
    }
    assert {corpus: row.count.setting.tried for corpus, row in best.items()} == {"a": "depth 4", "b": "depth 8"}
    assert best["a"].modeled_speedup_vs_pp == pytest.approx(10 * 4 / 10)
    assert best["b"].hit_rate == pytest.approx(2 / 2)
