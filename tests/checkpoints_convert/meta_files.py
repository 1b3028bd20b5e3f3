"""Writes a Hugging Face model as Meta publishes its models, by an own reading of both formats."""

import base64
import json
from pathlib import Path

import torch

from checkpoint_trials.synthetic import sentencepiece_model

NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "layers",
}


def save_as_meta(model, directory: Path, ranks: int = 1, llama3: bool = True, **params) -> Path:
    """Save a transformers model in Meta's format, split over `ranks` files."""
    directory.mkdir(parents=True, exist_ok=True)
    config = model.config
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        theirs = name
        for ours, meta in NAMES.items():
            theirs = theirs.replace(ours, meta)
        if "q_proj" in name or "k_proj" in name:
            tensor = pairs_from_halves(tensor, config.head_dim)
        for rank, part in enumerate(split(theirs, tensor, ranks, config, llama3)):
            files[rank][theirs] = part.clone()
    for rank, tensors in enumerate(files):
        if not llama3:
            tensors["rope.freqs"] = torch.ones(config.head_dim // 2)
        torch.save(tensors, directory / f"consolidated.{rank:02d}.pth")
    values = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "norm_eps": config.rms_norm_eps,
        "multiple_of": 32,
        "vocab_size": config.vocab_size if llama3 else -1,
    }
    if config.num_key_value_heads != config.num_attention_heads:
        values["n_kv_heads"] = config.num_key_value_heads
    (directory / "params.json").write_text(json.dumps(values | params))
    if llama3:
        write_tiktoken(directory / "tokenizer.model")
    else:
        (directory / "tokenizer.model").write_bytes(sentencepiece_model())
    return directory


def pairs_from_halves(tensor: torch.Tensor, head_size: int) -> torch.Tensor:
    """Row `2 * i + j` of a head is row `i + j * A / 2` where halves are rotated."""
    order = [i + j * head_size // 2 for i in range(head_size // 2) for j in range(2)]
    heads = tensor.view(-1, head_size, tensor.shape[1])
    return heads[:, order].reshape(tensor.shape)


def split(name, tensor, ranks, config, llama3):
    if "norm" in name:
        return [tensor] * ranks
    if ("wk" in name or "wv" in name) and ranks > config.num_key_value_heads:
        parts = tensor.chunk(config.num_key_value_heads)
        return [part for part in parts for _ in range(ranks // config.num_key_value_heads)]
    by_column = "wo" in name or "w2" in name or ("tok_embeddings" in name and not llama3)
    return tensor.chunk(ranks, dim=1 if by_column else 0)


def write_tiktoken(file: Path, merges: tuple[bytes, ...] = (b"he", b"ll", b"hell", b"hello", b" w", b" world")) -> None:
    tokens = [*(bytes([byte]) for byte in range(256)), *merges]
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
