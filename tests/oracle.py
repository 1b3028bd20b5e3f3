"""Plain decoding in NumPy, as the definition of what the engine must write. It shares no code with the package.

The model is written from Hugging Face's `LlamaForCausalLM`: weights under Hugging Face's names, in its layouts
(`[out, in]`), one contiguous KV cache, one token at a time. The choice is written from `TemperatureLogitsWarper`,
`TopKLogitsWarper` and `TopPLogitsWarper`, in that order, then `argmax(scores + gumbel)`; the noise of position p is
`jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), p), (V,), float32)`: the one call of JAX here, because it is
the definition itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Llama:
    """A LLaMA model and its KV cache.

    Args:
        config: the keys of Hugging Face's `config.json`.
        weights: arrays under Hugging Face's names.
        dtype: in which everything is computed, float64 or float32.
        context: most positions the cache holds.
    """

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, np.ndarray], dtype: Any, context: int) -> None:
        self.config = config
        self.dtype = np.dtype(dtype)
        self.weights = {name: np.asarray(array, self.dtype) for name, array in weights.items()}
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        shape = (config["num_hidden_layers"], context, self.kv_heads, self.head_dim)
        self.keys, self.values = np.zeros(shape, self.dtype), np.zeros(shape, self.dtype)
        self.inverse_frequencies = inverse_frequencies(config, self.head_dim).astype(self.dtype)
        self.attention_scaling = self.dtype.type(attention_scaling(config))
        self.length = 0

    def reset(self) -> None:
        """Forget the text."""
        self.length = 0

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """`LlamaRMSNorm`."""
        scale = np.sqrt(np.mean(x * x) + self.dtype.type(self.config["rms_norm_eps"]))
        return self.weights[name] * (x / scale)

    def rope(self, x: np.ndarray) -> np.ndarray:
        """`apply_rotary_pos_emb` of `[heads, head_dim]` at the current position."""
        angle = self.dtype.type(self.length) * np.concatenate([self.inverse_frequencies] * 2)
        half = self.head_dim // 2
        rotated = np.concatenate([-x[:, half:], x[:, :half]], axis=1)
        cos, sin = np.cos(angle) * self.attention_scaling, np.sin(angle) * self.attention_scaling
        return x * cos + rotated * sin

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        """`nn.Linear`."""
        y = self.weights[name + ".weight"] @ x
        return y + self.weights[name + ".bias"] if name + ".bias" in self.weights else y

    def feed(self, token: int) -> np.ndarray:
        """Append one token; the logits `[V]` of what follows it."""
        w, here = self.weights, self.length
        x = w["model.embed_tokens.weight"][token]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}."
            y = self.norm(x, name + "input_layernorm.weight")
            query = self.rope(self.linear(name + "self_attn.q_proj", y).reshape(self.heads, self.head_dim))
            key = self.rope(self.linear(name + "self_attn.k_proj", y).reshape(self.kv_heads, self.head_dim))
            value = self.linear(name + "self_attn.v_proj", y).reshape(self.kv_heads, self.head_dim)
            self.keys[layer, here], self.values[layer, here] = key, value
            x = x + self.linear(name + "self_attn.o_proj", self.attend(layer, query))
            y = self.norm(x, name + "post_attention_layernorm.weight")
            gate = self.linear(name + "mlp.gate_proj", y)
            gate = gate / (1 + np.exp(-gate))
            x = x + self.linear(name + "mlp.down_proj", gate * self.linear(name + "mlp.up_proj", y))
        self.length += 1
        head = "model.embed_tokens.weight" if self.config["tie_word_embeddings"] else "lm_head.weight"
        return w[head] @ self.norm(x, "model.norm.weight")

    def attend(self, layer: int, query: np.ndarray) -> np.ndarray:
        """Attention of `[heads, head_dim]` over everything so far, the current token included, as one vector."""
        stop = self.length + 1
        grouped = query.reshape(self.kv_heads, self.heads // self.kv_heads, self.head_dim)
        keys, values = self.keys[layer, :stop], self.values[layer, :stop]
        score = (grouped @ keys.transpose(1, 2, 0)) / np.sqrt(self.dtype.type(self.head_dim))
        return (softmax(score) @ values.transpose(1, 0, 2)).reshape(-1)


def inverse_frequencies(config: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """`ROPE_INIT_FUNCTIONS["default"]`, `["linear"]`, `["yarn"]` and `["llama3"]`, in float64."""
    frequencies = 1.0 / config["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    scaling = config.get("rope_scaling")
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    if scaling["rope_type"] == "yarn":
        bounds = []
        for rotations in (scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)):
            ratio = scaling["original_max_position_embeddings"] / (rotations * 2 * np.pi)
            bounds.append(head_dim * np.log(ratio) / (2 * np.log(config["rope_theta"])))
        low, high = max(np.floor(bounds[0]), 0), min(np.ceil(bounds[1]), head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
        return frequencies / scaling["factor"] * ramp + frequencies * (1 - ramp)
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    scaled = []
    for frequency in frequencies:
        wavelength = 2 * np.pi / frequency
        if wavelength > original / low:
            scaled.append(frequency / factor)
        elif wavelength < original / high:
            scaled.append(frequency)
        else:
            smooth = (original / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.asarray(scaled)


def attention_scaling(config: Mapping[str, Any]) -> float:
    """What cosine and sine are multiplied by: in YaRN what the paper suggests."""
    scaling = config.get("rope_scaling")
    return 0.1 * np.log(scaling["factor"]) + 1.0 if scaling and scaling["rope_type"] == "yarn" else 1.0


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last axis; minus infinity gives 0."""
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Draw:
    """How tokens are drawn; temperature 0 is greedy, top_k 0 and top_p 1 filter nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Draw()


@dataclasses.dataclass(frozen=True)
class Filtered:
    """Scores `[V]` on their way through the warpers."""

    scaled: np.ndarray
    """After the temperature."""
    threshold: float
    """The k-th best scaled score: what lies below goes."""
    cumulative: np.ndarray
    """Probability, after top-k, of a token and of all less likely ones: what is `<= 1 - top_p` goes."""
    kept: np.ndarray
    """Whether a token is still there."""


def warp(logits: np.ndarray, draw: Draw) -> Filtered:
    """Temperature, top-k, top-p. Where tokens tie at top-p's border, the lowest ids stay."""
    V = len(logits)
    scaled = logits / logits.dtype.type(draw.temperature) if draw.temperature else logits
    threshold = np.sort(scaled)[-min(draw.top_k, V)] if draw.top_k else -np.inf
    kept = scaled >= threshold
    likelihood = softmax(np.where(kept, scaled, -np.inf))
    ascending = np.lexsort((-np.arange(V), likelihood))  # among equals the highest id comes (and goes) first
    cumulative = np.empty_like(likelihood)
    cumulative[ascending] = np.cumsum(likelihood[ascending])
    if draw.top_p < 1:
        kept = kept & ~(cumulative <= 1 - draw.top_p)
        kept[ascending[-1]] = True
    return Filtered(scaled=scaled, threshold=float(threshold), cumulative=cumulative, kept=kept)


