"""Our model on converted weights against Hugging Face's, on prompts long enough to show a wrong RoPE."""

import copy
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from checkpoints_convert import convert, open_checkpoint
from pipedec_jax.cache import chunk_rows, empty_layers
from pipedec_jax.config import LinearScaling, YarnScaling
from pipedec_jax.model import llama
from tests.checkpoints_convert.sources import COMMON, FAMILIES, GEOMETRIES, hugging_face_model, save

PROMPT = np.random.default_rng(0).integers(COMMON["vocab_size"], size=(1, 500), dtype=np.int32)


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def both(geometry: dict, directory):
    """Hugging Face's logits `[1, 500, V]`, and our config and parameters converted from the same model.

    In float64: its float32 products have been seen to be off by 1e-3 in a process beside another busy one.
    """
    model = hugging_face_model(geometry)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(torch.from_numpy(PROMPT).long()).logits.numpy()
    checkpoint = open_checkpoint(convert(save(model, directory / "source"), directory / "converted"))
    return expected, checkpoint.config, jax.tree.map(jnp.asarray, checkpoint.read_all())


@pytest.mark.parametrize("name", [*GEOMETRIES, *FAMILIES])
def test_logits_equal_hugging_face_on_500_tokens(name, tmp_path):
    expected, config, params = both((GEOMETRIES | FAMILIES)[name], tmp_path)
    found = np.asarray(llama.forward(config, params, jnp.asarray(PROMPT)))
    assert relative_difference(found, expected) <= 1e-4


def test_logits_equal_those_of_a_model_whose_window_slides_until_it_does(tmp_path):
    expected, config, params = both(FAMILIES["Mistral"] | {"sliding_window": 200}, tmp_path)
    found = np.asarray(llama.forward(config, params, jnp.asarray(PROMPT[:, : config.context])))
    assert config.context == 200
    assert relative_difference(found, expected[:, :200]) <= 1e-4
    # One position more is beyond what is computed alike.
    found = np.asarray(llama.forward(config, params, jnp.asarray(PROMPT[:, :201])))
    assert relative_difference(found[:, 200], expected[:, 200]) > 1e-3


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("LLaMA 3.1: scaled RoPE", {"rope_theta": 490000.0}),
        ("LLaMA 3.1: scaled RoPE", {"rope_scaling": None}),
        ("LLaMA 3.1: scaled RoPE", {"norm_eps": 1e-2}),
        ("DeepSeek Coder: linearly scaled RoPE", {"rope_scaling": LinearScaling(4.1)}),
        ("Yarn LLaMA 2", {"rope_scaling": YarnScaling(16.0, 64, attention_factor=1.27)}),
        ("Yarn LLaMA 2", {"rope_scaling": YarnScaling(16.0, 64, 0.1 * math.log(16) + 1, truncate=False)}),
    ],
    ids=["theta", "scaling", "norm", "factor", "attention factor", "ramp"],
)
def test_a_slightly_wrong_config_shows(name, wrong, tmp_path):
    expected, config, params = both(GEOMETRIES[name], tmp_path)
    found = llama.forward(dataclasses.replace(config, **wrong), params, jnp.asarray(PROMPT))
    assert relative_difference(np.asarray(found), expected) > 1e-3


@pytest.mark.parametrize("name", GEOMETRIES)
def test_logits_equal_hugging_face_through_the_cache(name, tmp_path):
    """Most of the prompt in chunks, the last padded, and the rest token by token, with slots to spare."""
    expected, config, params = both(GEOMETRIES[name], tmp_path)
    slots, chunk, alone = 512, 128, 20
    chunked = PROMPT.shape[1] - alone

    @functools.partial(jax.jit, static_argnums=0)
    def feed(width, caches, token_S, start, length):
        rows = chunk_rows(start, width, length, slots)
        x = params["embedding"][jax.lax.dynamic_slice_in_dim(token_S, start, width)]
        rope = llama.rope_tables(config, rows.position, x.dtype)
        new = []
        for index, cache in enumerate(caches):
            layer = params["layers"][str(index)]
            x, cache = llama.forward_layer(config, layer, x, rope, cache.attend(rows))
            new.append(cache)
        return tuple(new), llama.logits(config, params["final_norm"], llama.head_matrix(params), x)

    caches = empty_layers(config, config.layers, slots, jnp.float32)
    token_S = jnp.pad(jnp.asarray(PROMPT[0]), (0, slots + chunk - PROMPT.shape[1]))
    found = []
    for start in range(0, chunked, chunk):
        caches, logits = feed(chunk, caches, token_S, jnp.int32(start), jnp.int32(chunked))
        found.append(np.asarray(logits)[: min(chunk, chunked - start)])
    for start in range(chunked, PROMPT.shape[1]):
        caches, logits = feed(1, caches, token_S, jnp.int32(start), jnp.int32(start + 1))
        found.append(np.asarray(logits))
    assert relative_difference(np.concatenate(found)[None], expected) <= 1e-4
