"""Hugging Face's `config.json` to `LlamaConfig` and back: old and new spellings, and every setting we refuse."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from checkpoints_convert.families import FAMILIES, Family
from pipedec_jax.config import LinearScaling, Llama3Scaling, LlamaConfig, RopeScaling, YarnScaling
from pipedec_jax.small_files import json_kind, read_small

ORIGINAL = "original_max_position_embeddings"

ROPE_REFUSED = {
    "dynamic": "over max_position_embeddings its rotations change as the text grows, and with them what is in the "
    "cache; up to there it changes nothing: remove it from config.json to decode that far",
    "longrope": "its rotations change when the text outgrows the original context, and with them what is in the cache",
}
"""RoPE scalings of Hugging Face's LLaMA that have no place in a pipe of caches, and why."""

Json = dict[str, Any]


def read_json(path: Path) -> Json:
    """The JSON object in file `path`.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it does not hold one JSON object in UTF-8, or is too large (see `pipedec_jax.small_files`).
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a Hugging Face LLaMA directory has a {path.name}")
    data = read_small(path)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not {json_kind(values)}")
    return values


def llama_config(values: Json) -> LlamaConfig:
    """The geometry in the object of a `config.json`.

    Keys that may be absent default to what Hugging Face's configuration of the model's family gives them. Keys that
    change nothing when decoding (`pretraining_tp`, `attention_dropout`, `use_cache`, ...) are ignored. Where a layer
    attends to the last positions only (`sliding_window`), the context ends where the window would begin to slide.

    Raises:
        ValueError: for a missing key, a value of the wrong type, or a setting that this model does not have.
    """
    family = family_of(values)
    values = dict(family.defaults) | values
    _refuse_unsupported(values, family)
    width, heads = whole(values, "hidden_size"), whole(values, "num_attention_heads")
    if values.get("head_dim") is None and width % max(heads, 1):
        raise ValueError(
            f"hidden_size ({width}) is no multiple of num_attention_heads ({heads}) and head_dim is absent"
        )
    context = whole(values, "max_position_embeddings", 2048)
    theta, scaling = _rope(values, context)
    return LlamaConfig(
        vocab_size=whole(values, "vocab_size"),
        width=width,
        feed_forward=whole(values, "intermediate_size"),
        layers=whole(values, "num_hidden_layers"),
        heads=heads,
        kv_heads=whole(values, "num_key_value_heads", heads),
        head_size=whole(values, "head_dim", width // heads),
        # Vicuna 16k states the positions before scaling, and what it was trained for apart.
        context=_in_window(values, family, max(context, whole(values, "max_sequence_length", context))),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=number(values, "rms_norm_eps", 1e-6),
        tied_embeddings=_flag(values, "tie_word_embeddings"),
        attention_bias=_flag(values, "attention_bias") if family.biased is None else bool(family.biased),
        feed_forward_bias=_flag(values, "mlp_bias") if family.biased is None else False,
    )


def family_of(values: Json) -> Family:
    """The family that `model_type` in the object of a `config.json` names; `ValueError` where it is another."""
    kind = values.get("model_type")
    if kind not in list(FAMILIES):  # also where it cannot be hashed
        raise ValueError(f"model_type is {kind!r}; only {', '.join(map(repr, FAMILIES))} can be converted")
    return FAMILIES[kind]


def config_json(config: LlamaConfig, dtype: str) -> Json:
    """The object of a `config.json` for weights stored as `dtype` (`"bfloat16"`, ...).

    Written in the old spellings (`rope_theta`, `rope_scaling`, `torch_dtype`), which every transformers release reads.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else _rope_scaling_json(config.rope_scaling),
        "attention_bias": config.attention_bias,
        "mlp_bias": config.feed_forward_bias,
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": dtype,
    }


def token_ids(values: Json, key: str) -> list[int]:
    """The token ids under `key`, which files write as one number, a list or null."""
    found = values.get(key)
    ids = [] if found is None else found if isinstance(found, list) else [found]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ValueError(f"{key} must be a token id, a list of token ids or null, not {found!r}")
    return ids


def _refuse_unsupported(values: Json, family: Family) -> None:
    """Raise `ValueError` for another architecture, or a variant of LLaMA that this package does not compute."""
    architectures, known = values.get("architectures") or [], (family.architecture, *family.spellings)
    if not isinstance(architectures, list) or not all(name in known for name in architectures):
        raise ValueError(f"architectures is {architectures!r}; only {family.architecture!r} can be converted")
    if values.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        raise ValueError(f"hidden_act is {values['hidden_act']!r}; only 'silu' is supported")
    if values.get("quantization_config") is not None:
        method = values["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise ValueError(
            f"quantization_config is present (quant_method {method!r}); convert the unquantized checkpoint "
            "(bfloat16, float16 or float32) instead"
        )


