"""The table's sums, and that a wrong token is never tabulated."""

import functools

import pytest

import pipedec_jax
from pipedec_jax.analysis.method_table import plain_answers, run, simulate, sweep
from pipedec_jax.clock import TokensDifferError

OPTIONS = {"max_new_tokens": 10}
PROMPTS = ["def quicksort(items):", "class Stack:"]


@pytest.fixture(scope="module")
def make(family):
    target, draft = pipedec_jax.load(family["target"]), pipedec_jax.load(family["draft"])
    # One decoder for each setting: plain decoding is asked for twice.
    return functools.cache(functools.partial(pipedec_jax.Decoder, target, draft, prefill_width=16, capacity=128))


def test_rows_sum_over_prompts_and_count_every_token(make):
    rows = []
    settings = [
        {"method": "pp", "stages": 2},
        {"method": "best-first", "drafter": "both", "stages": 2, "width": 4, "children": 2, "draft_steps": 2},
    ]
    answers = plain_answers(make, PROMPTS, **OPTIONS)
    sweep(make, PROMPTS, answers, settings, rows.append, **OPTIONS)
    simulated = sweep(make, PROMPTS, answers, settings, lambda _: None, simulate, **OPTIONS)
    assert [(row.stages, row.width, row.children) for row in rows] == [(2, 16, 16), (2, 4, 2)]
    assert [(row.method, row.drafter, row.draft_steps) for row in rows] == [
        ("pp", "none", 0),
        ("best-first", "both", 2),
    ]
    assert simulated == rows
    for row in rows:
        assert row.hits + row.misses == row.tokens - row.prompts
        assert row.ticks_per_token == row.ticks / row.tokens
        assert row.ticks_speedup_vs_pp == 2 * row.tokens / row.ticks
        assert 0 < row.modeled_speedup_vs_pp < 2


def test_other_tokens_than_plain_decodings_are_an_error(make):
    decoder = make(method="pp", stages=1)
    answers = plain_answers(make, PROMPTS, **OPTIONS)
    assert run(decoder, PROMPTS, answers, **OPTIONS).tokens == sum(map(len, answers))
    answers[1] = [*answers[1][:-1], answers[1][-1] + 1]
    with pytest.raises(TokensDifferError, match=f"at new token {len(answers[1]) - 1} of prompt 'class Stack:'"):
        run(decoder, PROMPTS, answers, **OPTIONS)
