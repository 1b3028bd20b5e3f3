"""Sentencepiece's `tokenizer.model` (LLaMA 1 and 2, and models like them): what it does to a text before cutting it.

`transformers` takes the pieces from the file and not this, which differs between models: LLaMA's keep every space,
others' drop repeated ones and spell characters anew (NFKC).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers.normalizers import Normalizer
    from tokenizers.pre_tokenizers import PreTokenizer

SPACE = "▁"
"""What pieces have for a space."""
BPE = 2
"""The kind of model that LLaMA's tokenizers are."""


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
        (trained.model_type != BPE, "is no byte-pair encoding"),
        (trained.treat_whitespace_as_suffix, "puts spaces at the end of words"),
        (not text.escape_whitespaces, f"does not write spaces as {SPACE}"),
    ):
        if wrong:
            raise ValueError(
                f"tokenizer.model {what}, unlike LLaMA's: save the tokenizer as tokenizer.json with its own library"
            )
    return model


def normalizer(spec: Any) -> Normalizer:
    """What sentencepiece makes of a text before it looks for pieces, for the `tokenizers` library.

    Args:
        spec: a model's `normalizer_spec`.
    """
    from tokenizers import Regex
    from tokenizers.normalizers import Precompiled, Replace, Sequence

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [Replace(Regex(r"\A +"), ""), Replace(Regex(" {2,}"), " "), Replace(Regex(r" +\z"), "")]
    steps.append(Replace(" ", SPACE))
    return Sequence(steps)


def space_before(after_added: bool) -> PreTokenizer:
    """Puts a space before a text that `normalizer` has made, also where it begins with one.

    No step of the normalizer: the library would put one before the added tokens too that it looks for.

    Args:
        after_added: whether one goes before the text after an added token as well.
    """
    from tokenizers.pre_tokenizers import Metaspace, Sequence

    # The first puts a space where there is none yet: nowhere, as all spaces have become `SPACE`.
    scheme = "always" if after_added else "first"
    return Sequence([Metaspace(" ", scheme, split=False), Metaspace(SPACE, "never", split=False)])
