"""Sentencepiece's `tokenizer.model` (LLaMA 1 and 2, and models like them): which models are read, and text to ids.

What is done to a text before cutting it differs between models: LLaMA's keep every space, others' drop repeated ones
and spell characters anew (NFKC). The library that trained them does it all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import AddedToken

SPACE = "▁"
"""What pieces have for a space."""
UNIGRAM, BPE = 1, 2
"""The kinds of model: LLaMA's are of byte pairs, some Japanese models' of the other."""
USER_DEFINED = 4
"""The kind of a piece that is found wherever it stands."""


def read_model(file: Path) -> Any:
    """The description of a model (a protocol buffer: `pieces`, `trainer_spec`, `normalizer_spec`).

    Raises:
        ImportError: when the sentencepiece library is not installed.
        ValueError: when it holds no pieces, or is of a kind that no LLaMA model has.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString(file.read_bytes())
    if not model.pieces:
        raise ValueError("tokenizer.model is neither sentencepiece's nor Meta's: no token was found in it")
    trained, text = model.trainer_spec, model.normalizer_spec
    for wrong, what in (
        (trained.model_type not in (UNIGRAM, BPE), "cuts a text neither by byte pairs nor by chances of its pieces"),
        (trained.treat_whitespace_as_suffix, "puts spaces at the end of words"),
        (not text.escape_whitespaces, f"does not write spaces as {SPACE}"),
    ):
        if wrong:
            raise ValueError(
                f"tokenizer.model {what}, unlike LLaMA's: save the tokenizer as tokenizer.json with its own library"
            )
    return model


class Encoder:
    """Text to ids by the sentencepiece library itself, around the added tokens, which it does not know.

    `transformers` turns the pieces' scores into an order of merges; where many are the same, as of the pieces that
    Chinese LLaMA has put behind LLaMA's own, that order is another.

    Args:
        model: what `read_model` gave.
        added: tokens that are looked for in the text first, by id.
        begin: ids that go before a text.
        end: ids that go after it.
        prefix: whether a space goes before a text, also where it begins with one.
        after_added: whether one goes before the text after an added token as well.
    """

    def __init__(
        self,
        model: Any,
        added: Mapping[int, AddedToken],
        begin: Sequence[int] = (),
        end: Sequence[int] = (),
        *,
        prefix: bool,
        after_added: bool,
    ) -> None:
        self._first = _processor(model, prefix)
        self._later = self._first if after_added or not prefix else _processor(model, False)
        # What the model finds by itself, as it was trained, unless the checkpoint says that it is a special token.
        own = {token for token, piece in enumerate(model.pieces) if piece.type == USER_DEFINED}
        added = {token: described for token, described in added.items() if described.special or token not in own}
        # Of those that begin at one place the longest is found.
        longest_first = sorted(added.items(), key=lambda item: -len(item[1].content))
        self._ids = [token for token, _ in longest_first]
        self._added = re.compile("|".join(f"({_pattern(token)})" for _, token in longest_first)) if added else None
        self._begin, self._end = list(begin), list(end)

    def __call__(self, text: str, around: bool) -> list[int]:
        """Ids of a text, with what goes around it if `around`."""
        ids: list[int] = []
        start = 0
        for found in self._added.finditer(text) if self._added else ():
            assert found.lastindex is not None
            ids += [*self._pieces(text, start, found.start()), self._ids[found.lastindex - 1]]
            start = found.end()
        ids += self._pieces(text, start, len(text))
        return [*self._begin, *ids, *self._end] if around else ids

    def _pieces(self, text: str, start: int, end: int) -> list[int]:
        return (self._later if start else self._first).encode(text[start:end])


def _processor(model: Any, prefix: bool) -> Any:
    from sentencepiece import SentencePieceProcessor

    changed = type(model)()
    changed.CopyFrom(model)
    changed.normalizer_spec.add_dummy_prefix = prefix
    return SentencePieceProcessor(model_proto=changed.SerializeToString())


def _pattern(token: AddedToken) -> str:
    before, after = (r"\s*" if strips else "" for strips in (token.lstrip, token.rstrip))
    return before + re.escape(token.content) + after
