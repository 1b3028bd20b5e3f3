"""A Hugging Face LLaMA directory as a checkpoint: every tensor checked from the headers, read one by one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from checkpoints_convert.checkpoint import DTYPES, Checkpoint
from checkpoints_convert.config_json import Json, llama_config, read_json, token_ids
from checkpoints_convert.hugging_face import TOP_NAMES, from_hugging_face, tensor_name, tensor_shape
from checkpoints_convert.safetensors_reader import SafetensorsDirectory, TensorInfo
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.parameters import parameter_shapes

STORED_AS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Dtypes that are converted, as safetensors spells them and as we do."""

HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Buffers of old checkpoints that the config determines."""

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
"""At least one of these must be there."""
COPIED = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
"""Patterns of the tokenizer and generation files that go along with the weights."""


@dataclasses.dataclass(frozen=True, eq=False)
class HuggingFaceCheckpoint(Checkpoint):
    """A Hugging Face directory, read in place in our layout."""

    files: SafetensorsDirectory = dataclasses.field(repr=False)
    stored_dtypes: tuple[str, ...]
    """All dtypes found; where there are several, `dtype` is the one that holds them all without rounding."""

    def _read(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        tensor = self.files.read(tensor_name(path))
        return from_hugging_face(path, tensor, shape).astype(DTYPES[self.dtype], copy=False)

    def check_tied_head(self) -> None:
        """Compare a stored head that the config calls tied with the embedding; `ValueError` when they differ."""
        head, embedding = TOP_NAMES["head"], TOP_NAMES["embedding"]
        if self.config.tied_embeddings and head in self.files.tensors:
            same = self.files.tensors[head].dtype == self.files.tensors[embedding].dtype
            if not same or not same_bits(self.files.read(head), self.files.read(embedding)):
                raise ValueError(
                    f"tensor {head!r} differs from {embedding!r} though config.json says tie_word_embeddings; "
                    "set it to false if the model has a head of its own, or remove the tensor"
                )


def open_hugging_face(directory: str | Path) -> HuggingFaceCheckpoint:
    """Open a Hugging Face LLaMA directory; reads `config.json` and the headers of the weights, no weight.

    Raises:
        FileNotFoundError: when the directory or one of its files does not exist.
        ValueError: for an unsupported setting, damaged files, and unknown, missing, duplicate or misshapen tensors.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory; give one that holds config.json and safetensors")
    values = read_json(directory / "config.json")
    try:
        config = llama_config(values)
        bos, eos = _special_tokens(directory, values)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    files = SafetensorsDirectory(directory)
    dtypes = _check_tensors(config, files.tensors)
    dtype = dtypes[0] if len(dtypes) == 1 else "float32"
    return HuggingFaceCheckpoint(directory, config, dtype, bos, eos, files, dtypes)


def is_hugging_face(path: str | Path) -> bool:
    """Whether `path` looks like a Hugging Face model directory (it has a `config.json`)."""
    return (Path(path) / "config.json").is_file()


def tokenizer_files(directory: str | Path) -> list[Path]:
    """Tokenizer and generation files of a model directory, relative to it.

    Raises:
        FileNotFoundError: when there is no tokenizer among them.
    """
    directory = Path(directory)
    if not any((directory / name).is_file() for name in TOKENIZERS):
        raise FileNotFoundError(f"{directory} has no tokenizer; expected {' or '.join(TOKENIZERS)}")
    found = [path for pattern in COPIED for path in sorted(directory.glob(pattern)) if path.is_file()]
    return [path.relative_to(directory) for path in found]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays agree in shape, dtype and every bit (unlike `==`, also for NaN and negative zero)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return np.array_equal(a.view(bits), b.view(bits))


def _check_tensors(config: LlamaConfig, tensors: dict[str, TensorInfo]) -> tuple[str, ...]:
    """Raise `ValueError` unless the tensors are exactly those of `config`; returns the dtypes they are stored in."""
    expected = {tensor_name(path): tensor_shape(path, shape) for path, shape in parameter_shapes(config).items()}
    missing = [name for name in expected if name not in tensors]
    if missing:
        hint = " (config.json says that it is not tied)" if missing[0] == TOP_NAMES["head"] else ""
        raise ValueError(f"the checkpoint lacks tensors {_names(missing)}{hint}")
    if config.tied_embeddings:
        expected[TOP_NAMES["head"]] = expected[TOP_NAMES["embedding"]]
    unknown = [name for name in tensors if name not in expected and not HARMLESS.fullmatch(name)]
    if unknown:
        raise ValueError(f"the checkpoint has unknown tensors {_names(unknown)}")
    dtypes = set()
    for name, shape in expected.items():
        info = tensors.get(name)  # A tied head may be absent.
        if info is None:
            continue
        if info.shape != shape:
            raise ValueError(f"tensor {name!r} has shape {info.shape}, config.json asks for {shape}")
        if info.dtype not in STORED_AS:
            raise ValueError(f"tensor {name!r} is stored as {info.dtype}; supported are {', '.join(STORED_AS)}")
        dtypes.add(STORED_AS[info.dtype])
    return tuple(sorted(dtypes))


def _names(names: Iterable[str], most: int = 4) -> str:
    quoted = [repr(name) for name in names]
    more = f" and {len(quoted) - most} more" if len(quoted) > most else ""
    return ", ".join(quoted[:most]) + more


def _special_tokens(directory: Path, values: Json) -> tuple[int | None, list[int]]:
    """First BOS token and all EOS tokens; `generation_config.json` goes before `config.json`, as in Hugging Face."""
    generation = directory / "generation_config.json"
    places = [read_json(generation), values] if generation.is_file() else [values]
    bos, eos = (
        next((ids for ids in (token_ids(place, key) for place in places) if ids), [])
        for key in ("bos_token_id", "eos_token_id")
    )
    return (bos[0] if bos else None), eos
