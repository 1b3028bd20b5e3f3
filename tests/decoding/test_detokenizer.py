"""Text given token by token is what the tokenizer decodes at once, and no character is ever split."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipedec_jax.decoding.detokenizer import REPLACEMENT, Detokenizer
from pipedec_jax.tokenizer import PieceRules, Tokenizer

text = st.text(alphabet=st.one_of(st.sampled_from(" \n▁aé日🎉👩‍🚀"), st.characters(codec="utf-8")), max_size=40)


@pytest.fixture(scope="module", params=["byte_level_dir", "byte_fallback_dir"])
def tokenizer(request) -> Tokenizer:
    return Tokenizer.load(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def byte_level_tokenizer(byte_level_dir) -> Tokenizer:
    return Tokenizer.load(byte_level_dir)


def pieces_of(tokenizer, tokens, prompt=()):
    detokenizer = Detokenizer(tokenizer, prompt)
    return [detokenizer.feed(token) for token in tokens], detokenizer.finish()


def joined(fed, rest):
    return "".join(text for pieces in [*fed, rest] for _, text in pieces)


@given(data=st.data())
def test_any_tokens_give_what_the_tokenizer_decodes(tokenizer, data):
    tokens = data.draw(st.lists(st.integers(0, tokenizer.size + 3), max_size=30))
    assert joined(*pieces_of(tokenizer, tokens)) == tokenizer.decode(tokens)


def added(content: str, token: int, **flags: bool) -> dict:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    return {"id": token, "content": content} | plain | flags


REPLACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
YIS = {"type": "Sequence", "decoders": [REPLACE, {"type": "ByteFallback"}, {"type": "Fuse"}]}
METASPACE = {"type": "Metaspace", "replacement": "▁", "split": True}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def and_fuse(decoder: dict) -> dict:
    return {"type": "Sequence", "decoders": [decoder, {"type": "Fuse"}]}


PUBLISHED = {
    # Some of its added tokens are characters by which the others spell bytes.
    "DeepSeek Coder": ("byte_level_dir", ["õ", "÷", "Á", "ø", "<\uff5cfim▁hole\uff5c>", "<|User|>"], None),
    "R1 on LLaMA": ("byte_level_dir", ["<think>", "</think>", "<\uff5ctool▁calls▁begin\uff5c>"], None),
    "Yi": ("byte_fallback_dir", ["<|im_start|>", "<|im_end|>"], YIS),
    "spaces as tokens": ("byte_fallback_dir", ["  ", "    ", "▁▁", "\t", "<0x41>"], None),
    # As the `tokenizers` library's own `SentencePieceBPETokenizer` writes it.
    "Metaspace": ("byte_fallback_dir", ["<|im_start|>", "▁▁a▁"], METASPACE | {"prepend_scheme": "always"}),
    "Metaspace, no space before": ("byte_fallback_dir", ["<|im_start|>"], METASPACE | {"prepend_scheme": "never"}),
    "Metaspace, fused": ("byte_fallback_dir", ["<|im_start|>"], and_fuse(METASPACE | {"prepend_scheme": "always"})),
    "bytes, fused": ("byte_level_dir", ["<|im_start|>"], and_fuse(BYTE_LEVEL)),
    "no decoder": ("byte_fallback_dir", ["<|im_start|>"], {}),
}


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request, tmp_path_factory) -> Tokenizer:
    """A tokenizer with added tokens and a decoder as in published models."""
    fixture, tokens, decoder = PUBLISHED[request.param]
    source, directory = request.getfixturevalue(fixture), tmp_path_factory.mktemp("published")
    description = json.loads((source / "tokenizer.json").read_text())
    first = max(description["model"]["vocab"].values()) + 1
    for number, token in enumerate(tokens):
        description["added_tokens"].append(added(token, first + number, rstrip=number % 2 == 1))
    if decoder is not None:
        description["decoder"] = decoder or None
    (directory / "tokenizer.json").write_text(json.dumps(description))
    return Tokenizer.load(directory)


@given(data=st.data())
def test_added_tokens_of_published_models_are_streamed_as_they_are_decoded(published, data):
    size = published.size
    tokens = data.draw(st.lists(st.integers(0, size) | st.integers(size - 8, size), max_size=20))
    assert joined(*pieces_of(published, tokens)) == published.decode(tokens)


@given(text=text)
def test_no_character_of_a_text_is_ever_split(tokenizer, text):
    tokens = tokenizer.encode(text)
    fed, rest = pieces_of(tokenizer, tokens)
    decoded = tokenizer.decode(tokens)
    assert joined(fed, rest) == decoded
    if REPLACEMENT not in decoded:
        assert REPLACEMENT not in joined(fed, [])


@given(before=text.filter(lambda text: text.strip(" ▁")), after=text)
def test_text_after_a_prompt_continues_it(tokenizer, before, after):
    prompt = tokenizer.encode(before)
    tokens = tokenizer.encode(after)[1:]  # Without the begin-of-text token.
    assert tokenizer.decode(prompt) + joined(*pieces_of(tokenizer, tokens, prompt)) == tokenizer.decode(prompt + tokens)


@given(text=text, data=st.data())
def test_pieces_belong_to_the_tokens_that_complete_them(byte_level_tokenizer, text, data):
    """The pieces of the first n tokens are what these decode to, up to an open character."""
    tokens = byte_level_tokenizer.encode(text)
    fed, rest = pieces_of(byte_level_tokenizer, tokens)
    pieces = [piece for group in [*fed, rest] for piece in group]
    count = data.draw(st.integers(0, len(tokens)))
    covered = "".join(text for index, text in pieces if index < count)
    decoded = byte_level_tokenizer.decode(tokens[:count])
    assert decoded.startswith(covered)
    assert set(decoded.removeprefix(covered)) <= {REPLACEMENT}


@given(text=st.text(alphabet="日本🎉é", min_size=1, max_size=8))
def test_each_character_of_a_byte_run_belongs_to_its_last_byte(text):
    reader = Detokenizer(FakeByteFallback())
    data = text.encode()
    pieces = [piece for byte in data for piece in reader.feed(byte)] + reader.finish()
    ends = [len("".join(text[: n + 1]).encode()) - 1 for n in range(len(text))]
    assert pieces == list(zip(ends, text, strict=True))


class FakeByteFallback:
    """A tokenizer whose tokens are the 256 bytes."""

    rules = PieceRules("byte_fallback")

    def piece(self, token):
        return f"<0x{token:02X}>"


def test_text_is_given_as_soon_as_it_is_certain(byte_level_dir):
    tokenizer = Tokenizer.load(byte_level_dir)
    tokens = tokenizer.encode("ab🎉")[1:]
    fed, rest = pieces_of(tokenizer, tokens)
    assert not rest
    emoji_bytes = len(tokens) - next(n for n in range(1, len(tokens)) if tokenizer.decode(tokens[:n]) == "ab")
    assert ["".join(text for _, text in group) for group in fed][-emoji_bytes:] == [""] * (emoji_bytes - 1) + ["🎉"]


def test_byte_fallback_keeps_the_leading_space_after_a_prompt(byte_fallback_dir):
    tokenizer = Tokenizer.load(byte_fallback_dir)
    word = tokenizer.encode("quick")[1:]
    assert joined(*pieces_of(tokenizer, word)) == "quick"
    assert joined(*pieces_of(tokenizer, word, [1])) == "quick"
    assert joined(*pieces_of(tokenizer, word, tokenizer.encode("the"))) == " quick"


def test_a_prompt_of_bytes_is_text_before_the_answer_too(byte_fallback_dir):
    tokenizer = Tokenizer.load(byte_fallback_dir)
    word = tokenizer.encode("quick")[1:]
    prompt = [1, *(token for token in range(tokenizer.size) if tokenizer.piece(token) in ("<0x41>", "<0x42>"))]
    assert len(prompt) == 3
    assert joined(*pieces_of(tokenizer, word, prompt)) == " quick"


def test_a_character_that_the_prompt_began_and_nobody_ends_is_not_the_answers():
    opened, letter = "日".encode()[0], ord("A")
    fed, rest = pieces_of(FakeByteFallback(), [letter], [letter, opened])
    assert [piece for group in [*fed, rest] for piece in group] == [(0, REPLACEMENT)]


def test_a_character_that_is_never_complete_belongs_to_the_last_token(byte_level_tokenizer):
    tokens = byte_level_tokenizer.encode("ab日")[1:-1]
    assert byte_level_tokenizer.decode(tokens) == "ab" + REPLACEMENT
    _, rest = pieces_of(byte_level_tokenizer, tokens)
    assert rest == [(len(tokens) - 1, REPLACEMENT)]


@pytest.mark.parametrize("piece", ["<0xGG>", "<0x4>", "<0x+4>", "<0x414>", "0x41"])
def test_what_only_looks_like_a_byte_is_text(piece, monkeypatch):
    monkeypatch.setattr(FakeByteFallback, "piece", lambda *_: piece)
    assert joined(*pieces_of(FakeByteFallback(), [0, 0])) == 2 * piece


def test_a_character_that_the_prompt_left_open_is_completed(tokenizer):
    tokens = tokenizer.encode("x🎉")
    for cut in range(len(tokens) - 1, 2, -1):
        if REPLACEMENT in tokenizer.decode(tokens[:cut]):
            assert joined(*pieces_of(tokenizer, tokens[cut:], tokens[:cut])) == "🎉"


def test_work_per_token_does_not_grow(byte_level_dir):
    """Each token's string is looked up once, whatever came before."""
    tokenizer = Tokenizer.load(byte_level_dir)
    looked_up = []
    original = tokenizer.piece
    tokenizer.piece = lambda token: looked_up.append(token) or original(token)
    tokens = tokenizer.encode("def f(x): return x\n" * 50)
    pieces_of(tokenizer, tokens)
    assert looked_up == tokens
