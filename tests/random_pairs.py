"""Random target-draft pairs that give real hits without training, and what plain decoding makes of them.

Models are random but not flat, and their greedy text does not loop. The draft is the target without its deep layers,
plus noise: how much the deep layers count (`deep`) and the noise set the hit rate. Weights of another pair of the same
geometry go into a compiled engine as they are, so few programs serve many combinations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from checkpoints_convert.config_json import llama_config
from pipedec_jax.model import llama
from pipedec_jax.model.exit_head import ExitHead, ExitHeadConfig, head_shapes, initialize_head
from pipedec_jax.model.parameters import MemorySource, flatten, nest, parameter_shapes
from tests import oracle
from tests.oracle import Draw

VOCAB = 101
"""Ids that are tokens, in every geometry."""
SHALLOW = 2
"""Layers of the target that `Pair.deep` leaves as they are."""
CONTEXT = 640


def hugging_face_config(layers: int, **changes: Any) -> dict[str, Any]:
    """A small `config.json`."""
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    }
    return config | changes


GEOMETRIES: dict[str, dict[str, Any]] = {
    "five layers": hugging_face_config(5),
    "sixteen layers": hugging_face_config(16),
    # All at once: padded vocabulary, tied embeddings, one KV head, an odd number of heads, llama3 RoPE.
    "odd": hugging_face_config(
        5,
        vocab_size=109,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=6,
        tie_word_embeddings=True,
        rope_theta=500.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 40,
        },
    ),
}
DRAFT_ROWS = {"five layers": VOCAB, "sixteen layers": VOCAB, "odd": 104}
"""Embedding rows of the draft: in one geometry padded differently from the target's."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A target and a draft, by the numbers they are drawn from."""

    geometry: str
    seed: int = 0
    deep: float = 0.3
    """Weight of all layers but the first two; 0 makes them pass everything through."""
    noise: float = 0.0
    """Of the draft's matrices, relative to the target's own."""
    sharpness: float = 5.0
    """Scale of the head, and so of the logits."""
    draft_layers: int = SHALLOW
    """Layers of the draft: the first ones of the target."""

    @functools.cached_property
    def target_config(self) -> dict[str, Any]:
        """The target's `config.json`."""
        return GEOMETRIES[self.geometry]

    @functools.cached_property
    def draft_config(self) -> dict[str, Any]:
        """The draft's `config.json`."""
        rows = DRAFT_ROWS[self.geometry]
        return self.target_config | {"num_hidden_layers": self.draft_layers, "vocab_size": rows}


