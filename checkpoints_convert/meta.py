"""Meta's own LLaMA checkpoints: `params.json` and `consolidated.NN.pth`, one file per model-parallel rank.

The ranks' parts of a tensor are put together again, and the heads of queries and keys are permuted: Meta rotates
neighbouring pairs of a head, we (like Hugging Face) its two halves.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np

from checkpoints_convert.config_json import Json, number, read_json, whole
from checkpoints_convert.hugging_face import from_hugging_face, tensor_shape
from checkpoints_convert.paths import inside
from checkpoints_convert.pickle_reader import PickledFiles
from checkpoints_convert.shard_index import check_fetched
from checkpoints_convert.source import SourceCheckpoint, check_tensors, same_bits, tokenizer_files
from pipedec_jax.config import Llama3Scaling, LlamaConfig
from pipedec_jax.model.parameters import parameter_shapes
from pipedec_jax.tiktoken_file import begin_and_ends, is_tiktoken

PARAMS = "params.json"
SHARD = re.compile(r"consolidated\.(\d+)\.pth")

NAMES = {
    "embedding": ("tok_embeddings.weight", None),
    "final_norm": ("norm.weight", None),
    "head": ("output.weight", 0),
    "attention_norm": ("attention_norm.weight", None),
    "query": ("attention.wq.weight", 0),
    "key": ("attention.wk.weight", 0),
    "value": ("attention.wv.weight", 0),
    "output": ("attention.wo.weight", 1),
    "feed_forward_norm": ("ffn_norm.weight", None),
    "gate": ("feed_forward.w1.weight", 0),
    "up": ("feed_forward.w3.weight", 0),
    "down": ("feed_forward.w2.weight", 1),
}
"""Meta's name of each array, and the axis along which its ranks split it (norms are the same on all; the embedding is
split along the width in LLaMA 1 and 2, along the vocabulary since)."""

SENTENCEPIECE_BEGIN, SENTENCEPIECE_END = 1, 2
"""`<s>` and `</s>` in LLaMA 1 and 2."""

IN_EVERY_LAYER = "layers.0.attention.inner_attention.rope.freqs"
IGNORED = re.compile(r"(layers\.\d+\.attention\.inner_attention\.)?rope\.freqs")
"""Buffers of old checkpoints that the config determines: one in LLaMA 2, in LLaMA 1 one in every layer too."""


@dataclasses.dataclass(frozen=True, eq=False)
class MetaCheckpoint(SourceCheckpoint):
    """A directory of Meta's, its ranks merged tensor by tensor."""

    ranks: tuple[PickledFiles, ...] = dataclasses.field(repr=False)

    def view(self, path: str) -> np.ndarray:
        """An array in our layout: a view of the mapped file where one rank holds it as it is, else merged."""
        tensor = self.merged(path)
        if path.endswith(("/query", "/key")):
            tensor = halves_from_pairs(tensor, self.config.head_size)
        return from_hugging_face(path, tensor, parameter_shapes(self.config)[path])

    def merged(self, path: str) -> np.ndarray:
        """The tensor of our array `path` as Meta lays it out, all ranks together: matrices are `[out, in]`."""
        return self._merged(_name(path), tensor_shape(path, parameter_shapes(self.config)[path]))

    def reading_order(self) -> list[str]:
        """All paths in the order of the first rank's file."""
        tensors = self.ranks[0].tensors
        return sorted(parameter_shapes(self.config), key=lambda path: tensors[_name(path)].offset)

    def check_tied_head(self) -> None:
        """Compare a stored head that is taken for tied with the embedding; `ValueError` when they differ."""
        head, embedding = NAMES["head"][0], NAMES["embedding"][0]
        if self.config.tied_embeddings and head in self.ranks[0].tensors:
            shape = (self.config.vocab_size, self.config.width)
            if not same_bits(self._merged(head, shape), self._merged(embedding, shape)):
                raise ValueError(f"tensor {head!r} differs from {embedding!r} though both begin alike; is it damaged?")

    def _merged(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor of all ranks; `shape` is that of the whole."""
        count = len(self.ranks)
        first = self.ranks[0].tensors[name]
        axis = _split_axis(first.shape, shape)
        if axis is None:
            part = self.ranks[0].view(name)
            if not all(same_bits(part, rank.view(name)) for rank in self.ranks[1:]):
                raise ValueError(
                    f"{self.directory}: tensor {name!r} should be the same in all of {count} files and is not"
                )
            return part
        # More ranks than KV heads: neighbours hold the same one.
        copies = count * first.shape[axis] // shape[axis]
        merged = None
        for place, rank in enumerate(self.ranks[::copies]):
            part = rank.view(name)
            if merged is None:
                merged = np.empty(shape, part.dtype)
            elif part.dtype != merged.dtype:
                raise ValueError(f"tensor {name!r} is {part.dtype} in {rank.files[0].name}, {merged.dtype} before")
            size = part.shape[axis]
            merged[(*(slice(None) for _ in range(axis)), slice(place * size, (place + 1) * size))] = part
            # One part is in memory at a time beside the whole.
            del part
            rank.let_go()
        assert merged is not None
        return merged


def open_meta(directory: str | Path) -> MetaCheckpoint:
    """Open a directory of Meta's; reads `params.json` and the tables of the weight files.

    What `params.json` leaves out is known from the release: the trained context (2048 for LLaMA 1, 4096 for 2, 8192
    for 3, 131072 since 3.1) and the RoPE scaling's factor (8 in LLaMA 3.1 and 3.3; 32 in 3.2, whose head is tied). It
    may name `max_seq_len` or `rope_scaling_factor` itself.

    Raises:
        FileNotFoundError: when the directory or one of its files does not exist, the last of them too.
        ImportError: when torch is not installed.
        ValueError: for an unsupported setting, damaged files, and unknown, missing or misshapen tensors.
    """
    directory = Path(directory)
    values = read_json(inside(directory / PARAMS, directory))
    files = _rank_files(directory)
    ranks = tuple(PickledFiles([file], readers=len(files)) for file in files)
    try:
        _check_rank_count(values, ranks)
        tied = _is_tied(ranks)
        config = _config(values, ranks, tied)
    except ValueError as error:
        raise ValueError(f"{directory / PARAMS}: {error}") from error
    dtypes = _check(config, ranks)
    bos, eos = _special_tokens(directory)
    return MetaCheckpoint(
        directory=directory,
        config=config,
        dtype=dtypes[0] if len(dtypes) == 1 else "float32",
        bos_token_id=bos,
        eos_token_ids=eos,
        format="meta",
        stored_dtypes=dtypes,
        files=tuple(file for rank in ranks for file in rank.files),
        ranks=ranks,
    )


def is_meta(path: str | Path) -> bool:
    """Whether `path` looks like a model directory of Meta's."""
    path = Path(path)
    return (path / PARAMS).is_file() and any(SHARD.fullmatch(file.name) for file in path.glob("consolidated.*"))


def halves_from_pairs(tensor: np.ndarray, head_size: int) -> np.ndarray:
    """Rows `[H * A, D]` of a projection, reordered within each head from rotated pairs to rotated halves."""
    rows, width = tensor.shape
    return tensor.reshape(rows // head_size, head_size // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _name(path: str) -> str:
    """Meta's name of our array: `layers/3/query` is `layers.3.attention.wq.weight`."""
    *parents, leaf = path.split("/")
    return ".".join([*parents, NAMES[leaf][0]])


def _split_axis(part: tuple[int, ...], whole_shape: tuple[int, ...]) -> int | None:
    """The axis along which a rank's part is smaller than the whole; None when it is not."""
    return next((axis for axis, (a, b) in enumerate(zip(part, whole_shape, strict=True)) if a != b), None)


def _rank_files(directory: Path) -> list[Path]:
    """`consolidated.00.pth` and so on, none missing."""
    found = {int(m[1]): file for file in directory.glob("consolidated.*") if (m := SHARD.fullmatch(file.name))}
    if not found:
        raise FileNotFoundError(f"{directory} has no consolidated.00.pth")
    missing = sorted(set(range(max(found) + 1 if max(found) < 4096 else 1)) - set(found))
    if missing:
        raise FileNotFoundError(f"{directory} lacks consolidated.{missing[0]:02d}.pth (it has {len(found)} such files)")
    for file in found.values():
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist (a broken link?)")
    files = [inside(found[rank], directory) for rank in sorted(found)]
    check_fetched(files)
    return files


def _check_rank_count(values: Json, ranks: tuple[PickledFiles, ...]) -> None:
    """Raise unless there are as many files as the first one's part of the queries says (a missing last is no gap)."""
    query = ranks[0].tensors.get("layers.0.attention.wq.weight")
    width = whole(values, "dim")
    if query is None or len(query.shape) != 2 or query.shape[0] == 0 or width % query.shape[0]:
        return  # Not Meta's; what is wrong is named later.
    count, last = width // query.shape[0], ranks[-1].files[0]
    if len(ranks) < count:
        raise FileNotFoundError(
            f"{last.parent} lacks consolidated.{len(ranks):02d}.pth: the tensors are split over {count} files, "
            f"{last.name} is the last one there; fetch the others too"
        )
    if len(ranks) > count:
        raise ValueError(
            f"the tensors are split over {count} files, but {last.name} is there too; is it another model's?"
        )


def _is_tied(ranks: tuple[PickledFiles, ...]) -> bool:
    """Whether there is no head of its own: none is stored, or one that begins as the embedding does."""
    head, embedding = (ranks[0].tensors.get(NAMES[name][0]) for name in ("head", "embedding"))
    if embedding is None:
        raise ValueError(f"the checkpoint lacks tensor {NAMES['embedding'][0]!r}")
    if head is None:
        return True
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype) or len(head.shape) != 2:
        return False
    if head.dtype not in ("bfloat16", "float16", "float32"):
        return False
    rows = slice(0, 16)
    return same_bits(*(ranks[0].view(NAMES[name][0])[rows] for name in ("head", "embedding")))


def _config(values: Json, ranks: tuple[PickledFiles, ...], tied: bool) -> LlamaConfig:
    """The geometry: from `params.json`, and from the tensors' shapes what it leaves out."""
    for key in ("quantization_args", "lora_args"):
        if values.get(key):
            raise ValueError(f"{key} is present; convert the original checkpoint instead")
    if (values.get("vision_chunk_size") or -1) != -1:
        raise ValueError("vision_chunk_size is present; only text models can be converted")
    width, heads = whole(values, "dim"), whole(values, "n_heads")
    if width % heads:
        raise ValueError(f"dim ({width}) is no multiple of n_heads ({heads})")
    vocab_size = _vocab_size(values, width, ranks)
    feed_forward = ranks[0].tensors.get("layers.0.feed_forward.w1.weight")
    if feed_forward is None or len(feed_forward.shape) != 2:
        raise ValueError("the checkpoint lacks a matrix 'layers.0.feed_forward.w1.weight'")
    scaled = values.get("use_scaled_rope") or False
    if not isinstance(scaled, bool):
        raise ValueError(f"use_scaled_rope must be true or false, not {scaled!r}")
    theta = number(values, "rope_theta", 10000.0)
    scaling = None
    if scaled:
        scaling = Llama3Scaling(number(values, "rope_scaling_factor", 32.0 if tied else 8.0), 1.0, 4.0, 8192)
    norm_eps = number(values, "norm_eps", 1e-5)
    # LLaMA 1 is told from 2 by its epsilon (that of 65B is 1e-5 too), or by its buffers.
    is_first = norm_eps < 5e-6 or IN_EVERY_LAYER in ranks[0].tensors
    before_3 = {10000.0: 2048 if is_first else 4096, 1000000.0: 16384}
    context = 131072 if scaled else before_3.get(theta, 8192)
    return LlamaConfig(
        vocab_size=vocab_size,
        width=width,
        feed_forward=feed_forward.shape[0] * len(ranks),
        layers=whole(values, "n_layers"),
        heads=heads,
        kv_heads=whole(values, "n_kv_heads", heads),
        head_size=width // heads,
        context=whole(values, "max_seq_len", context),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=norm_eps,
        tied_embeddings=tied,
    )


def _vocab_size(values: Json, width: int, ranks: tuple[PickledFiles, ...]) -> int:
    """Rows of the embedding; `params.json` says -1 in LLaMA 1 and 2."""
    shape = ranks[0].tensors[NAMES["embedding"][0]].shape
    if len(shape) != 2 or shape[1] not in (width, width // len(ranks)):
        raise ValueError(f"tensor {NAMES['embedding'][0]!r} has shape {shape}, which fits no dim of {width}")
    rows = shape[0] * (len(ranks) if shape[1] == width else 1)
    stated = values.get("vocab_size", -1)
    if stated not in (-1, None, rows):
        raise ValueError(f"vocab_size is {stated!r}, but the embedding has {rows} rows")
    return rows


def _check(config: LlamaConfig, ranks: tuple[PickledFiles, ...]) -> tuple[str, ...]:
    """Raise `ValueError` unless every rank has exactly its part of the config's tensors; returns their dtypes."""
    count = len(ranks)
    head, embedding = NAMES["head"][0], NAMES["embedding"][0]
    # By column in LLaMA 1 and 2, by row since.
    by_row = ranks[0].tensors[embedding].shape[1] == config.width
    expected = {}
    for path, shape in parameter_shapes(config).items():
        axis = NAMES[path.split("/")[-1]][1]
        if path == "embedding":
            axis = 0 if by_row else 1
        part = list(tensor_shape(path, shape))
        if axis is not None:
            unit = config.head_size if path.endswith(("/key", "/value")) else 1
            if part[axis] % (count * unit) and count * unit % part[axis]:
                raise ValueError(f"array {path!r} of shape {tuple(part)} cannot be split over {count} files")
            part[axis] = max(part[axis] // count, unit)
        expected[_name(path)] = tuple(part)
    if config.tied_embeddings:
        expected[head] = (config.vocab_size // count, config.width)
    dtypes: set[str] = set()
    for rank in ranks:
        try:
            dtypes |= set(
                check_tensors(
                    expected,
                    rank.tensors,
                    optional=[head] if config.tied_embeddings else [],
                    ignored=[name for name in rank.tensors if IGNORED.fullmatch(name)],
                    described_in=PARAMS,
                )
            )
        except ValueError as error:
            raise ValueError(f"{rank.files[0]}: {error}") from error
    return tuple(sorted(dtypes))


def _special_tokens(directory: Path) -> tuple[int | None, list[int]]:
    """Begin and end of text; Meta states them in its code only."""
    try:
        tokenizer = tokenizer_files(directory).get("tokenizer.model")
    except FileNotFoundError:
        tokenizer = None
    if tokenizer is None:
        return None, []
    if is_tiktoken(tokenizer):
        try:
            return begin_and_ends(tokenizer)
        except ValueError as error:
            raise ValueError(f"{tokenizer}: {error}") from error
    return SENTENCEPIECE_BEGIN, [SENTENCEPIECE_END]
