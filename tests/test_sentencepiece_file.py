"""Sentencepiece's models: ids are the library's own, around the added tokens; other families are refused."""

import json

import pytest

from pipedec_jax.tokenizer import Tokenizer
from tests.conftest import CORPUS


def sentencepiece_model(directory, **settings):
    """Train a `tokenizer.model` in a directory, as LLaMA's but for `settings`."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (directory / "corpus.txt").write_text("\n".join(CORPUS * 20))
    as_llamas = {
        "byte_fallback": True,
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "corpus.txt"),
        model_prefix=str(directory / "tokenizer"),
        character_coverage=0.98,
        minloglevel=2,
        **({"vocab_size": 400} | as_llamas | settings),
    )
    return sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model"))


def test_sentencepiece_model_is_converted(tmp_path):
    reference = sentencepiece_model(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    text = "def push(self, Ω):\n    return item"
    assert tokenizer.encode(text) == [1, *reference.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.rules.kind == "byte_fallback"
    for settings, before, expected in (
        ({"add_bos_token": False}, "", reference.encode(text)),
        ({"add_eos_token": True}, "", [1, *reference.encode(text), 2]),
        ({"add_prefix_space": False}, " ", [1, *reference.encode(text)]),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        assert Tokenizer.load(tmp_path).encode(before + text) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},  # as OpenLLaMA's
        {"model_type": "unigram", "vocab_size": 340},  # as Sarashina's
        {"user_defined_symbols": ["def", "  ", "<|im_start|>"]},  # as Yi's
    ],
    ids=["LLaMA", "no space before", "spaces dropped, NFKC", "unigram", "user-defined"],
)
def test_spaces_and_characters_are_taken_as_sentencepiece_takes_them(settings, tmp_path):
    reference = sentencepiece_model(tmp_path, **settings)
    tokenizer = Tokenizer.load(tmp_path)
    for text in [
        "",
        " ",
        "  def f",
        "<|im_start|>def  def",
        "\n  x = 1  \n",
        "▁▁a",
        "a   b ",
        " a ",
        "\uff46ull ﬁne\u00a0™ …\t!",
        *CORPUS,
    ]:
        tokens = tokenizer.encode(text)
        assert tokens == [1, *reference.encode(text)]
        assert tokenizer.decode(tokens) == reference.decode(tokens[1:])
        if not settings:
            assert tokenizer.decode(tokens) == text.replace("▁", " ")


CHATML = "<|im_start|>user\nx  y<|im_end|> z</s>def"


@pytest.mark.parametrize(("legacy", "space"), [(False, ""), (True, "▁"), (None, "▁")])
def test_added_tokens_are_found_anywhere_beside_a_sentencepiece_model(legacy, space, tmp_path):
    """As in Orca 2, whose added tokens are in a file of their own; only legacy tokenizers put a space after them."""
    reference = sentencepiece_model(tmp_path)
    size = reference.get_piece_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size + 1, "<|im_start|>": size}))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": legacy}))
    tokenizer = Tokenizer.load(tmp_path)

    def plain(text: str) -> list[int]:
        """Without the space that the library puts before a text."""
        tokens = reference.encode("\n" + text)
        newline = reference.encode("\n")
        assert tokens[: len(newline)] == newline
        return tokens[len(newline) :]

    def after(text: str) -> list[int]:
        return reference.encode(text) if space else plain(text)

    expected = [1, size, *after("user\nx  y"), size + 1, *after(" z"), 2, *after("def")]
    assert tokenizer.encode(CHATML) == expected
    assert tokenizer.encode(" a") == [1, *reference.encode(" a")]
    text = CHATML.replace("</s>", "")
    assert tokenizer.decode(expected) == (text if not space else "<|im_start|> user\nx  y<|im_end|>  z def")


def test_of_added_tokens_that_begin_alike_the_longest_is_found_with_the_spaces_that_it_takes(tmp_path):
    """A piece that the model finds by itself is an added token where the checkpoint says that it is special."""
    reference = sentencepiece_model(tmp_path, user_defined_symbols=["<u>", "<v>"])
    size, own = reference.get_piece_size(), reference.piece_to_id("<u>")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = {
        str(own): plain | {"content": "<u>"},
        str(size): plain | {"content": "<a"},
        str(size + 1): plain | {"content": "<a>", "rstrip": True},
        str(size + 2): plain | {"content": "<b>", "lstrip": True},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = Tokenizer.load(tmp_path)
    x = reference.encode("x")
    assert tokenizer.encode("<a>  x <b>x<ax") == [1, size + 1, *x, size + 2, *x, size, *x]
    assert tokenizer.encode("<u>x<v>x") == [1, own, *reference.encode("x<v>x")]


def test_pieces_of_one_score_are_merged_from_the_left_as_sentencepiece_does(tmp_path):
    """Chinese LLaMA's were put behind LLaMA's own, all with the score 0."""
    sentencepiece_model(tmp_path)
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((tmp_path / "tokenizer.model").read_bytes())
    for piece in ("人民", "中国", "国人", "大学", "民大", "中国人", "学生"):
        model.pieces.add(piece=piece, score=0.0)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    reference, tokenizer = SentencePieceProcessor(str(tmp_path / "tokenizer.model")), Tokenizer.load(tmp_path)
    text = "中国人民大学生"
    assert reference.encode(text, out_type=str) == ["▁", "中国人", "民大", "学生"]
    assert tokenizer.encode(text) == [1, *reference.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_characters_that_are_no_piece_are_unknown_where_bytes_are_no_pieces(tmp_path):
    reference = sentencepiece_model(tmp_path, byte_fallback=False, vocab_size=100, hard_vocab_limit=False)
    unknown = reference.unk_id()
    tokens = Tokenizer.load(tmp_path).encode("def Ω日本(a)")
    assert tokens == [1, *reference.encode("def Ω日本(a)")]
    assert tokens.count(unknown) == 1  # three in a row are one


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model_type": "char", "vocab_size": 340},
            "cuts a text neither by byte pairs nor by chances of its pieces, un",
        ),
        ({"treat_whitespace_as_suffix": True}, "puts spaces at the end of words"),
    ],
)
def test_sentencepiece_models_of_other_families_are_refused(settings, message, tmp_path):
    sentencepiece_model(tmp_path, **settings)
    with pytest.raises(ValueError, match=rf"cannot read the tokenizer in .*: tokenizer\.model {message}"):
        Tokenizer.load(tmp_path)


def test_a_model_that_writes_spaces_as_they_are_and_one_of_nothing_are_refused(tmp_path):
    sentencepiece_model(tmp_path)
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((tmp_path / "tokenizer.model").read_bytes())
    model.normalizer_spec.escape_whitespaces = False
    for content, message in (
        (model.SerializeToString(), "does not write spaces as ▁, unlike LLaMA's"),
        (b"", "is neither sentencepiece's nor Meta's: no token was found in it"),
    ):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match=rf"tokenizer\.model {message}"):
            Tokenizer.load(tmp_path)
