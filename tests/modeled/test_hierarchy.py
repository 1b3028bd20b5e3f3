"""The hierarchy's simulator: against a plain Python playing of the rules, and its limits."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from pipedec_jax.modeled.hierarchy import draw_words, most_tokens_per_pass, simulate


def played(words: list[list[int]], passes: list[int], width: int, stages: list[int]) -> tuple[int, list[int]]:
    """Ticks and rollbacks of one run, with buffers as lists, and what each model has read as another one."""
    models, length = len(words), len(words[0])
    top = models - 1
    buffers = [[words[top][0]] for _ in words]
    fed: list[list[int]] = [[] for _ in words]
    pipes: list[list[int]] = [[0] * count for count in stages]
    """Up to where each stage has read, the first one's first."""
    ticks, rollbacks = 0, [0] * top

    def verify(model: int, source: list[int], end: int) -> list[int]:
        own = list(buffers[model])
        if end >= len(own):
            for position in range(len(own), end + 1):
                own.append(words[model][position] if position < length else 0)
                if position < end and own[position] != source[position]:
                    break
        return own[:length]

    def agree(one: list[int], two: list[int]) -> int:
        return next((p for p, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1]), len(one))

    while len(buffers[top]) < length:
        ticks += 1
        begun = [list(buffer) for buffer in buffers]
        for model in range(models):
            for _ in range(passes[model] if model < top else 1):
                source = begun[model - 1] if model else buffers[0]
                if len(source) < len(buffers[model]) or source[: len(buffers[model])] != buffers[model]:
                    source = buffers[model]
                # Before every pass what was read is compared with the text that is there now.
                read = min(agree(fed[model], source), len(source))
                end = min(read + (width if model else 1), len(source))
                pipes[model] = [end, *(min(stage, read) for stage in pipes[model][:-1])]
                fed[model] = source[:end]
                buffers[model] = verify(model, source, pipes[model][-1])
                # And at once what lies beyond a wrong token is dropped.
                read = agree(fed[model], buffers[model])
                fed[model], pipes[model] = fed[model][:read], [min(stage, read) for stage in pipes[model]]
        for model in range(top - 1, -1, -1):
            mine, upper = buffers[model], buffers[model + 1]
            differs = next((p for p in range(min(len(mine), len(upper))) if mine[p] != upper[p]), None)
            if differs is not None:
                rollbacks[model] += 1
                buffers[model] = list(upper)
            elif len(mine) < len(upper):
                buffers[model] = list(upper)
    return ticks, rollbacks


@given(data=st.data())
def test_every_run_is_that_of_the_rules_played_with_lists(data):
    models = data.draw(st.integers(2, 4))
    passes = [data.draw(st.integers(1, 5)) for _ in range(models - 1)]
    width, stages = data.draw(st.integers(1, 6)), [data.draw(st.integers(1, 4)) for _ in range(models)]
    rates = [data.draw(st.sampled_from((0.0, 0.4, 0.7, 0.9, 1.0))) for _ in range(models - 1)]
    words = draw_words(rates, 40, 5, seed=data.draw(st.integers(0, 1000)))
    # Also words on which a model agrees with one that is not its neighbour.
    words = np.where(data.draw(st.booleans()), words, words % 2).astype(np.int8)
    found = simulate(words, passes, width=width, stages=stages)
    assert found.tokens.tolist() == [39] * 5
    for run in range(5):
        ticks, rollbacks = played(words[:, run].tolist(), passes, width, stages)
        assert (found.ticks[run], found.rollbacks[:, run].tolist()) == (ticks, rollbacks)


def test_settings_can_differ_between_runs():
    words = draw_words([[0.5, 0.9, 0.9], 0.8], 60, 3, seed=1)
    together = simulate(words, [[4, 4, 8], 2], width=[3, 8, 8])
    for run, (first, width) in enumerate(((4, 3), (4, 8), (8, 8))):
        alone = simulate(words[:, run : run + 1], [first, 2], width=width)
        assert alone.ticks[0] == together.ticks[run]
        assert alone.undone[:, 0].tolist() == together.undone[:, run].tolist()


def test_all_runs_may_read_the_same_words():
    words = draw_words([0.7, 0.8], 60, 1, seed=3)
    shared = simulate(words, [[1, 4, 8], 2], width=[3, 8, 8], stages=2)
    apart = simulate(np.repeat(words, 3, axis=1), [[1, 4, 8], 2], width=[3, 8, 8], stages=2)
    assert len(set(shared.ticks.tolist())) > 1
    for name, sums in vars(shared).items():
        assert np.array_equal(sums, getattr(apart, name))


@given(data=st.data())
def test_a_tick_is_charged_the_slowest_models_rows(data):
    rate = data.draw(st.sampled_from((0.0, 0.5, 0.9, 1.0)))
    passes, width = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 5))
    words = draw_words([rate], 60, 4, seed=data.draw(st.integers(0, 100)))
    flat = simulate(words, [passes], width=width, costs=[[0, 0.1], [2, 2]])
    assert flat.seconds.tolist() == (2 * flat.ticks).tolist()
    # Plain steps cost 1 and verifications 3, on one stage.
    dear = simulate(words, [passes], width=width, costs=[[0, 0.0], [0, 1, *[3] * (width - 1)]])
    assert dear.seconds.tolist() == (dear.ticks + 2 * dear.verifications).tolist()
    # A slow draft is what a tick lasts.
    slow = simulate(words, [passes], width=width, costs=[[10, 10], [0, 1]])
    assert slow.seconds.tolist() == (10 * passes * slow.ticks).tolist()
    staged = simulate(words, [passes], width=width, stages=3, costs=[[0, 0], [0, 1]])
    assert np.all(staged.seconds <= staged.ticks)
    with pytest.raises(ValueError, match="2 models need 2 rows of costs, not 1"):
        simulate(words, [passes], costs=[[1.0]])


def test_a_pipe_of_many_stages_follows_the_filled_pipes_formula():
    """One token a tick from a draft that is right in known places: the ticks of a filled pipe, in whole numbers."""
    words = draw_words([0.8], 200, 4, seed=2)
    found = simulate(words, [1], stages=5)
    # A tick for every token, and a refill for every wrong one; the last token's place is not looked at.
    assert np.all(found.ticks >= 5 + 198)
    sure = simulate(np.zeros((2, 1, 200), np.int8), [1], stages=5)
    assert sure.ticks.tolist() == [5 + 198]


def test_wrong_numbers_are_refused():
    words = draw_words([0.5], 10, 2, seed=0)
    for passes, width, stages in (([1, 2], 4, 1), ([0], 4, 1), ([1], 0, 1), ([1], 4, 0), ([1], 4, (1, 1, 2))):
        with pytest.raises(ValueError, match=r"passes|stage"):
            simulate(words, passes, width=width, stages=stages)


def test_no_hierarchy_makes_more_tokens_a_pass_than_the_bound():
    text = np.asarray([[1, 5, 5, 5, 0, 5, 0], [1, 5, 5, 5, 5, 5, 5]])
    # Three right guesses and one's own; one right guess and one's own.
    assert most_tokens_per_pass(text, 8) == 3
    assert most_tokens_per_pass(text, 2) == 2
    words = draw_words([0.8, 0.7], 400, 1, seed=3)
    for width in (2, 4, 16):
        found = simulate(words, [12, 3], width=width).tokens_per_tick[0]
        assert 1 < found <= most_tokens_per_pass(words[:, 0], width)
