"""A Hugging Face directory as a checkpoint: every tensor checked from the headers, read one by one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from checkpoints_convert import pickle_reader, safetensors_reader
from checkpoints_convert.checkpoint import DTYPES
from checkpoints_convert.config_json import Json, family_of, llama_config, read_json, token_ids
from checkpoints_convert.families import Family
from checkpoints_convert.hugging_face import TOP_NAMES, from_hugging_face, tensor_name, tensor_shape
from checkpoints_convert.paths import inside
from checkpoints_convert.pickle_reader import PickledDirectory
from checkpoints_convert.safetensors_reader import SafetensorsDirectory
from checkpoints_convert.source import SourceCheckpoint, check_tensors, same_bits
from checkpoints_convert.tensor_files import TensorFiles
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.parameters import BIAS, matrix_and_end, parameter_shapes

HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Buffers of old checkpoints that the config determines."""


@dataclasses.dataclass(frozen=True, eq=False)
class HuggingFaceCheckpoint(SourceCheckpoint):
    """A Hugging Face directory, read in place in our layout."""

    weights: TensorFiles = dataclasses.field(repr=False)
    family: Family = dataclasses.field(repr=False)

    def view(self, path: str) -> np.ndarray:
        """An array in our layout, as a view of the mapped file; a bias that the family does not have is 0."""
        shape = parameter_shapes(self.config)[path]
        if not _stored(path, self.family):
            return np.zeros(shape, DTYPES[self.dtype])
        return from_hugging_face(path, self.weights.view(tensor_name(path)), shape)

    def reading_order(self) -> list[str]:
        """All paths, file by file; first those of no file."""
        infos = self.weights.tensors
        of_files = [path for path in parameter_shapes(self.config) if _stored(path, self.family)]
        places = {path: (infos[tensor_name(path)].file, infos[tensor_name(path)].offset) for path in of_files}
        return [path for path in parameter_shapes(self.config) if path not in places] + sorted(
            places, key=places.__getitem__
        )

    def check_tied_head(self) -> None:
        """Compare a stored head that the config calls tied with the embedding; `ValueError` when they differ."""
        head, embedding = TOP_NAMES["head"], TOP_NAMES["embedding"]
        stored = self.config.tied_embeddings and head in self.weights.tensors
        if stored and not same_bits(self.weights.view(head), self.weights.view(embedding)):
            raise ValueError(
                f"{self.directory}: tensor {head!r} differs from {embedding!r} though config.json says "
                "tie_word_embeddings; set it to false if the model has a head of its own, or remove the tensor"
            )


def open_hugging_face(directory: str | Path) -> HuggingFaceCheckpoint:
    """Open a Hugging Face LLaMA directory; reads `config.json` and the headers of the weights, no weight.

    Safetensors files are preferred to pickled ones (`pytorch_model*.bin`), which take torch.

    Raises:
        FileNotFoundError: when the directory or one of its files does not exist.
        ImportError: when its weights are pickled and torch is not installed.
        ValueError: for an unsupported setting, damaged files, and unknown, missing, duplicate or misshapen tensors.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory; give one that holds config.json and safetensors")
    values = read_json(inside(directory / "config.json", directory))
    try:
        config, family = llama_config(values), family_of(values)
        bos, eos = _special_tokens(directory, values)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    kind = "safetensors"
    if has_weights(directory, [pickle_reader.SINGLE]) and not has_weights(directory, [safetensors_reader.SINGLE]):
        kind = "pickle"
    weights = PickledDirectory(directory) if kind == "pickle" else SafetensorsDirectory(directory)
    try:
        dtypes = _check_tensors(config, family, weights)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    return HuggingFaceCheckpoint(
        directory=directory,
        config=config,
        dtype=dtypes[0] if len(dtypes) == 1 else "float32",
        bos_token_id=bos,
        eos_token_ids=eos,
        format=f"huggingface-{kind}",
        stored_dtypes=dtypes,
        files=tuple(weights.files),
        weights=weights,
        family=family,
    )


def is_hugging_face(path: str | Path) -> bool:
    """Whether `path` looks like a Hugging Face model directory (it has a `config.json`)."""
    return (Path(path) / "config.json").is_file()


def has_weights(directory: Path, singles: Sequence[str] = (safetensors_reader.SINGLE, pickle_reader.SINGLE)) -> bool:
    """Whether weights lie in a directory under Hugging Face's names, in one file of `singles` or by its index."""
    return any((directory / name).is_file() for single in singles for name in (single, f"{single}.index.json"))


def _stored(path: str, family: Family) -> bool:
    """Whether the files of a model of this family hold an array: all but a bias that its layers do not add."""
    matrix, end = matrix_and_end(path.rsplit("/", 1)[-1])
    return end != BIAS or family.biased is None or matrix in family.biased


def _check_tensors(config: LlamaConfig, family: Family, weights: TensorFiles) -> tuple[str, ...]:
    """Raise `ValueError` unless the tensors are exactly those of `config`; returns the dtypes they are stored in."""
    head = TOP_NAMES["head"]
    expected = {
        tensor_name(path): tensor_shape(path, shape)
        for path, shape in parameter_shapes(config).items()
        if _stored(path, family)
    }
    if config.tied_embeddings:
        expected[head] = expected[TOP_NAMES["embedding"]]
    return check_tensors(
        expected,
        weights.tensors,
        optional=[head] if config.tied_embeddings else [],
        ignored=[name for name in weights.tensors if HARMLESS.fullmatch(name)],
        described_in="config.json",
        hints={head: " (config.json says that it is not tied)"},
    )


def _special_tokens(directory: Path, values: Json) -> tuple[int | None, list[int]]:
    """First BOS token and all EOS tokens; `generation_config.json` goes before `config.json`, as in Hugging Face."""
    generation = directory / "generation_config.json"
    places = [read_json(inside(generation, directory)), values] if generation.is_file() else [values]
    bos, eos = (
        next((ids for ids in (token_ids(place, key) for place in places) if ids), [])
        for key in ("bos_token_id", "eos_token_id")
    )
    return (bos[0] if bos else None), eos
