"""Tokenizers of LLaMA checkpoints: text to ids and back, chat templates, and comparing two token maps.

A thin wrapper over `transformers`' fast tokenizer. Only its tokenizer modules are imported, and only when a tokenizer
is loaded: neither PyTorch nor any model class of `transformers` is touched (`AutoTokenizer` would import both).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipedec_jax.sentencepiece_file import Encoder, read_model
from pipedec_jax.small_files import read_small
from pipedec_jax.tiktoken_file import is_tiktoken, read_ranks, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = Mapping[str, str]
"""One turn of a chat: `{"role": "user", "content": "..."}`."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
"""Files that hold a vocabulary; the first one found is read."""
OBEYING = ("LlamaTokenizer", "CodeLlamaTokenizer")
"""Tokenizer classes that went by `add_bos_token` of `tokenizer_config.json` when such files were published.

Since transformers 5 nothing does where there is a `tokenizer.json`; DeepSeek's puts no begin-of-text token by itself.
"""
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "params.json")
"""What may lie beside it."""


@dataclasses.dataclass(frozen=True)
class PieceRules:
    """How the strings of a token map become text: the tokenizer's decoder, in a form to follow token by token."""

    kind: str
    """`byte_level`: each character stands for a byte. `byte_fallback`: text, and `<0xE6>` for bytes outside the
    vocabulary. `metaspace`: text, with a character that stands for a space, in which no byte is spelled. `words`: text,
    with a space between tokens."""
    replace: tuple[tuple[str, str], ...] = ()
    """What is replaced in each token, in order (`byte_fallback` and `metaspace` only)."""
    strip: int = 0
    """Spaces taken off the start of the whole text (`byte_fallback`), or 1 where the first token is without any
    (`metaspace`)."""


