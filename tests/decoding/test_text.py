"""Streamed text: nothing of a stop string is shown, and the result does not depend on how tokens are fed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipedec_jax.decoding.detokenizer import Detokenizer
from pipedec_jax.decoding.text import TextStream
from pipedec_jax.tokenizer import Tokenizer

narrow = st.text(alphabet="ab日🎉 ", max_size=30)
stops = st.lists(st.text(alphabet="ab日🎉 ", min_size=1, max_size=5), max_size=3)


@pytest.fixture(scope="module", params=["byte_level_dir", "byte_fallback_dir"])
def tokenizer(request) -> Tokenizer:
    return Tokenizer.load(request.getfixturevalue(request.param))


def answer_tokens(tokenizer, text):
    """A prompt, and tokens that continue it with exactly `text`."""
    prompt = tokenizer.encode("x")
    whole = [*prompt, *(token for character in text for token in spell(tokenizer, character))]
    assert tokenizer.decode(whole) == "x" + text
    return prompt, whole[len(prompt) :]


def spell(tokenizer, character):
    prompt = tokenizer.encode("x")
    both = tokenizer.encode("x" + character)
    if both[: len(prompt)] == prompt:
        return both[len(prompt) :]
    return tokenizer.encode(character)[1:]


def certain_text(tokenizer, prompt, tokens):
    detokenizer = Detokenizer(tokenizer, prompt)
    return "".join(text for token in tokens for _, text in detokenizer.feed(token))


def expected(text, stop):
    """The text up to the first completed stop string, by looking at every prefix."""
    for end in range(1, len(text) + 1):
        ended = [s for s in stop if text[:end].endswith(s)]
        if ended:
            return text[: end - max(map(len, ended))], end
    return text, None


@given(text=narrow, stop=stops, data=st.data())
def test_any_chunking_gives_the_text_before_the_first_stop(tokenizer, text, stop, data):
    prompt, tokens = answer_tokens(tokenizer, text)
    stream = TextStream(tokenizer, prompt, stop)
    shown, fed = [], 0
    while fed < len(tokens) and stream.stopped_at is None:
        size = data.draw(st.integers(1, len(tokens) - fed))
        shown.append(stream.feed(tokens[fed : fed + size]))
        fed += size
        if stream.stopped_at is None:
            # Only what may still become a stop string waits.
            held = certain_text(tokenizer, prompt, tokens[:fed]).removeprefix("".join(shown))
            assert not held or any(s.startswith(held) and s != held for s in stop)
    shown.append(stream.finish())
    wanted, end = expected(text, stop)
    assert "".join(shown) == stream.text == wanted
    if end is None:
        assert stream.stopped_at is None
    else:
        assert stream.stopped_at is not None
        # The token that completes the stop string, and not one more.
        count = stream.stopped_at + 1
        assert tokenizer.decode(prompt + tokens[:count]).startswith("x" + text[:end])
        assert not tokenizer.decode(prompt + tokens[: count - 1]).startswith("x" + text[:end])


@given(text=narrow)
def test_without_stop_strings_all_text_is_shown(tokenizer, text):
    prompt, tokens = answer_tokens(tokenizer, text)
    stream = TextStream(tokenizer, prompt)
    assert "".join([stream.feed([token]) for token in tokens] + [stream.finish()]) == text


def test_a_held_back_start_is_shown_when_it_leads_nowhere(byte_level_dir):
    tokenizer = Tokenizer.load(byte_level_dir)
    prompt, tokens = answer_tokens(tokenizer, "a</b")
    stream = TextStream(tokenizer, prompt, ["</s>"])
    assert [stream.feed([token]) for token in tokens] == ["a", "", "", "</b"]


def test_overlapping_starts_of_a_stop_string_are_followed(byte_level_dir):
    tokenizer = Tokenizer.load(byte_level_dir)
    prompt, tokens = answer_tokens(tokenizer, "xaaab tail")
    stream = TextStream(tokenizer, prompt, ["aab"])
    assert stream.feed(tokens) + stream.finish() == "xa"
    assert stream.stopped_at == 4


def test_nothing_is_taken_after_a_stop(byte_level_dir):
    tokenizer = Tokenizer.load(byte_level_dir)
    prompt, tokens = answer_tokens(tokenizer, "a;b;")
    stream = TextStream(tokenizer, prompt, [";"])
    assert stream.feed(tokens) == "a"
    assert stream.feed(tokens) == ""
    assert stream.finish() == ""
    assert stream.stopped_at == 1


def test_an_open_character_at_the_end_is_shown_as_the_tokenizer_does(byte_level_dir):
    tokenizer = Tokenizer.load(byte_level_dir)
    prompt, tokens = answer_tokens(tokenizer, "a🎉")
    stream = TextStream(tokenizer, prompt)
    cut = tokens[:-1]
    assert stream.feed(cut) == "a"
    assert stream.finish() == tokenizer.decode(prompt + cut)[2:]


def test_an_empty_stop_string_is_an_error(byte_level_dir):
    with pytest.raises(ValueError, match="must not be empty"):
        TextStream(Tokenizer.load(byte_level_dir), (), ["a", ""])