def _in_window(values: Json, family: Family, context: int) -> int:
    """The positions up to which every layer attends to all before it: what its context and its window both hold."""
    known = dict(family.defaults)
    if "sliding_window" not in known or values["sliding_window"] is None:
        return context
    if "use_sliding_window" in known:
        if not _flag(values, "use_sliding_window"):
            return context
        kinds = values.get("layer_types")
        if kinds is not None and not isinstance(kinds, list):
            raise ValueError(f"layer_types must be a list, a kind for each layer, or null, not {kinds!r}")
        slides = whole(values, "num_hidden_layers") > number(values, "max_window_layers")
        if not (slides if kinds is None else "sliding_attention" in kinds):
            return context
    return min(context, whole(values, "sliding_window"))


def _rope(values: Json, context: int) -> tuple[float, RopeScaling | None]:
    """`rope_theta` and the scaling, from `rope_parameters` (new) or `rope_theta` and `rope_scaling` (old)."""
    new, old = (_object(values, key) for key in ("rope_parameters", "rope_scaling"))
    if new and old and new != old:
        raise ValueError("rope_parameters and rope_scaling contradict each other; remove one of them from config.json")
    settings = new or old
    thetas = {number(place, "rope_theta") for place in (settings, values) if place.get("rope_theta") is not None}
    if len(thetas) > 1:
        raise ValueError(f"rope_theta is given twice, as {' and '.join(map(str, sorted(thetas)))}; remove one of them")
    theta = thetas.pop() if thetas else 10000.0
    for place in (settings, values):
        if place.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ValueError(f"partial_rotary_factor is {place['partial_rotary_factor']!r}; only 1 is supported")
    return theta, _rope_scaling(settings, values, context)


def _rope_scaling(settings: Json, values: Json, context: int) -> RopeScaling | None:
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        factor = number(settings, "factor")
        return None if factor == 1 else LinearScaling(factor)
    # One beside the other settings goes before theirs.
    original = whole(values, ORIGINAL, whole(settings, ORIGINAL, context))
    if kind == "llama3":
        low, high = (number(settings, f"{name}_freq_factor") for name in ("low", "high"))
        return Llama3Scaling(number(settings, "factor"), low, high, original)
    if kind == "yarn":
        factor = number(settings, "factor")
        return YarnScaling(
            factor=factor,
            original_context=original,
            attention_factor=number(settings, "attention_factor", _yarn_attention_factor(settings, factor)),
            beta_fast=number(settings, "beta_fast", 0.0) or 32.0,
            beta_slow=number(settings, "beta_slow", 0.0) or 1.0,
            truncate="truncate" not in settings or _flag(settings, "truncate"),
        )
    why = f" ({ROPE_REFUSED[kind]})" if kind in list(ROPE_REFUSED) else ""
    raise ValueError(f"rope_type is {kind!r}{why}; only 'default', 'linear', 'llama3' and 'yarn' are supported")


def _yarn_attention_factor(settings: Json, factor: float) -> float:
    """What Hugging Face takes where `attention_factor` is not given."""
    growth = 0.1 * math.log(factor) if factor > 1 else 0.0
    over, under = (number(settings, key, 0.0) for key in ("mscale", "mscale_all_dim"))
    return (over * growth + 1) / (under * growth + 1) if over and under else growth + 1


def _rope_scaling_json(scaling: RopeScaling) -> Json:
    """The object of `rope_scaling`; `type` is what older releases call `rope_type`, and the only name they take."""
    kind = {"type" if scaling.kind == "linear" else "rope_type": scaling.kind}
    values = dataclasses.asdict(scaling)
    if "original_context" in values:
        values[ORIGINAL] = values.pop("original_context")
    return kind | values


def _object(values: Json, key: str) -> Json:
    found = values.get(key) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{key} must be a JSON object or null, not {found!r}")
    return found


def _get(values: Json, key: str, default: Any) -> Any:
    """`values[key]`, or the default when the key is absent or null (which Hugging Face treats alike)."""
    found = values.get(key)
    if found is None and default is None:
        raise ValueError(f"the configuration lacks {key!r}")
    return default if found is None else found


def whole(values: Json, key: str, default: int | None = None) -> int:
    """The positive whole number under `key`; `ValueError` when it is anything else, or absent without a default."""
    found = _get(values, key, default)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(f"{key} must be a positive whole number, not {found!r}")
    return found


def number(values: Json, key: str, default: float | None = None) -> float:
    """The number under `key`; `ValueError` when it is anything else, or absent without a default."""
    found = _get(values, key, default)
    # The bound keeps `float` from overflowing on a hostile whole number.
    if not isinstance(found, int | float) or isinstance(found, bool) or not -1e300 < found < 1e300:
        raise ValueError(f"{key} must be a number, not {found!r}")
    return float(found)


def _flag(values: Json, key: str) -> bool:
    found = values.get(key)
    if found is not None and not isinstance(found, bool):
        raise ValueError(f"{key} must be true or false, not {found!r}")
    return bool(found)
