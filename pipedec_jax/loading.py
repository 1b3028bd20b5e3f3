"""Opening a model directory: geometry, tokenizer and end tokens at once, the weights when they are needed."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from checkpoints_convert import convert_cached, is_converted, is_source, local_directory, open_any, open_checkpoint
from checkpoints_convert.checkpoint import Checkpoint
from checkpoints_convert.paths import is_cloud
from checkpoints_convert.source import SourceCheckpoint, tokenizer_files
from checkpoints_convert.store import ConvertedCheckpoint
from checkpoints_convert.workplace import workplace_of
from pipedec_jax.config import LlamaConfig
from pipedec_jax.disk_cache import CACHE_VARIABLE, cache_directory
from pipedec_jax.model.int8 import Int8Source, as_int8
from pipedec_jax.model.parameters import CheckedSource, MemorySource, Parameters, ParameterSource
from pipedec_jax.small_files import read_small
from pipedec_jax.tokenizer import TOKENIZER_FILES, Message, Tokenizer

DEMO = ("target", "middle", "draft")
"""The demo family's models, largest first."""
SOURCE = "a ParameterSource, such as pipedec_jax.MemorySource(config, tree)"


class Model:
    """A model's geometry, tokenizer and end tokens, and where its weights come from. `load` makes one.

    Args:
        config: geometry.
        tokenizer: of the model.
        weights: called once, when the weights are needed (`pipedec_jax.MemorySource` holds some that are in memory).
        end_tokens: tokens that end an answer.
        dtype: the dtype that the weights (but int8 ones) are stored in.
        name: what to call the model, such as its directory.

    Raises:
        ValueError: for an argument that is none of these.
    """

    def __init__(
        self,
        config: LlamaConfig,
        tokenizer: Tokenizer,
        weights: Callable[[], ParameterSource],
        *,
        end_tokens: Sequence[int] = (),
        dtype: str = "float32",
        name: str = "model",
    ) -> None:
        for what, value, kind in (("config", config, LlamaConfig), ("tokenizer", tokenizer, Tokenizer)):
            if not isinstance(value, kind):
                raise ValueError(f"{what} must be a pipedec_jax.{kind.__name__}, not {value!r}")
        if not callable(weights):
            raise ValueError(f"weights must be a function that gives the weights ({SOURCE}), not {weights!r}")
        if not isinstance(end_tokens, Sequence) or not all(isinstance(token, int | np.integer) for token in end_tokens):
            raise ValueError(f"end_tokens must be a list of token ids, not {end_tokens!r}")
        self.config = config
        self.tokenizer = tokenizer
        self.end_tokens = tuple(end_tokens)
        self.dtype = dtype
        self.name = name
        self._weights = weights

    @classmethod
    def from_tree(
        cls,
        config: LlamaConfig,
        tree: Parameters,
        tokenizer: Tokenizer,
        *,
        end_tokens: Sequence[int] = (),
        name: str = "model",
    ) -> Model:
        """A model of a parameter tree that is in memory, such as one that was trained further.

        Args:
            config: geometry.
            tree: arrays as `pipedec_jax.model.parameters` describes them (NumPy or JAX).
            tokenizer: of the model.
            end_tokens: tokens that end an answer.
            name: what to call the model.

        Raises:
            ValueError: where arrays are missing, unknown or misshapen.
        """
        source = MemorySource(config, tree)
        dtype = str(source.read("embedding").dtype)
        return cls(config, tokenizer, lambda: source, end_tokens=end_tokens, dtype=dtype, name=name)

    @property
    def vocab_size(self) -> int:
        """Ids that are tokens: those of the tokenizer that have a row in the embedding. Other rows are padding."""
        return min(self.tokenizer.size, self.config.vocab_size)

    @functools.cached_property
    def source(self) -> ParameterSource:
        """Where the weights are read from. A model in pickled files is converted now, unless the cache has it.

        Raises:
            ValueError: when the weights cannot be converted, or are none, or those of another geometry.
            OSError: when the cache cannot be written (`PIPEDEC_JAX_CACHE` names another place).
        """
        source = self._weights()
        if not callable(getattr(source, "read", None)):
            raise ValueError(f"weights must give {SOURCE}, not {type(source).__name__}")
        if not isinstance(source, Checkpoint | MemorySource | Int8Source):
            source = CheckedSource(source)
        # As long a text as a model may have is for the user to say.
        if dataclasses.replace(source.config, context=self.config.context) != self.config:
            raise ValueError(f"the weights are of another geometry than the model: {source.config}, not {self.config}")
        return source

    def chat(self, messages: str | Sequence[Message]) -> list[int]:
        """The prompt tokens of a chat (or of one user message) under the checkpoint's chat template.

        Raises:
            ValueError: when there is no message, no chat template, or the template refuses the messages.
        """
        if not messages:
            raise ValueError("the prompt is empty; give at least one message")
        return self.tokenizer.encode_chat(messages)

    def __repr__(self) -> str:
        return f"Model({self.name!r}, {self.config.layers} layers of width {self.config.width}, {self.dtype})"


