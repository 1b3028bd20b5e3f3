"""A stream over a fake engine: where the answer is cut, what is counted, and what a caller may do."""

import contextlib
import dataclasses
import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipedec_jax.decoding.stream import Request, Stream
from pipedec_jax.decoding.text import TextStream
from pipedec_jax.pipeline.progress import Progress
from pipedec_jax.sampling import Sampling
from pipedec_jax.soundness import NotFiniteError
from pipedec_jax.tokenizer import Tokenizer

END = 1  # <|end_of_text|>


@dataclasses.dataclass
class FakeEngine:
    """Commits a given answer, `burst` tokens at a time."""

    answer: list[int]
    ticks: list[int]
    hits: list[bool]
    burst: int = 1
    compile_seconds: float = 0.0
    committed: int = 0
    started: int = 0
    limit: int = 0
    asked: list[int] = dataclasses.field(default_factory=list)
    given: tuple = ()

    def start(self, prompt, *, max_new_tokens, sampling, end_tokens, drafter_params=None):
        self.given = (prompt, sampling, end_tokens, drafter_params)
        self.compile_seconds += 1000.0  # So large that it would show in any other time.
        self.limit = min(max_new_tokens, len(self.answer))
        ends = [n for n, token in enumerate(self.answer) if token in end_tokens]
        self.limit = min([self.limit, *(n + 1 for n in ends)])
        self.committed = 0

    def run(self, new_tokens):
        self.asked.append(new_tokens)
        goal = self.committed + new_tokens
        while self.committed < min(goal, self.limit):
            self.committed = min(self.committed + self.burst, self.limit)
        n = self.committed
        return Progress(
            tokens=self.answer[:n],
            ticks=self.ticks[:n],
            costs=[0.5 * tick for tick in self.ticks[:n]],
            delays=[1 if hit else -1 for hit in self.hits[:n]],
            logprobs=[-0.5 * i for i in range(n)],
            nodes=n,
            done=n == self.limit,
        )


@pytest.fixture(scope="module")
def tokenizer(byte_level_dir) -> Tokenizer:
    return Tokenizer.load(byte_level_dir)


def open_stream(
    tokenizer, text, *, stop=(), method="pipedec", chunk=4, burst=1, max_new_tokens=1000, ends=(END,), lag=1, **options
):
    """A stream whose engine answers with `text`; every third token is a miss and costs 4 ticks instead of 1."""
    answer = [token for part in text for token in ([part] if isinstance(part, int) else tokenizer.encode(part)[1:])]
    hits = [n % 3 != 0 for n in range(len(answer))]
    ticks = [4]
    for hit in hits[:-1]:
        ticks.append(ticks[-1] + (1 if hit else 4))
    request = Request(
        prompt=tuple(tokenizer.encode("x")),
        max_new_tokens=max_new_tokens,
        sampling=Sampling(0.5, seed=3),
        end_tokens=ends,
        stop=tuple(stop),
        **options,
    )
    engine = FakeEngine(answer, ticks, hits, burst)
    return Stream(engine, tokenizer, request, method, lambda cost_per_token: 4 / cost_per_token, chunk, lag), answer


def drain(stream):
    pieces = list(stream)
    assert all(pieces)
    assert "".join(pieces) == stream.result.text
    return stream.result


def test_an_answer_of_full_length(tokenizer):
    stream, answer = open_stream(tokenizer, ["def f(x):\n    return"], max_new_tokens=5)
    result = drain(stream)
    assert result.finish_reason == "length"
    assert result.token_ids == answer[:5]
    assert (result.prompt_tokens, result.new_tokens) == (2, 5)
    # The fake's first tick is 4; tokens 0 and 3 were misses, 1 and 2 hits; the last is not counted.
    assert [token.tick for token in result.tokens] == [4, 8, 9, 10, 14]
    assert (result.ticks, result.ticks_per_token) == (14, 14 / 5)
    assert (result.hits, result.misses, result.late_hits) == (2, 2, 0)
    assert [token.hit for token in result.tokens] == [False, True, True, False, None]
    assert [token.delay for token in result.tokens] == [None, 1, 1, None, None]
    assert result.modeled_cost == 7
    assert result.modeled_speedup_vs_pp == pytest.approx(4 / (7 / 5))


def test_the_end_token_is_a_token_but_not_text(tokenizer):
    stream, answer = open_stream(tokenizer, ["ab", END, "cd"], ends=(END + 1, END))
    result = drain(stream)
    assert result.finish_reason == "end"
    assert result.text == "ab"
    assert result.token_ids[-1] == END
    assert result.token_ids == answer[: answer.index(END) + 1]


def test_an_end_token_that_has_text_shows_none(tokenizer):
    (end,) = tokenizer.encode("c")[1:]
    stream, answer = open_stream(tokenizer, ["a", "b", end], ends=(end,))
    stream._progress = stream._engine.run(3)  # as after an interrupt before the text was read
    assert (stream.partial().text, stream.partial().token_ids) == ("ab", answer)
    result = drain(stream)
    assert (result.text, result.token_ids, result.finish_reason) == ("ab", answer, "end")


