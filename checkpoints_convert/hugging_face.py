"""LLaMA tensors as Hugging Face names and lays them out, and the way back: `export_hugging_face`."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from checkpoints_convert.checkpoint import DTYPES, check_dtype
from checkpoints_convert.config_json import config_json
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.int8 import plain
from pipedec_jax.model.parameters import (
    BIAS,
    SCALE,
    MemorySource,
    Parameters,
    input_axes,
    matrix_and_end,
    parameter_shapes,
)

TOP_NAMES = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def tensor_name(path: str) -> str:
    """Hugging Face's name of our array: `layers/3/query` is `model.layers.3.self_attn.q_proj.weight`."""
    if path in TOP_NAMES:
        return TOP_NAMES[path]
    _, layer, name = path.split("/")
    part, end = matrix_and_end(name)
    if end == SCALE:
        raise ValueError(f"Hugging Face's LLaMA has no array of scales such as {path!r}: dequantize int8 layers")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{'bias' if end == BIAS else 'weight'}"


def tensor_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Hugging Face's shape of the array `path` that has `shape` here: matrices are `[out, in]`, heads merged."""
    if _is_plain(path, shape):
        return shape
    if path.endswith(BIAS):
        return (math.prod(shape),)
    inputs = input_axes(path)
    return math.prod(shape[inputs:]), math.prod(shape[:inputs])


def from_hugging_face(path: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Our array `path` of `shape`, as a view of Hugging Face's tensor.

    Both split the rotary halves of a head the same way, so nothing is permuted.
    """
    return tensor if _is_plain(path, shape) else tensor.T.reshape(shape)


def to_hugging_face(path: str, array: np.ndarray) -> np.ndarray:
    """Hugging Face's tensor for our array `path`; the inverse of `from_hugging_face`."""
    if _is_plain(path, array.shape):
        return array
    return array.reshape(tensor_shape(path, array.shape)[::-1]).T


def _is_plain(path: str, shape: tuple[int, ...]) -> bool:
    """Whether both sides lay the array out alike: norms, and the embedding (a table, not a matrix)."""
    return len(shape) == 1 or path == "embedding"


def export_hugging_face(
    config: LlamaConfig,
    tree: Parameters,
    directory: str | Path,
    dtype: str | None = None,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
) -> None:
    """Write a parameter tree as a Hugging Face directory: `config.json` and `model.safetensors`.

    Int8 layers are dequantized, as Hugging Face's classes take no scales.

    Args:
        config: geometry of the model.
        tree: arrays as `pipedec_jax.model.parameters` describes them (NumPy or JAX).
        directory: created when absent; files of these two names in it are replaced.
        dtype: `bfloat16`, `float16` or `float32`; the tree's own dtype when not given.
        bos_token_id: written into `config.json`.
        eos_token_id: written into `config.json`; one id, or all ids that end a text.

    Raises:
        ValueError: when arrays are missing, unknown or misshapen, or `dtype` is none of the three.
    """
    stored = MemorySource(config, tree)
    name = check_dtype(dtype if dtype is not None else str(stored.read("embedding").dtype))
    source = plain(stored, DTYPES[name])
    tensors = {}
    for path in parameter_shapes(source.config):
        array = source.read(path).astype(DTYPES[name], copy=False)
        tensors[tensor_name(path)] = np.ascontiguousarray(to_hugging_face(path, array))
    values = config_json(source.config, name) | {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    # safetensors lets the owner alone read what it writes.
    shutil.copymode(directory / "config.json", directory / "model.safetensors")