@functools.lru_cache(maxsize=64)
def target_weights(pair: Pair) -> dict[str, np.ndarray]:
    """The target's weights under Hugging Face's names, float64."""
    c = pair.target_config
    random = np.random.default_rng(pair.seed)
    D, F, A = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    queries, keys = c["num_attention_heads"] * A, c["num_key_value_heads"] * A

    def matrix(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
        return random.normal(size=(rows, columns)) * scale / np.sqrt(columns)

    def norm() -> np.ndarray:
        return 1 + 0.1 * random.normal(size=D)

    # A tied embedding is the head too; a token would then mostly predict itself, so its rows are small.
    tied = c["tie_word_embeddings"]
    weights = {"model.embed_tokens.weight": matrix(c["vocab_size"], D, pair.sharpness if tied else D**0.5)}
    for layer in range(c["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        scale = (6.0 if tied else 3.0) * (1 if layer < SHALLOW else pair.deep)
        weights[name + "input_layernorm.weight"] = norm()
        weights[name + "self_attn.q_proj.weight"] = matrix(queries, D, 2)
        weights[name + "self_attn.k_proj.weight"] = matrix(keys, D, 2)
        weights[name + "self_attn.v_proj.weight"] = matrix(keys, D)
        weights[name + "self_attn.o_proj.weight"] = matrix(D, queries, scale)
        weights[name + "post_attention_layernorm.weight"] = norm()
        weights[name + "mlp.gate_proj.weight"] = matrix(F, D, 2)
        weights[name + "mlp.up_proj.weight"] = matrix(F, D)
        weights[name + "mlp.down_proj.weight"] = matrix(D, F, scale)
    weights["model.norm.weight"] = norm()
    if not tied:
        weights["lm_head.weight"] = matrix(c["vocab_size"], D, pair.sharpness)
    for key, part in (("attention_bias", "self_attn"), ("mlp_bias", "mlp")):
        for name in [name for name in weights if c.get(key) and f".{part}." in name]:
            scale = pair.deep if int(name.split(".")[2]) >= SHALLOW else 1.0
            weights[name.replace(".weight", ".bias")] = 0.5 * scale * random.normal(size=len(weights[name]))
    return weights


def draft_weights(pair: Pair) -> dict[str, np.ndarray]:
    """The draft's weights under Hugging Face's names."""
    random = np.random.default_rng([pair.seed, 1])
    weights = {}
    for name, array in target_weights(pair).items():
        if name.startswith("model.layers.") and int(name.split(".")[2]) >= pair.draft_layers:
            continue
        if array.ndim == 2:
            array = array + pair.noise * np.std(array) * random.normal(size=array.shape)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            array = array[: pair.draft_config["vocab_size"]]
        weights[name] = array
    return weights


def as_source(config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> MemorySource:
    """Weights under Hugging Face's names as the engine reads them."""
    D, A, layers = config["hidden_size"], config["head_dim"], config["num_hidden_layers"]
    flat = {"embedding": weights["model.embed_tokens.weight"], "final_norm": weights["model.norm.weight"]}
    if not config["tie_word_embeddings"]:
        flat["head"] = weights["lm_head.weight"].T
    for layer in range(layers):
        theirs, ours = f"model.layers.{layer}.", f"layers/{layer}/"
        flat[ours + "attention_norm"] = weights[theirs + "input_layernorm.weight"]
        flat[ours + "feed_forward_norm"] = weights[theirs + "post_attention_layernorm.weight"]
        for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
            flat[ours + name] = weights[f"{theirs}self_attn.{short}_proj.weight"].T.reshape(D, -1, A)
        flat[ours + "output"] = weights[theirs + "self_attn.o_proj.weight"].T.reshape(-1, A, D)
        for name in ("gate", "up", "down"):
            flat[ours + name] = weights[f"{theirs}mlp.{name}_proj.weight"].T
        if config.get("attention_bias"):
            for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
                flat[f"{ours}{name}_bias"] = weights[f"{theirs}self_attn.{short}_proj.bias"].reshape(-1, A)
            flat[ours + "output_bias"] = weights[theirs + "self_attn.o_proj.bias"]
        if config.get("mlp_bias"):
            for name in ("gate", "up", "down"):
                flat[f"{ours}{name}_bias"] = weights[f"{theirs}mlp.{name}_proj.bias"]
    return MemorySource(llama_config({"model_type": "llama", **config}), nest(flat))


def exit_head(pair: Pair, config: ExitHeadConfig) -> ExitHead:
    """A head that really hits: as training begins, with the draft's noise; a whole block is the target's next layer.

    A narrower head maps to the first directions of a random basis, and reads the target's LM head along them.
    """
    source = as_source(pair.target_config, target_weights(pair))
    random = np.random.default_rng([pair.seed, 2])
    if config.variant == "target":
        return ExitHead(config, {})
    own = nest({path: np.asarray(source.read(path)) for path in parameter_shapes(source.config)})
    flat = {path: np.asarray(value) for path, value in flatten(initialize_head(config, source.config, own, pair.seed))}
    if config.width:
        flat["map"] = np.linalg.qr(random.normal(size=flat["map"].shape))[0]
        flat["head"] = flat["map"].T @ (source.read("final_norm") * np.asarray(llama.head_matrix(own))).T
    for path, shape in head_shapes(config, source.config).items():
        whole = path.startswith("layers/0/") and (config.width, config.feed_forward) == (None, None)
        array = source.read(path.replace("/0/", f"/{config.exit_layer}/")) if whole else flat[path].astype(np.float64)
        flat[path] = array + pair.noise * np.std(array) * random.normal(size=shape)
    return ExitHead(config, nest(flat))


@functools.lru_cache(maxsize=64)
def oracle_model(pair: Pair, dtype: str) -> oracle.Llama:
    """The oracle over the weights as a `dtype` engine holds them; it computes in float64."""
    rounded = {
        name: np.asarray(array.astype(jnp.dtype(dtype)), np.float64) for name, array in target_weights(pair).items()
    }
    return oracle.Llama(pair.target_config, rounded, np.float64, CONTEXT)


@functools.lru_cache(maxsize=4096)
def plain_steps(
    pair: Pair,
    prompt: tuple[int, ...],
    draw: Draw,
    new_tokens: int,
    dtype: str = "float64",
    text: tuple[int, ...] | None = None,
) -> list[oracle.Step]:
    """What plain decoding gives, or would give at every place of `text`. The draft's numbers do not matter to it."""
    return oracle.decode(oracle_model(pair, dtype), prompt, new_tokens, draw, vocab_size=VOCAB, text=text)


FIVE, SIXTEEN, ODD = GEOMETRIES
NUMBERS = {FIVE: (0.2, 0.5, 0.3, 0.1), SIXTEEN: (0.1, 0.25, 0.15, 0.05), ODD: (0.3, 0.6, 0.4, 0.2)}
PAIRS = {
    geometry: [
        Pair(geometry, seed, deep, noise)
        for seed, (deep, noise) in enumerate(zip(deeps, (0.0, 0.0, 0.05, 0.1), strict=True))
    ]
    for geometry, deeps in NUMBERS.items()
}


def prompt_of(length: int, seed: int) -> tuple[int, ...]:
    """A random prompt."""
    return tuple(np.random.default_rng([seed, length]).integers(VOCAB, size=length).tolist())