def test_an_end_token_right_away_gives_an_empty_text(tokenizer):
    stream, _ = open_stream(tokenizer, [END, "cd"])
    result = drain(stream)
    assert (result.text, result.token_ids, result.hits, result.misses) == ("", [END], 0, 0)
    assert result.tpot_s is None


def test_a_stop_string_cuts_text_and_tokens(tokenizer):
    stream, _ = open_stream(tokenizer, ["return items\nprint(x)"], stop=["\n"], chunk=50)
    result = drain(stream)
    assert result.finish_reason == "stop"
    assert result.text == "return items"
    decoded = tokenizer.decode(result.token_ids)
    assert decoded.startswith("return items\n")
    assert "\n" not in tokenizer.decode(result.token_ids[:-1])
    assert result.ticks == result.tokens[-1].tick
    assert result.hits + result.misses == result.new_tokens - 1


def test_nothing_is_decoded_after_a_stop_string(tokenizer):
    stream, answer = open_stream(tokenizer, ["ab;", "cd" * 20], stop=[";"], chunk=2)
    drain(stream)
    assert stream._engine.committed <= stream.result.new_tokens + 2 < len(answer)


def test_a_stop_string_goes_before_a_later_end_token(tokenizer):
    stream, _ = open_stream(tokenizer, ["ab;", "cd", END], stop=[";"], chunk=50)
    assert drain(stream).finish_reason == "stop"
    stream, _ = open_stream(tokenizer, ["ab;"], stop=[";"], max_new_tokens=3)
    assert drain(stream).finish_reason == "stop"


def test_a_half_seen_stop_string_is_text_when_the_answer_ends(tokenizer):
    stream, _ = open_stream(tokenizer, ["ab</", END], stop=["</s>"])
    result = drain(stream)
    assert (result.text, result.finish_reason) == ("ab</", "end")


@given(chunk=st.integers(1, 30), burst=st.integers(1, 5), stop=st.sampled_from([(), ("\n",), ("s)", "it"), ("日",)]))
def test_the_answer_does_not_depend_on_chunks(tokenizer, chunk, burst, stop):
    text = ["print(items)\n", "日本 🎉", END, "never"]
    plain, _ = open_stream(tokenizer, text, stop=stop, chunk=1)
    other, _ = open_stream(tokenizer, text, stop=stop, chunk=chunk, burst=burst)
    timeless = [dataclasses.replace(drain(stream), compile_s=0.0, ttft_s=0.0, tpot_s=0.0) for stream in (plain, other)]
    assert timeless[0] == timeless[1]


def test_pp_has_neither_hits_nor_misses(tokenizer):
    stream, _ = open_stream(tokenizer, ["abc"], method="pp")
    result = drain(stream)
    assert (result.hits, result.misses, result.late_hits) == (None, None, None)
    assert {token.hit for token in result.tokens} == {None}


def test_logprobs_only_when_asked_for(tokenizer):
    with_them, _ = open_stream(tokenizer, ["abc"], logprobs=True)
    assert [token.logprob for token in drain(with_them).tokens][:2] == [0.0, -0.5]
    without, _ = open_stream(tokenizer, ["abc"])
    assert {token.logprob for token in drain(without).tokens} == {None}


def test_compiling_is_kept_out_of_the_other_times(tokenizer):
    stream, _ = open_stream(tokenizer, ["def f(x):"])
    # The fake says it compiled for 1000 seconds though none passed, so a time without them is as much below zero.
    result = drain(stream)
    assert result.compile_s == 1000.0
    assert -1000 < result.ttft_s < -900
    assert result.tpot_s is not None
    assert 0 <= result.tpot_s < 1


def test_time_per_token_is_that_of_the_tokens_after_the_first(tokenizer, monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))  # each look at the clock takes one
    stream, _ = open_stream(tokenizer, ["def f(x):\n    return"], max_new_tokens=7, chunk=3)
    result = drain(stream)
    assert result.ttft_s == 2 - result.compile_s  # prefill, and the first token
    assert result.tpot_s == pytest.approx(2 / 6)  # twice three tokens


def test_what_was_compiled_before_is_not_this_answers(tokenizer):
    first, _ = open_stream(tokenizer, ["abc"])
    second = Stream(first._engine, tokenizer, first._request, "pipedec", lambda _: 1.0, 4)
    assert drain(second).compile_s == 1000.0


def test_the_engine_is_given_what_was_asked_for(tokenizer):
    stream, _ = open_stream(tokenizer, ["abc"], ends=(END, 7), drafter_params="theirs")
    assert stream._engine.given == (tuple(tokenizer.encode("x")), Sampling(0.5, seed=3), (END, 7), "theirs")


def test_a_hit_is_late_by_the_drafters_own_lag(tokenizer):
    late = [drain(open_stream(tokenizer, ["abcdef"], lag=lag)[0]) for lag in (0, 1)]
    assert [result.late_hits > 0 for result in late] == [True, False]
    assert late[0].late_hits == late[0].hits


