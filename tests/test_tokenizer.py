"""The tokenizer wrapper: prompts, chats, what it imports, and comparing token maps."""

import json
import shutil
import subprocess
import sys

import pytest

from pipedec_jax import small_files
from pipedec_jax.tokenizer import NO_ADVICE, PieceRules, Tokenizer, check_same_tokens
from tests.conftest import CORPUS, write_byte_level

SAMPLE = 'def héllo(x):\n    return "日本 🎉" , x\n'


@pytest.fixture(params=["byte_level_dir", "byte_fallback_dir"])
def directory(request):
    return request.getfixturevalue(request.param)


def test_ids_and_text_equal_those_of_transformers(directory):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer = Tokenizer.load(directory)
    for text in [SAMPLE, *CORPUS]:
        tokens = tokenizer.encode(text)
        assert tokens == reference(text)["input_ids"]
        assert tokenizer.decode(tokens) == text


def test_rules_follow_the_decoder(byte_level_dir, byte_fallback_dir):
    assert Tokenizer.load(byte_level_dir).rules == PieceRules("byte_level")
    assert Tokenizer.load(byte_fallback_dir).rules == PieceRules("byte_fallback", (("▁", " "),), 1)


def test_text_that_is_none_is_refused_with_its_place(directory):
    with pytest.raises(ValueError, match=r"no valid Unicode text \(surrogates not allowed at character 2\)"):
        Tokenizer.load(directory).encode("ab\ud800")


def test_size_counts_added_tokens(byte_level_dir):
    tokenizer = Tokenizer.load(byte_level_dir)
    assert tokenizer.size == len(tokenizer.vocabulary) == 400
    assert {tokenizer.vocabulary["<|begin_of_text|>"], tokenizer.vocabulary["<|eot_id|>"]} < tokenizer.special_ids


def test_size_is_the_highest_id_and_one_where_ids_are_left_out(byte_level_dir, tmp_path):
    description = json.loads((byte_level_dir / "tokenizer.json").read_text())
    vocabulary, added = description["model"]["vocab"], description["added_tokens"]
    added.append({**added[0], "id": 450, "content": "<|apart|>"})
    vocabulary["<|apart|>"] = 450
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.size, len(tokenizer.vocabulary)) == (451, 401)


def test_a_label_is_the_text_or_the_number_of_what_has_none(directory):
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.label(tokenizer.vocabulary["d"]) == "d"
    begin = next(iter(tokenizer.special_ids))
    assert [tokenizer.label(token) for token in (begin, -1, 10**6)] == [f"<{begin}>", "<-1>", "<1000000>"]


def plain_bpe(ranks: dict[bytes, int], word: bytes) -> list[int]:
    """A word that is a token is that token; else the neighbours with the lowest rank merge, over and over."""
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([byte]) for byte in word]
    while True:
        pairs = {(parts[i] + parts[i + 1], i) for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in ranks}
        if not pairs:
            return [ranks[part] for part in parts]
        token, i = min(pairs, key=lambda pair: (ranks[pair[0]], pair[1]))
        parts[i : i + 2] = [token]


def test_metas_tiktoken_model_is_read(tmp_path):
    import base64

    merges = [
        b"he",
        b"ll",
        b"lo",
        b"hel",
        b"hello",
        b" w",
        b"or",
        b" wor",
        b"ld",
        b" world",
        b"12",
        b"\xc3\xa9",
        b"def",
    ]
    ranks = {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *merges])}
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    tokenizer = Tokenizer.load(tmp_path)
    # As LLaMA 3 splits it: words with the space before them, digits by three, a mark with the line's end.
    words = ["hello", " world", ",", " héllo", " ", "123", "45", "!\n", "def"]
    text = "".join(words)
    expected = [269, *(token for word in words for token in plain_bpe(ranks, word.encode()))]
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected) == text
    assert tokenizer.rules == PieceRules("byte_level")
    assert tokenizer.size == 269 + 256
    assert tokenizer.end_token == 270
    assert tokenizer.label(0) == "\0"
    names = {token: name for name, token in tokenizer.vocabulary.items()}
    assert [names[269 + index] for index in (4, 8, 9, 11, 255)] == [
        "<|finetune_right_pad_id|>", "<|eom_id|>", "<|eot_id|>", "<|reserved_special_token_3|>",
        "<|reserved_special_token_247|>",
    ]  # fmt: skip
    (tmp_path / "params.json").write_text('{"use_scaled_rope": false}')
    names = {token: name for name, token in Tokenizer.load(tmp_path).vocabulary.items()}
    assert [names[269 + index] for index in (4, 8, 9, 255)] == [
        "<|reserved_special_token_2|>", "<|reserved_special_token_4|>", "<|eot_id|>", "<|reserved_special_token_250|>",
    ]  # fmt: skip
    for part in (lines[:300:2], lines[:255]):  # a gap; a byte that is no token
        (tmp_path / "tokenizer.model").write_bytes(b"\n".join(part))
        with pytest.raises(ValueError, match=r"cannot read the tokenizer in .*: its tokens are not numbered"):
            Tokenizer.load(tmp_path)