class Tokenizer:
    """A checkpoint's tokenizer.

    Args:
        backend: the `transformers` tokenizer.
        encoder: makes ids of a text in its place.

    Raises:
        ValueError: when the tokenizer decodes in a way that no LLaMA tokenizer does.
    """

    def __init__(self, backend: PreTrainedTokenizerFast, encoder: Encoder | None = None) -> None:
        self.backend = backend
        self._encoder = encoder
        self.rules = _piece_rules(backend.backend_tokenizer.decoder)

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read the tokenizer files of a checkpoint directory.

        `tokenizer.json` is taken as it is: it is what the model was trained with; whether a prompt begins with the
        begin-of-text token is for LLaMA's tokenizer classes what `tokenizer_config.json` says of it, if it does. Else
        `tokenizer.model` is read, which is sentencepiece's (ids are that library's; `transformers` drops a space at the
        start of a text), or Meta's tiktoken file (LLaMA 3 and later).

        Raises:
            FileNotFoundError: when there is no tokenizer in the directory.
            ValueError: when the files cannot be read or are too large, or sentencepiece is needed and not installed.
        """
        directory = Path(directory)
        found = next((name for name in TOKENIZER_FILES if (directory / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"no tokenizer in {directory}: expected {' or '.join(TOKENIZER_FILES)}")
        for name in (found, *SETTINGS_FILES):
            if (directory / name).is_file():
                read_small(directory / name)  # The libraries would read any size.
        encoder = None
        try:
            if found == "tokenizer.json":
                backend = _load_json(directory)
            elif is_tiktoken(directory / found):
                backend = _load_tiktoken(directory)
            else:
                backend, encoder = _load_sentencepiece(directory)
        except ImportError as error:
            raise ValueError(
                f"{directory / found} needs the sentencepiece library: pip install 'pipedec_jax[sentencepiece]'"
            ) from error
        except BaseException as error:
            # The libraries raise bare Exception for a broken file; a panic of the Rust one is not even that.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = str(error) or type(error).__name__
            raise ValueError(f"cannot read the tokenizer in {directory}: {reason}") from error
        return cls(backend, encoder)

    @functools.cached_property
    def vocabulary(self) -> dict[str, int]:
        """The token map: every token's string and id, added tokens included."""
        return self.backend.get_vocab()

    @functools.cached_property
    def size(self) -> int:
        """Number of token ids (highest id + 1). A model's embedding may hold more rows: those are padding."""
        return max(self.vocabulary.values()) + 1

    @functools.cached_property
    def added(self) -> frozenset[str]:
        """Strings of the tokens that are no part of how text is cut, special or not."""
        return frozenset(map(str, self.backend.backend_tokenizer.get_added_tokens_decoder().values()))

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that never show in text, such as begin and end of text."""
        added = self.backend.backend_tokenizer.get_added_tokens_decoder()
        return frozenset(token for token, description in added.items() if description.special)

    @property
    def end_token(self) -> int | None:
        """The tokenizer's end-of-text token, if it has one."""
        token = self.backend.eos_token
        return self.vocabulary.get(str(token)) if token else None

    def piece(self, token: int) -> str:
        """The token's string as the token map spells it; empty for special tokens and ids without a token."""
        if token in self.special_ids:
            return ""
        return self.backend.backend_tokenizer.id_to_token(token) or ""

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with what the tokenizer puts around it (usually a begin-of-text token)."""
        return self._ids(text, add_special_tokens=True)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of whole token sequences, special tokens left out, spaces as they are."""
        text = self.backend.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def label(self, token: int) -> str:
        """A token to look at: its text, or `<id>` where that has none, as what a drafter guesses need not."""
        return (self.decode([token]) if token >= 0 else "") or f"<{token}>"

    def chat_text(self, messages: str | Sequence[Message]) -> str:
        """A chat (or one user message) under the checkpoint's chat template, up to where the assistant speaks.

        Raises:
            ValueError: when the checkpoint has no chat template, or the template refuses the messages.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
            raise ValueError(f'a chat is a text, or a list of {{"role": ..., "content": ...}}, not {messages!r}')
        if not self.backend.chat_template:
            raise ValueError(
                "this checkpoint has no chat template (it is not a chat model): give a plain prompt instead"
            )
        try:
            text = self.backend.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # Templates raise jinja2 errors of many kinds.
            raise ValueError(f"the chat template refused the messages: {error}") from error
        assert isinstance(text, str)
        return text

    def encode_chat(self, messages: str | Sequence[Message]) -> list[int]:
        """Token ids of `chat_text(messages)`; the template already holds the special tokens."""
        return self._ids(self.chat_text(messages), add_special_tokens=False)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the prompt is no valid Unicode text ({error.reason} at character {error.start})"
            ) from error
        if self._encoder is not None:
            return self._encoder(text, add_special_tokens)
        # Not verbose: whether a prompt is too long is for the decoder to say.
        return list(self.backend(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def check_same_tokens(target: Tokenizer, draft: Tokenizer) -> None:
    """Check that two tokenizers map the same strings to the same ids; embedding sizes do not matter.

    Tokens that were added to either (special and reserved ones, padding) may differ, as they do between LLaMA 3 and
    3.2: a guess of one that means something else is merely wrong.

    Raises:
        ValueError: naming the differing token with the lowest id.
    """
    added = target.added | draft.added
    ours, theirs = (
        {token: place for token, place in tokenizer.vocabulary.items() if token not in added}
        for tokenizer in (target, draft)
    )
    if ours == theirs:
        return
    differing = {token for token, _ in ours.items() ^ theirs.items()}
    first = min(differing, key=lambda token: (min(m[token] for m in (ours, theirs) if token in m), token))

    def place(vocabulary: dict[str, int]) -> str:
        return f"id {vocabulary[first]}" if first in vocabulary else "no such token"

    raise ValueError(
        f"draft and target must have the same tokens: {first!r} is {place(ours)} in the target's map and "
        f"{place(theirs)} in the draft's ({len(differing)} tokens differ); choose a draft of the target's family"
    )


NO_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
"""Variable of the environment under which `transformers` keeps its advice to itself; read whenever it would speak."""


@contextlib.contextmanager
def no_advice() -> Iterator[None]:
    """Around our imports of `transformers`: the first one would otherwise say that PyTorch is missing, where it is."""
    before = os.environ.get(NO_ADVICE)
    os.environ[NO_ADVICE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[NO_ADVICE]
        else:
            os.environ[NO_ADVICE] = before


def _load_json(directory: Path) -> PreTrainedTokenizerFast:
    with no_advice():
        from transformers import PreTrainedTokenizerFast

    backend = PreTrainedTokenizerFast.from_pretrained(str(directory))
    stated = _settings(directory)
    begin = stated.get("add_bos_token")
    if begin is not None and str(stated.get("tokenizer_class")).removesuffix("Fast") in OBEYING:
        backend.add_bos_token, backend.add_eos_token = bool(begin), bool(stated.get("add_eos_token"))
    return backend


def _settings(directory: Path) -> dict[str, Any]:
    """What `tokenizer_config.json` says; nothing where there is none."""
    config = directory / "tokenizer_config.json"
    return json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}


def _load_sentencepiece(directory: Path) -> tuple[PreTrainedTokenizerFast, Encoder]:
    # Where it is missing, or the file is none of its own, `transformers` would try to read something else.
    model = read_model(directory / "tokenizer.model")

    with no_advice():
        from transformers import LlamaTokenizer

    stated = _settings(directory)
    # LLaMA's prompts begin with its begin-of-text token unless the checkpoint says otherwise.
    add_begin = stated.get("add_bos_token", True)
    prefix = model.normalizer_spec.add_dummy_prefix and stated.get("add_prefix_space") is not False
    backend = LlamaTokenizer.from_pretrained(str(directory), add_bos_token=add_begin, add_prefix_space=prefix)
    encoder = Encoder(
        model,
        backend.backend_tokenizer.get_added_tokens_decoder(),
        [backend.bos_token_id] if backend.add_bos_token else [],
        [backend.eos_token_id] if backend.add_eos_token else [],
        prefix=prefix,
        # The rule for tokenizers that say nothing of it was the legacy one while such files were published.
        after_added=stated.get("legacy") is not False,
    )
    return backend, encoder


def _load_tiktoken(directory: Path) -> PreTrainedTokenizerFast:
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

    with no_advice():
        from transformers import PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = read_ranks(directory / "tokenizer.model")
    params = directory / "params.json"
    stated = json.loads(params.read_text(encoding="utf-8")) if params.is_file() else {}
    # LLaMA 3 itself has no scaled RoPE, all later ones do.
    special = special_tokens(since_3_1=stated.get("use_scaled_rope") is True or not stated)

    class Converter(TikTokenConverter):
        """Takes the ranks from us; the library would want the tiktoken package to read the file."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:  # noqa: ARG004
            return ranks

    tokenizer = Converter(str(directory / "tokenizer.model"), extra_special_tokens=special).converted()
    begin, end = special[:2]
    around = TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=False), around])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end)


