"""Small random LLaMA checkpoints: written by transformers, or by our own export where layout is not the point."""

import json
from pathlib import Path

import numpy as np

from checkpoint_trials.synthetic import write_tokenizer
from checkpoints_convert import conversion, export_hugging_face, manifest
from checkpoints_convert.source import same_bits
from pipedec_jax.config import Llama3Scaling, LlamaConfig
from pipedec_jax.model.parameters import Parameters, nest, parameter_shapes

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}

GEOMETRIES = {
    "LLaMA 1: as many KV heads as heads": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "LLaMA 2 70B: grouped queries": {"num_attention_heads": 8, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "one KV head": {"num_attention_heads": 4, "num_key_value_heads": 1, "num_hidden_layers": 3},
    "LLaMA 3: large theta": {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": {
        "rope_type": "default", "rope_theta": 500000.0}},
    "LLaMA 3.1: scaled RoPE": {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE},
    "LLaMA 3.2: tied, scaled RoPE": {
        "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE | {"factor": 32.0},
        "tie_word_embeddings": True},
    "DeepSeek Coder: linearly scaled RoPE": {"num_attention_heads": 4, "rope_parameters": {
        "rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0}, "rms_norm_eps": 1e-6},
    "Yarn LLaMA 2": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rope_parameters": {
        "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}},
    "Granite Code: biases": {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True,
        "mlp_bias": True, "tie_word_embeddings": True},
    "biases of attention alone": {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True},
    "head size other than width / heads": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24},
}  # fmt: skip
"""Settings of Hugging Face's `LlamaConfig` beyond `COMMON`."""

FAMILIES = {
    "Mistral": {"model_type": "mistral", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
        "sliding_window": None},
    "Qwen2": {"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
}  # fmt: skip
"""Settings of other families' configurations, beyond `COMMON` too."""

COMMON = {
    "vocab_size": 113,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "max_position_embeddings": 1024,
    # Large enough that attention is sharp and depends on positions; 0.02 would hide a wrong RoPE.
    "initializer_range": 0.25,
}


def hugging_face_model(geometry: dict, seed: int = 0):
    """A random model of transformers in float32: `LlamaForCausalLM`, or of the `model_type` in the geometry."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # With several, the first product in a process is now and then off by 1e-3 on a busy machine (PyTorch 2.13, CPU).
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**({"model_type": "llama"} | COMMON | geometry))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            if name.endswith("bias"):
                parameter.normal_()
    return model


def save(model, directory: Path, dtype: str = "float32", **settings) -> Path:
    """Save a transformers model with a small tokenizer."""
    import torch

    model.to(getattr(torch, dtype)).save_pretrained(directory, **settings)
    write_tokenizer(directory)
    return directory


TINY = LlamaConfig(
    vocab_size=29, width=12, feed_forward=20, layers=2, heads=4, kv_heads=2, head_size=6, context=64,
    rope_theta=500000.0, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 32),
)  # fmt: skip


def tiny_source(directory: Path, config: LlamaConfig = TINY, dtype: str = "float32", seed: int = 0) -> Path:
    """A Hugging Face directory of a few kilobytes, made without torch."""
    export_hugging_face(config, tiny_tree(config, seed), directory, dtype, bos_token_id=1, eos_token_id=[2, 3])
    write_tokenizer(directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    return directory


def tiny_tree(config: LlamaConfig = TINY, seed: int = 0) -> Parameters:
    """Random arrays of the right shapes; NumPy, because compiling a generator for every shape takes seconds."""
    rng = np.random.default_rng(seed)
    return nest({path: rng.normal(size=shape).astype(np.float32) for path, shape in parameter_shapes(config).items()})


def edit_json(path: Path, **changes) -> None:
    """Set keys of a JSON file; `...` removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def edit_manifest(converted: Path, **changes) -> None:
    """Set keys of a converted checkpoint's manifest, its own checksum included."""
    path = converted / "pipedec_jax.json"
    values = json.loads(path.read_text()) | changes
    del values["manifest"]
    path.write_text(json.dumps(values | {"manifest": manifest._digest(values)}, indent=1) + "\n")


def stop_at(monkeypatch, count: int, error: type[BaseException] | BaseException) -> None:
    """Let the conversion raise `error` when it reads its chunk number `count`."""
    seen, cast = [], conversion.cast

    def failing(*arguments):
        seen.append(arguments)
        if len(seen) == count:
            raise error
        return cast(*arguments)

    monkeypatch.setattr(conversion, "cast", failing)


def save_pickled(model, directory: Path, dtype: str = "float32", shards: int = 1) -> Path:
    """As transformers saved models before safetensors."""
    import torch

    save(model, directory, dtype)
    (directory / "model.safetensors").unlink()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if shards == 1:
        torch.save(tensors, directory / "pytorch_model.bin")
        return directory
    weight_map = {}
    for index in range(shards):
        file = f"pytorch_model-{index + 1:05d}-of-{shards:05d}.bin"
        part = dict(list(tensors.items())[index::shards])
        torch.save(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def same_arrays(a, b) -> bool:
    """Whether two checkpoints of one geometry and dtype hold the same bits."""
    assert (a.config, a.dtype) == (b.config, b.dtype)
    return all(same_bits(a.read(path), b.read(path)) for path in parameter_shapes(a.config))


def halve(file: Path) -> None:
    """Cut a file's second half off."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