def load(directory: str | Path, *, int8: bool = False, cache_dir: str | Path | None = None) -> Model:
    """Open a model: a converted checkpoint, a published one, or a repository of the Hugging Face hub.

    Safetensors files are read as they are. Pickled ones (`pytorch_model*.bin`, Meta's `consolidated.*.pth`) are
    converted into a cache when first decoded with, which takes torch.

    Args:
        directory: what `python -m checkpoints_convert convert` wrote, a model's directory in Hugging Face's or Meta's
            format, or a hub repository (`org/name`; downloaded unless the local Hugging Face cache has it).
        int8: turn the layers' matrices into int8 with a scale per output channel while they are read, unless they are
            stored so. Rounds the weights: the text is that of another, close model.
        cache_dir: where conversions are kept; by default `$PIPEDEC_JAX_CACHE`, else `~/.cache/pipedec_jax`.

    Raises:
        FileNotFoundError: when there is no checkpoint, or it has no tokenizer.
        ImportError: when its weights are pickled and torch is not installed.
        ValueError: when the checkpoint is damaged (tokenizer files are compared with its manifest now, arrays when they
            are read) or unsupported.
    """
    if not isinstance(directory, str | os.PathLike) or not os.fspath(directory):
        raise ValueError(f"a model is a directory or a hub repository (org/name), not {directory!r}")
    if not isinstance(int8, bool):
        raise ValueError(f"int8 must be True or False, not {int8!r}")
    directory = local_directory(directory)
    if not is_converted(directory) and not is_source(directory):
        if workplace_of(directory).is_dir():
            open_checkpoint(directory)  # Says that it is not complete.
        what = "is no checkpoint" if directory.exists() else "does not exist"
        raise FileNotFoundError(
            f"{directory} {what}: give a converted checkpoint or a Hugging Face LLaMA directory (with config.json)"
        )
    checkpoint = open_any(directory)
    if isinstance(checkpoint, ConvertedCheckpoint):
        checkpoint.check_files()
    tokenizer = _tokenizer(checkpoint)
    config = as_int8(checkpoint.config) if int8 else checkpoint.config

    weights = functools.partial(_weights, checkpoint, cache_dir, int8)  # not a closure, so that models can be pickled
    end_tokens = checkpoint.eos_token_ids
    if not end_tokens and tokenizer.end_token is not None:
        end_tokens = [tokenizer.end_token]
    return Model(config, tokenizer, weights, end_tokens=end_tokens, dtype=checkpoint.dtype, name=str(directory))


def _weights(checkpoint: Checkpoint, cache_dir: str | Path | None, int8: bool) -> ParameterSource:
    """Where the weights of a checkpoint are read from: itself, but for pickled files."""
    source = checkpoint
    if isinstance(checkpoint, SourceCheckpoint):
        if checkpoint.format == "huggingface-safetensors":
            checkpoint.check_tied_head()
        else:
            source = open_checkpoint(_convert_cached(checkpoint.directory, cache_dir))
    return Int8Source(source) if int8 else source


def _convert_cached(directory: str | Path, cache_dir: str | Path | None) -> Path:
    """`convert_cached`, whose error about a cache that cannot be written says what names another one."""
    try:
        return convert_cached(directory, cache_dir)
    except OSError as error:
        cache = cache_directory(cache_dir)
        if error.strerror is None or not Path(str(error.filename)).is_relative_to(cache):
            raise
        raise OSError(
            error.errno, f"{error.strerror} ({CACHE_VARIABLE} names another cache)", error.filename
        ) from error


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """A model's tokenizer, which lies beside its weights, but for Meta's first releases."""
    if not is_cloud(checkpoint.directory):
        files = tokenizer_files(checkpoint.directory)
        return Tokenizer.load(next(files[name].parent for name in TOKENIZER_FILES if name in files))
    assert isinstance(checkpoint, ConvertedCheckpoint)
    # The libraries read local files only.
    with tempfile.TemporaryDirectory() as scratch:
        for name in checkpoint.manifest.files:
            (Path(scratch) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(scratch) / name).write_bytes(read_small(checkpoint.directory / name))
        return Tokenizer.load(scratch)


def load_demo(name: str = "target", *, int8: bool = False, cache_dir: str | Path | None = None) -> Model:
    """Open a model of the demo family that comes with the package: `target`, `middle` or `draft`.

    `int8` and `cache_dir` are as for `load`.

    Raises:
        ValueError: for another name.
    """
    if name not in DEMO:
        raise ValueError(f"the demo family has {', '.join(DEMO)}, not {name!r}")
    return load(demo_directory(name), int8=int8, cache_dir=cache_dir)


def short_names(directories: Iterable[str]) -> dict[str, str]:
    """Names of models by their directories: the last part, with as many before it as keep them apart from each other.

    A repository in the cache of the Hugging Face hub (`models--org--name/snapshots/...`) is called as it is there.
    """
    parts = {directory: _path_parts(directory) for directory in directories}

    def name(directory: str) -> str:
        for length in range(1, len(parts[directory]) + 1):
            tail = parts[directory][-length:]
            if sum(other[-length:] == tail for other in parts.values()) == 1:
                return "/".join(tail)
        return directory

    return {directory: name(directory) for directory in parts}


def _path_parts(directory: str) -> list[str]:
    names = [part for part in directory.replace("\\", "/").split("/") if part]
    hub = [part for part in names if part.startswith("models--")]
    return hub[-1].split("--")[1:] if hub and "snapshots" in names else names


def demo_directory(name: str) -> Path:
    """Where a model of the demo family lies in the installed package."""
    return Path(str(importlib.resources.files("pipedec_jax"))) / "demo" / name
