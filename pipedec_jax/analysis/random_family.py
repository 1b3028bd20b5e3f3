"""Narrow random models that agree as often as a trained family's: they stand in where no trained weights are to be had.

The smaller models are the first layers of the target, whose later layers count for little; its exit head begins as one
begins to be trained, with the target's own norm and vocabulary. They share the demo family's tokenizer.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np

from checkpoints_convert.hugging_face import export_hugging_face
from pipedec_jax.config import LlamaConfig
from pipedec_jax.exit_store import fingerprint, save_exit_head
from pipedec_jax.loading import demo_directory
from pipedec_jax.model.exit_head import ExitHeadConfig, initialize_head
from pipedec_jax.model.parameters import MemorySource, Parameters, nest, parameter_shapes
from pipedec_jax.tokenizer import SETTINGS_FILES, TOKENIZER_FILES

LAYERS = {"draft": 2, "middle": 6, "target": 16}
"""Of each model: enough for 14 stages."""
EXIT_LAYER = 4
GEOMETRY = LlamaConfig(
    vocab_size=1024,
    width=64,
    feed_forward=128,
    layers=LAYERS["target"],
    heads=4,
    kv_heads=2,
    head_size=16,
    context=2048,
)
SHALLOW = LAYERS["draft"]
"""Layers of full weight."""
DEEP = 0.1
"""Weight of the other layers beside those, which says how often smaller models are right."""
SHARPNESS = 5.0
"""Standard deviation of the logits, about: greedy text that does not loop at once, and no near ties everywhere."""


def random_weights(config: LlamaConfig, seed: int) -> Parameters:
    """Arrays of a random target, float32: its rows keep their size from layer to layer, and its logits are not flat."""
    random = np.random.default_rng(seed)
    flat = {}
    for path, shape in parameter_shapes(config).items():
        name = path.rsplit("/", 1)[-1]
        scale = {"query": 2.0, "key": 2.0, "gate": 2.0, "output": 3.0, "down": 3.0, "head": SHARPNESS}.get(name, 1.0)
        if name in ("output", "down") and int(path.split("/")[1]) >= SHALLOW:
            scale *= DEEP
        if len(shape) == 1:
            array = 1 + 0.1 * random.normal(size=shape)
        elif name == "embedding":
            array = random.normal(size=shape)
        else:
            inputs = np.prod(shape[: 2 if name == "output" else 1])
            array = scale * random.normal(size=shape) / np.sqrt(inputs)
        flat[path] = array.astype(np.float32)
    return nest(flat)


def write_random_family(directory: Path, seed: int = 0) -> dict[str, str]:
    """Write the models as Hugging Face directories, and the exit head beside the target; what is there is replaced.

    Args:
        directory: in which each gets a folder of its name.
        seed: of all weights.

    Returns:
        The directories by the names of `papers.Table.flags`.
    """
    target = random_weights(GEOMETRY, seed)
    for name, layers in LAYERS.items():
        first = {str(layer): target["layers"][str(layer)] for layer in range(layers)}
        config, folder = dataclasses.replace(GEOMETRY, layers=layers), directory / name
        export_hugging_face(config, target | {"layers": first}, folder, "float32", bos_token_id=0)
        for file in (*TOKENIZER_FILES, *SETTINGS_FILES):
            if (demo_directory("target") / file).is_file():
                shutil.copyfile(demo_directory("target") / file, folder / file)
    head = ExitHeadConfig(EXIT_LAYER, "norm-linear")
    params, mark = initialize_head(head, GEOMETRY, target, seed), fingerprint(MemorySource(GEOMETRY, target))
    save_exit_head(directory / "target", head, GEOMETRY, params, mark, "float32")
    return {flag: str(directory / flag) for flag in LAYERS} | {"exit-target": str(directory / "target")}
