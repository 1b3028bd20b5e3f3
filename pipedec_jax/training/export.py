"""Shipping a trained model: a Hugging Face directory in bfloat16, and reading one back into a parameter tree."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from checkpoints_convert import open_any
from checkpoints_convert.hugging_face import export_hugging_face
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.parameters import Parameters
from pipedec_jax.training.tokenizer import BEGIN, END, save_tokenizer
from pipedec_jax.whole_files import write_whole


def export(config: LlamaConfig, params: Parameters, tokenizer: Tokenizer, directory: Path) -> None:
    """Write a model directory: weights in bfloat16, configuration, tokenizer and generation defaults."""
    begin, end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
    tree = jax.tree.map(np.asarray, params)
    export_hugging_face(config, tree, directory, "bfloat16", bos_token_id=begin, eos_token_id=end)
    save_tokenizer(tokenizer, directory, config.context)
    generation = {"bos_token_id": begin, "eos_token_id": end, "do_sample": False}
    write_whole(directory / "generation_config.json", json.dumps(generation, indent=2) + "\n")


def load_exported(directory: Path) -> tuple[LlamaConfig, Parameters]:
    """Geometry and weights, as float32, of a model directory (or a converted checkpoint)."""
    checkpoint = open_any(directory)
    return checkpoint.config, jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), checkpoint.read_all())