def test_the_prompt_decides_what_becomes_of_the_first_tokens_space(byte_fallback_dir):
    tokenizer = Tokenizer.load(byte_fallback_dir)
    stream, _ = open_stream(tokenizer, ["return"], ends=())
    assert drain(stream).text == " return"


def test_the_first_token_is_fetched_alone(tokenizer):
    stream, _ = open_stream(tokenizer, ["def f(x): return"], chunk=7)
    drain(stream)
    assert stream._engine.asked[:2] == [1, 7]


def test_the_result_is_not_there_before_the_end(tokenizer):
    stream, _ = open_stream(tokenizer, ["def f(x): return"], chunk=1)
    next(stream)
    with pytest.raises(RuntimeError, match="not complete"):
        _ = stream.result


def test_a_superseded_stream_says_so_unless_it_was_complete(tokenizer):
    stream, _ = open_stream(tokenizer, ["def f(x): return"], chunk=1)
    next(stream)
    stream.supersede()
    with pytest.raises(RuntimeError, match="another answer"):
        next(stream)
    stream, _ = open_stream(tokenizer, ["def"])
    drain(stream)
    stream.supersede()
    assert list(stream) == []
    assert stream.result.text == "def"


def test_figures_are_json_ready(tokenizer):
    import json

    stream, _ = open_stream(tokenizer, ["abc"])
    figures = json.loads(json.dumps(drain(stream).to_dict()))
    assert figures["text"] == "abc"
    assert set(figures) == {
        *("prompt_tokens", "new_tokens", "token_ids", "text", "finish_reason", "ticks", "ticks_per_token", "hits"),
        *("misses", "late_hits", "modeled_cost", "modeled_speedup_vs_pp", "compile_s", "ttft_s", "tpot_s"),
    }


def test_an_answer_under_way_is_given_as_far_as_it_was_committed(tokenizer):
    stream, answer = open_stream(tokenizer, ["def f(x):\n    return"], max_new_tokens=9)
    assert stream.partial() is None
    shown = next(stream)
    while stream._result is None:
        partial = stream.partial()
        assert partial.finish_reason == "interrupted"
        assert partial.token_ids == answer[: partial.new_tokens]
        assert partial.text.startswith(shown)
        assert partial.ticks == partial.tokens[-1].tick
        shown += next(stream, "")
    assert stream.partial() is stream.result


def test_an_answer_under_way_shows_what_might_have_become_a_stop_string(tokenizer):
    stream, _ = open_stream(tokenizer, ["ab", "cd", "ef"], stop=["bcdx"], chunk=1)
    assert next(stream) == "a"
    stream._advance()
    partial = stream.partial()
    assert partial.text.startswith("ab")
    assert "x" not in partial.text


def test_an_answer_under_way_is_cut_at_a_stop_string_that_it_holds(tokenizer):
    stream, answer = open_stream(tokenizer, ["a", "b", ";", "c"], stop=[";"])
    assert stream.partial() is None
    stream._progress = stream._engine.run(4)  # as after an interrupt before the text was read
    assert (stream.partial().text, stream.partial().token_ids) == ("ab", answer[:3])


def test_an_error_leaves_what_was_committed_before_it(tokenizer):
    stream, answer = open_stream(tokenizer, ["def f(x):\n    return"], max_new_tokens=9)
    run, before = stream._engine.run, 0

    def unsound(new_tokens):
        raise NotFiniteError(1, 1, (1, 2), 5, run(before))

    stream._engine.run = unsound
    with pytest.raises(NotFiniteError, match="after 0 tokens of the answer"):
        list(stream)
    assert stream.partial() is None
    before = 3
    with pytest.raises(NotFiniteError, match=r"stage 1 of 1 .* in tick 5, after 3 tokens of the answer"):
        list(stream)
    assert stream.partial().token_ids == answer[:3]
    text = stream.partial().text
    assert text
    assert "def f(x):\n    return".startswith(text)


@pytest.mark.parametrize("stop", [(), ("s)",), ("日",)])
@pytest.mark.parametrize("place", ["feed", "finish", "_generation"])
def test_going_on_after_an_interrupt_anywhere_repeats_nothing(tokenizer, monkeypatch, place, stop):
    """Whether an interrupt comes before or after a step of reading the text, the answer is that without one."""
    text = ["print(items)\n", "日本 🎉", END]
    expected = drain(open_stream(tokenizer, text, stop=stop, chunk=2)[0])
    home = Stream if place == "_generation" else TextStream
    real = getattr(home, place)
    for number in range(12):
        for late in (False, True):
            calls = 0

            def interrupted(self, *args, number=number, late=late):
                nonlocal calls
                calls += 1
                if calls == number + 1 and not late:
                    raise KeyboardInterrupt
                found = real(self, *args)
                if calls == number + 1:
                    raise KeyboardInterrupt
                return found

            stream, _ = open_stream(tokenizer, text, stop=stop, chunk=2)
            monkeypatch.setattr(home, place, interrupted)
            pieces: list[str] = []
            while stream._result is None:
                with contextlib.suppress(KeyboardInterrupt):
                    pieces += stream
            monkeypatch.undo()
            assert "".join(pieces) == stream.result.text == expected.text
            assert stream.result.tokens == expected.tokens
