"""Writes a model as a GGUF file of float32 numbers for llama.cpp, which then decodes the very same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipedec_jax.config import LlamaConfig
from pipedec_jax.loading import Model
from pipedec_jax.model.held import flat_shape
from pipedec_jax.model.parameters import ParameterSource, layer_shapes, matrix_and_end
from pipedec_jax.model.rope import attention_factor, plain_frequencies, rope_frequencies

NAMES = {
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "output": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "attention_norm": "attn_norm",
    "feed_forward_norm": "ffn_norm",
}
"""A layer's arrays, and what GGUF calls them."""


def write_gguf(model: Model, path: Path) -> None:
    """Write geometry and weights in float32; of the tokenizer only how many tokens it has: prompts are token ids.

    Raises:
        ImportError: without the package `gguf`.
        ValueError: for a model of int8 layers: they would be written as what they stand for, and read as other weights.
    """
    import gguf  # pyright: ignore[reportMissingImports]

    config = model.config
    if config.int8:
        raise ValueError("the peers decode float32 weights, and this model's layers are int8: load it without int8")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    write_geometry(writer, config)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    for name, array in gguf_arrays(model.source):
        writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_geometry(writer: Any, config: LlamaConfig) -> None:
    """Add what llama.cpp needs to know of a model's shape to a `gguf.GGUFWriter`."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.feed_forward)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_size)
    if attention_factor(config) != 1:
        writer.add_rope_scaling_attn_factors(attention_factor(config))


def gguf_arrays(source: ParameterSource) -> Iterator[tuple[str, np.ndarray]]:
    """All arrays under GGUF's names, matrices as outputs by inputs."""
    config = source.config
    yield "token_embd.weight", source.read("embedding")
    for layer in range(config.layers):
        for name in layer_shapes(config):
            part, end = matrix_and_end(name)
            array = np.asarray(source.read(f"layers/{layer}/{name}"), np.float32)
            # Biases are the one column of an input that is always 1.
            array = array.reshape(-1, 1) if end else array.reshape(flat_shape(part, array.shape)).T
            if part in ("query", "key"):
                array = interleave(array, config.head_size)
            yield f"blk.{layer}.{NAMES[part]}.{'bias' if end else 'weight'}", array.reshape(-1) if end else array
    yield "output_norm.weight", source.read("final_norm")
    if not config.tied_embeddings:
        yield "output.weight", source.read("head").T
    if config.rope_scaling is not None:
        yield "rope_freqs.weight", np.asarray(plain_frequencies(config)) / np.asarray(rope_frequencies(config))


def interleave(array: np.ndarray, head_size: int) -> np.ndarray:
    """Rows `[heads A, D]` of split halves, as Hugging Face has them, in the pairs that llama.cpp rotates."""
    rows, D = array.shape
    return array.reshape(-1, 2, head_size // 2, D).swapaxes(1, 2).reshape(rows, D)