@functools.lru_cache(maxsize=100_000)
def gumbel(seed: int, position: int, vocab_size: int) -> np.ndarray:
    """The noise of the token at an absolute position."""
    key = jax.random.fold_in(jax.random.key(seed), position)
    return np.asarray(jax.random.gumbel(key, (vocab_size,), jnp.float32))


@dataclasses.dataclass(frozen=True)
class Step:
    """One drawn token and how close the decision was."""

    token: int
    log_prob: float
    """Of the token, at temperature 1 and without filters."""
    gap: float
    """Best score minus second best; infinite where the filters left one token."""
    draw: Draw
    filtered: Filtered
    score: np.ndarray
    """[V] scaled logits plus noise, before the filters."""

    def distance(self, token: int) -> float:
        """How far the scaled logits (or, at top-p's border, the probabilities) are from giving `token` instead.

        That token must be let in by both filters, and every better kept token must either be caught up with or fall
        to a filter. 0 for the token that was drawn.
        """
        f = self.filtered
        to_enter = 0.0
        if not f.kept[token]:
            to_enter = max(
                f.threshold - float(f.scaled[token]), (1 - self.draw.top_p) - float(f.cumulative[token]), 0.0
            )
        needed = to_enter
        for rival in np.flatnonzero(f.kept & (self.score > self.score[token])):
            to_pass = float(self.score[rival] - self.score[token])
            to_leave = min(
                float(f.scaled[rival]) - f.threshold if self.draw.top_k else np.inf,
                float(f.cumulative[rival]) - (1 - self.draw.top_p) if self.draw.top_p < 1 else np.inf,
            )
            needed = max(needed, min(to_pass, to_leave))
        return needed


def choose(logits: np.ndarray, draw: Draw, position: int) -> Step:
    """Draw the token of an absolute position from the logits `[V]` of the true vocabulary."""
    filtered = warp(logits, draw)
    score = filtered.scaled
    if draw.temperature:
        score = score + gumbel(draw.seed, position, len(logits)).astype(logits.dtype)
    final = np.where(filtered.kept, score, -np.inf)
    token = int(np.argmax(final))
    second = np.max(np.delete(final, token)) if len(final) > 1 else -np.inf
    return Step(
        token=token,
        log_prob=float(logits[token] - np.max(logits) - np.log(np.sum(np.exp(logits - np.max(logits))))),
        gap=float(final[token] - second),
        draw=draw,
        filtered=filtered,
        score=score,
    )


def decode(
    model: Llama,
    prompt: Sequence[int],
    new_tokens: int,
    draw: Draw = GREEDY,
    *,
    vocab_size: int,
    end_tokens: Sequence[int] = (),
    text: Sequence[int] | None = None,
) -> list[Step]:
    """Decode up to `new_tokens` tokens, an end token included; ids of `vocab_size` and over are padding.

    With `text`, what plain decoding would give at every place of a text that another wrote.
    """
    model.reset()
    for token in prompt:
        logits = model.feed(token)
    steps: list[Step] = []
    while True:
        steps.append(choose(logits[:vocab_size], draw, model.length))
        if len(steps) == new_tokens or steps[-1].token in end_tokens:
            return steps
        logits = model.feed(steps[-1].token if text is None else text[len(steps) - 1])
