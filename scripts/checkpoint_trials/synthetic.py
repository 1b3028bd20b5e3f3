"""Large checkpoints of random numbers under real LLaMA names, to measure with."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from checkpoints_convert.checkpoint import DTYPES
from checkpoints_convert.config_json import config_json
from checkpoints_convert.hugging_face import tensor_name, tensor_shape
from checkpoints_convert.meta import NAMES
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.parameters import parameter_shapes

LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    width=4096,
    feed_forward=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_size=128,
    context=8192,
    rope_theta=500000.0,
)
"""The geometry of LLaMA 3 8B: 16.06 GB in bfloat16, 2.10 GB of them embedding and head."""


def peak_memory() -> int:
    """Peak resident bytes of this process so far (Linux).

    Not what `getrusage` says: a new process inherits that from the one that started it.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def write_synthetic(
    config: LlamaConfig, directory: str | Path, *, dtype: str = "bfloat16", shard_bytes: int = 2 * 10**9, seed: int = 0
) -> int:
    """Write random weights as a sharded Hugging Face directory, a shard in memory at a time; returns their bytes.

    The tokenizer knows a few letters only: such a checkpoint can be converted and loaded, not prompted with text.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    weight_map: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}
    total = shards = 0

    def flush() -> None:
        nonlocal shards
        shards += 1
        file = f"model-{shards:05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for path, shape in parameter_shapes(config).items():
        theirs = tensor_shape(path, shape)
        if sum(tensor.nbytes for tensor in shard.values()) + np.prod(theirs) * DTYPES[dtype].itemsize > shard_bytes:
            flush()
        scale = np.float32(1 if len(theirs) == 1 else 0.02)
        # A few megabytes of noise over and over: generating it all would take longer than the measurements.
        noise = (scale * rng.standard_normal(2**20, np.float32)).astype(DTYPES[dtype])
        shard[tensor_name(path)] = np.resize(noise, theirs)
        total += shard[tensor_name(path)].nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config_json(config, dtype)))
    write_tokenizer(directory)
    return total


def write_synthetic_meta(config: LlamaConfig, directory: str | Path, ranks: int, *, seed: int = 0) -> int:
    """Write random bfloat16 weights as Meta's files of LLaMA 3, a rank in memory at a time; returns their bytes."""
    import torch

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    total = 0
    for rank in range(ranks):
        rng = np.random.default_rng([seed, rank])
        tensors: dict[str, torch.Tensor] = {}
        for path, shape in parameter_shapes(config).items():
            *parents, leaf = path.split("/")
            name, axis = NAMES[leaf]
            theirs = list(tensor_shape(path, shape))
            if leaf == "embedding":
                axis = 0
            if axis is not None:
                theirs[axis] //= ranks
            # The same norms in all files.
            noise = np.ones(1, np.float32) if len(theirs) == 1 else 0.02 * rng.standard_normal(2**20, np.float32)
            tensor = torch.from_numpy(np.resize(noise, theirs).astype(np.float32)).to(torch.bfloat16)
            tensors[".".join([*parents, name])] = tensor
            total += tensor.nbytes
        torch.save(tensors, directory / f"consolidated.{rank:02d}.pth")
    params = {"dim": config.width, "n_layers": config.layers, "n_heads": config.heads, "n_kv_heads": config.kv_heads}
    params |= {"vocab_size": config.vocab_size, "norm_eps": config.norm_eps, "rope_theta": config.rope_theta}
    (directory / "params.json").write_text(json.dumps(params))
    lines = (base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
    (directory / "tokenizer.model").write_bytes(b"".join(lines))
    return total


def write_tokenizer(directory: Path, tokens: int = 6) -> None:
    """Write a `tokenizer.json` of two special tokens, two letters and what they make together."""
    letters = ["a", "b", "ab", "ba", "aba", *(f"a{'b' * count}" for count in range(2, tokens))]
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *letters][:tokens])}
    controls = [token for token in ("<s>", "</s>") if token in vocabulary]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    merges = [["a", "b"], ["b", "a"], ["ab", "a"], *([f"a{'b' * count}", "b"] for count in range(1, tokens))]
    values = {
        "version": "1.0",
        "added_tokens": [{"id": index, "content": token, **special} for index, token in enumerate(controls)],
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [pair for pair in merges if "".join(pair) in vocabulary],
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(values))


def sentencepiece_model() -> bytes:
    """A `tokenizer.model` of sentencepiece's as small as can be: control tokens, a space and two letters."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.vocab_size = 7
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    for index, piece in enumerate(["<unk>", "<s>", "</s>", "ab", "▁", "a", "b"]):
        model.pieces.add(piece=piece, score=-float(max(index - 3, 0)), type=kinds.get(piece, 1))
    return model.SerializeToString()