def _piece_rules(decoder: Any) -> PieceRules:
    """Read a `tokenizers` decoder; `ValueError` when it is none of those that `PieceRules` describes."""
    if decoder is None:
        return PieceRules("words")
    state = json.loads(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return PieceRules("byte_level")
    if kinds in (["Metaspace"], ["Metaspace", "Fuse"]):
        return PieceRules("metaspace", ((steps[0]["replacement"], " "),), int(steps[0]["prepend_scheme"] != "never"))
    replace = []
    while steps and steps[0]["type"] == "Replace" and "String" in steps[0]["pattern"]:
        step = steps.pop(0)
        replace.append((step["pattern"]["String"], step["content"]))
    strip = 0
    if [step["type"] for step in steps] == ["ByteFallback", "Fuse", "Strip"]:
        last = steps.pop()
        if last["content"] == " " and last["stop"] == 0:
            strip = last["start"]
        else:
            kinds.append(f"stripping {last['content']!r}")
            steps.append(last)
    if [step["type"] for step in steps] == ["ByteFallback", "Fuse"]:
        return PieceRules("byte_fallback", tuple(replace), strip)
    raise ValueError(
        f"unsupported tokenizer decoder ({', '.join(kinds)}): LLaMA tokenizers are byte-level, or as sentencepiece's, "
        "with or without byte fallback"
    )
