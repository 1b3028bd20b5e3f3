"""The demo family's tokenizer: byte-level BPE in Hugging Face's format, made for Python source."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pipedec_jax.whole_files import write_whole

BEGIN, END, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (BEGIN, END, USER, ASSISTANT)

PIECES = r"\n[\n ]*| ?[A-Za-z_]+| ?[0-9]{1,3}| ?[^\sA-Za-z_0-9]+|[^\S\n]+"
"""What BPE may merge within: a line's end with the next line's indentation, words, short numbers, punctuation."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' }}{% else %}{{ '<|user|>' }}{% endif %}"
    "{{ message['content'] }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE of `vocab_size` tokens; encoding puts the begin token first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, context: int) -> None:
    """Write `tokenizer_config.json`, `special_tokens_map.json` and `tokenizer.json`, each as a whole.

    `tokenizer.json` comes last: where it is, all are.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "chat_template": CHAT_TEMPLATE,
    }
    special = {"bos_token": BEGIN, "eos_token": END, "additional_special_tokens": [USER, ASSISTANT]}
    for name, values in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        write_whole(directory / name, json.dumps(values, indent=2) + "\n")
    write_whole(directory / "tokenizer.json", tokenizer.to_str(pretty=True))


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer saved in a model directory."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run scripts/train_demo.py first, or name another directory")
    return Tokenizer.from_file(str(path))


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must be there.

    Raises:
        ValueError: when it is not.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token!r}; it is not the demo family's")
    return found


def encode_files(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids (`int32`) of each text as one document: begin token, text, end token."""
    end = tokenizer.token_to_id(END)
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=True)
    return [np.asarray([*one.ids, end], np.int32) for one in encoded]