def test_chat_puts_the_template_around_the_message_once(byte_level_dir):
    tokenizer = Tokenizer.load(byte_level_dir)
    text = tokenizer.chat_text("Hi")
    assert text == "<|begin_of_text|><|user|>Hi<|eot_id|><|assistant|>"
    tokens = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert tokens.count(tokenizer.vocabulary["<|begin_of_text|>"]) == 1
    assert tokens.count(tokenizer.vocabulary["<|eot_id|>"]) == 1


@pytest.mark.parametrize("messages", [3, ["Hi"], {"role": "user", "content": "Hi"}])
def test_messages_that_are_none_are_refused(byte_level_dir, messages):
    with pytest.raises(ValueError, match=r"a chat is a text, or a list of {.*}, not "):
        Tokenizer.load(byte_level_dir).chat_text(messages)


def test_chat_without_a_template_is_an_error(byte_fallback_dir):
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer.load(byte_fallback_dir).encode_chat("Hi")


def test_chat_template_in_a_file_of_its_own(byte_level_dir, tmp_path):
    shutil.copytree(byte_level_dir, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    assert Tokenizer.load(tmp_path).chat_text("Hi") == "[Hi]"


@pytest.mark.parametrize(
    ("name", "flags", "in_file", "begins"),
    [
        ("LlamaTokenizerFast", {"add_bos_token": True}, False, True),  # as DeepSeek's
        ("LlamaTokenizer", {"add_bos_token": False}, True, False),  # as Phi 3's
        ("CodeLlamaTokenizer", {"add_bos_token": True}, False, True),
        ("LlamaTokenizerFast", {}, False, False),
        ("LlamaTokenizerFast", {"add_bos_token": None}, True, True),
        ("PreTrainedTokenizerFast", {"add_bos_token": True}, False, False),
    ],
)
def test_llamas_classes_begin_a_prompt_as_their_settings_say(name, flags, in_file, begins, byte_level_dir, tmp_path):
    description = json.loads((byte_level_dir / "tokenizer.json").read_text())
    if not in_file:
        description["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    settings = json.loads((byte_level_dir / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": name} | flags))
    tokenizer = Tokenizer.load(tmp_path)
    begin = tokenizer.vocabulary["<|begin_of_text|>"]
    plain = Tokenizer.load(byte_level_dir).encode("def f")[1:]
    assert tokenizer.encode("def f") == ([begin, *plain] if begins else plain)


def test_equal_maps_pass_and_the_first_differing_token_is_named(byte_level_dir, tmp_path):
    target = Tokenizer.load(byte_level_dir)
    check_same_tokens(target, Tokenizer.load(write_byte_level(tmp_path / "same", chat=False)))
    other = Tokenizer.load(write_byte_level(tmp_path / "other", extra=("<|extra|>",)))
    with pytest.raises(ValueError, match=r"'!' is id 3 in the target's map and id 4 in the draft's") as error:
        check_same_tokens(target, other)
    assert "<|begin_of_text|>" not in str(error.value)  # The same in both.
    smaller = Tokenizer.load(write_byte_level(tmp_path / "smaller", vocab_size=390))
    with pytest.raises(ValueError, match=r"is id 390 in the target's map and no such token in the draft's \(10 tokens"):
        check_same_tokens(target, smaller)


