"""One small checkpoint of each kind that the converter takes, to be corrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint_trials.synthetic import sentencepiece_model, write_tokenizer
from checkpoints_convert.conversion import convert
from checkpoints_convert.hugging_face import export_hugging_face, tensor_name, to_hugging_face
from checkpoints_convert.meta import NAMES
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.parameters import Parameters, flatten, nest, parameter_shapes

CONFIG = LlamaConfig(
    vocab_size=16, width=8, feed_forward=12, layers=1, heads=2, kv_heads=2, head_size=4, context=32, rope_theta=10000.0
)

Kind = str
"""Name of an input's directory, such as `sharded` or `converted int8`."""


def tree() -> Parameters:
    """The weights of all inputs."""
    rng = np.random.default_rng(0)
    return nest({path: rng.normal(size=shape).astype(np.float32) for path, shape in parameter_shapes(CONFIG).items()})


def write_good(root: Path, elsewhere: Path) -> list[Kind]:
    """Write one good input of each kind below `root`, and a model below `elsewhere`; returns the kinds."""
    import torch
    from safetensors.numpy import load_file, save_file

    single = root / "single"
    export_hugging_face(CONFIG, tree(), single, bos_token_id=1, eos_token_id=[2, 3])
    write_tokenizer(single)
    (single / "generation_config.json").write_text('{"eos_token_id": [2]}')
    tensors = load_file(single / "model.safetensors")
    names = sorted(tensors)
    torch_tensors = {name: torch.from_numpy(value) for name, value in tensors.items()}

    for kind, ending in (("sharded", "model{}.safetensors"), ("pickled shards", "pytorch_model{}.bin")):
        shutil.copytree(single, root / kind)
        (root / kind / "model.safetensors").unlink()
        weight_map = {}
        for shard in range(2):
            file = ending.format(f"-{shard + 1:05d}-of-00002")
            part = names[shard::2]
            if kind == "sharded":
                save_file({name: tensors[name] for name in part}, root / kind / file)
            else:
                torch.save({name: torch_tensors[name] for name in part}, root / kind / file)
            weight_map |= dict.fromkeys(part, file)
        (root / kind / (ending.format("") + ".index.json")).write_text(json.dumps({"weight_map": weight_map}))
    shutil.copytree(single, root / "pickled")
    (root / "pickled" / "model.safetensors").unlink()
    torch.save(torch_tensors, root / "pickled" / "pytorch_model.bin")

    meta = root / "meta"
    meta.mkdir()
    ranks: list[dict[str, Any]] = [{}, {}]
    for path, array in flatten(tree()):
        *parents, leaf = path.split("/")
        name, axis = NAMES[leaf]
        theirs = torch.from_numpy(np.ascontiguousarray(to_hugging_face(path, array)))
        parts = [theirs] * 2 if theirs.ndim == 1 else theirs.chunk(2, dim=axis or 0)
        for rank, part in zip(ranks, parts, strict=True):
            rank[".".join([*parents, name])] = part.clone()
    for number, rank in enumerate(ranks):
        torch.save(rank, meta / f"consolidated.{number:02d}.pth")
    params = {"dim": 8, "n_layers": 1, "n_heads": 2, "norm_eps": 1e-5, "vocab_size": -1}
    (meta / "params.json").write_text(json.dumps(params))
    (meta / "tokenizer.model").write_bytes(sentencepiece_model())

    snapshot = root / "cache" / "models--a--b" / "snapshots" / "0123"
    blobs = root / "cache" / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in single.iterdir():
        shutil.copyfile(file, blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob-{file.name}")
    convert(single, root / "converted")
    convert(single, root / "converted int8", int8=True)
    assert tensor_name("embedding") in tensors
    shutil.copytree(single, elsewhere / "model")
    return [path.name for path in root.iterdir()]