def test_tokens_that_were_added_may_differ(byte_level_dir, tmp_path):
    """As those of LLaMA 3 and 3.2 do, and where one model has a padding token."""
    target = Tokenizer.load(byte_level_dir)
    other = Tokenizer.load(byte_level_dir)
    other.backend.add_special_tokens({"pad_token": "<pad>"})
    other.backend.add_tokens(["<tool>"])
    check_same_tokens(target, Tokenizer(other.backend))
    check_same_tokens(Tokenizer(other.backend), target)
    description = json.loads((byte_level_dir / "tokenizer.json").read_text())
    for token in description["added_tokens"]:
        if token["content"] == "<|eot_id|>":
            del description["model"]["vocab"]["<|eot_id|>"]
            token["content"] = "<|finetune_right_pad_id|>"
            description["model"]["vocab"]["<|finetune_right_pad_id|>"] = token["id"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    renamed = Tokenizer.load(tmp_path)
    assert renamed.vocabulary != target.vocabulary
    check_same_tokens(target, renamed)
    # A piece of text that is an added token to the other is a difference still.
    ordinary = min(set(target.vocabulary) - target.added, key=target.vocabulary.__getitem__)
    del description["model"]["vocab"][ordinary]
    place = target.vocabulary[ordinary]
    description["model"]["vocab"]["<|new|>"] = place
    description["added_tokens"].append({**description["added_tokens"][0], "id": place, "content": "<|new|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    clash = Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match=rf"is id {place} in the target's map and no such token in the draft's"):
        check_same_tokens(target, clash)


def test_missing_and_broken_files_are_named(byte_level_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*tokenizer\.json or tokenizer\.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text((byte_level_dir / "tokenizer.json").read_text()[:200])
    with pytest.raises(ValueError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_files_that_are_too_large_are_refused(byte_level_dir, monkeypatch, name):
    size = (byte_level_dir / name).stat().st_size
    monkeypatch.setattr(small_files, "MOST_BYTES", {name: size - 1})
    with pytest.raises(ValueError, match=rf"{name} has more than {size - 1:,} bytes"):
        Tokenizer.load(byte_level_dir)
    monkeypatch.setattr(small_files, "MOST_BYTES", {name: size})
    Tokenizer.load(byte_level_dir)


def test_decoders_of_other_families_are_refused(byte_level_dir, tmp_path):
    description = json.loads((byte_level_dir / "tokenizer.json").read_text())
    description["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"unsupported tokenizer decoder \(WordPiece\)"):
        Tokenizer.load(tmp_path)
    for content, stop in ((" ", 1), ("_", 0)):
        strip = {"type": "Strip", "content": content, "start": 1, "stop": stop}
        description["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, strip]}
        (tmp_path / "tokenizer.json").write_text(json.dumps(description))
        with pytest.raises(ValueError, match=rf"decoder \(ByteFallback, Fuse, Strip, stripping '{content}'\)"):
            Tokenizer.load(tmp_path)


def test_tokenizing_imports_neither_torch_nor_model_classes(byte_level_dir):
    program = (
        "import sys\n"
        "import pipedec_jax\n"
        "assert 'transformers' not in sys.modules and 'jax' not in sys.modules, 'import must stay light'\n"
        "from pipedec_jax.tokenizer import Tokenizer\n"
        "tokenizer = Tokenizer.load(sys.argv[1])\n"
        "tokenizer.decode(tokenizer.encode_chat('Hi'))\n"
        "assert 'torch' not in sys.modules\n"
        "assert not [name for name in sys.modules if name.startswith('transformers.') and '.modeling_' in name]\n"
    )
    subprocess.run([sys.executable, "-c", program, str(byte_level_dir)], check=True, timeout=120)


WITHOUT_TORCH = "import os, sys; sys.modules['torch'] = None\n"
LOADING = (
    "before = dict(os.environ)\n"
    "from pipedec_jax.tokenizer import Tokenizer\n"
    "Tokenizer.load(sys.argv[1])\n"
    "assert dict(os.environ) == before\n"
)


@pytest.mark.parametrize("given", [None, ""])
def test_without_torch_nothing_is_said_and_the_environment_stays(byte_level_dir, monkeypatch, given):
    if given is None:
        monkeypatch.delenv(NO_ADVICE, raising=False)
    else:
        monkeypatch.setenv(NO_ADVICE, given)

    def said(program):
        command = [sys.executable, "-c", WITHOUT_TORCH + program, str(byte_level_dir)]
        done = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True)
        return done.stdout + done.stderr

    assert said(LOADING) == ""
    if given is None:
        assert "PyTorch" in said("import transformers"), "what there would be to hear"
