"""The geometry of a LLaMA model, as a frozen dataclass that any JSON file can fill."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from pathlib import Path
from typing import Any, ClassVar

LARGEST = 2**31 - 1
"""Bound of every size of a model."""
MOST_LAYERS = 2**13
"""Bound of the number of layers."""
LATER_FLAGS = ("int8", "attention_bias", "feed_forward_bias")
"""What `LlamaConfig` says with a true, and in files older than it not at all."""


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """All rotations slowed alike (Hugging Face `rope_type: linear`): Vicuna 16k, LongChat, DeepSeek Coder."""

    kind: ClassVar[str] = "linear"

    factor: float

    def __post_init__(self) -> None:
        _check_positive(self)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """The scaling of LLaMA 3.1 and later (`rope_type: llama3`): slow rotations slowed, fast ones kept."""

    kind: ClassVar[str] = "llama3"

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"llama3 RoPE scaling needs low_freq_factor < high_freq_factor, not {self.low_freq_factor} and "
                f"{self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (`rope_type: yarn`): as `llama3` with a ramp over dimensions, and cosine and sine multiplied by a factor."""

    kind: ClassVar[str] = "yarn"

    factor: float
    original_context: int
    attention_factor: float
    """By which cosine and sine are multiplied, so that scores are by its square."""
    beta_fast: float = 32.0
    """Dimensions that turn more often than this within the original context are kept."""
    beta_slow: float = 1.0
    """Those that turn less often are slowed by the whole factor."""
    truncate: bool = True
    """Whether the ramp between them begins and ends at whole dimensions."""

    def __post_init__(self) -> None:
        _check_positive(self)
        if not isinstance(self.truncate, bool):
            raise ValueError(f"truncate must be true or false, not {self.truncate!r}")


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling
"""How a model's rotary frequencies differ from `rope_theta`'s own; what it does is in `model.rope`."""
ROPE_SCALINGS: dict[str, type[RopeScaling]] = {
    scaling.kind: scaling for scaling in (LinearScaling, Llama3Scaling, YarnScaling)
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Static sizes of one LLaMA model. Everything here is known before a weight is read."""

    vocab_size: int
    """Rows of the embedding (V), padding rows of the checkpoint included."""
    width: int
    """Width of the residual stream (D)."""
    feed_forward: int
    """Width of the gated feed-forward layer (F)."""
    layers: int
    """Number of decoder layers (L)."""
    heads: int
    """Query heads (H)."""
    kv_heads: int
    """Key and value heads (G); divides `heads`."""
    head_size: int
    """Size of one head (A); not always `width // heads`."""
    context: int
    """Largest number of positions the model was trained for."""
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    """Whether the LM head is the embedding transposed (then no `head` array is stored)."""
    int8: bool = False
    """Whether the layers' matrices are int8, with a float32 scale for every output channel."""
    attention_bias: bool = False
    """Whether query, key, value and output add a bias (Granite 3B and 8B Code)."""
    feed_forward_bias: bool = False
    """Whether gate, up and down do (Hugging Face's `mlp_bias`)."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "width",
            "feed_forward",
            "layers",
            "heads",
            "kv_heads",
            "head_size",
            "context",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, not {value!r}")
            # Keeps a damaged file from being taken for a model of more arrays than memory holds names of.
            most = MOST_LAYERS if name == "layers" else LARGEST
            if value > most:
                raise ValueError(f"{name} must be at most {most}, not {value}")
        for name in ("tied_embeddings", *LATER_FLAGS):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads ({self.kv_heads}) must divide heads ({self.heads})")
        if self.head_size % 2:
            raise ValueError(f"head_size must be even for rotary embeddings, not {self.head_size}")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name} must be a positive number, not {value!r}")
        if isinstance(self.rope_scaling, YarnScaling) and self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be over 1 with yarn scaling, not {self.rope_theta!r}")
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            kinds = ", ".join(kind.__name__ for kind in ROPE_SCALINGS.values())
            raise ValueError(
                f"rope_scaling must be one of {kinds} or None, not {self.rope_scaling!r} (LlamaConfig.from_dict makes "
                "one of a dictionary)"
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary that `from_dict` reads back."""
        values = dataclasses.asdict(self)
        for name in LATER_FLAGS:  # Left out where they say nothing: files and fingerprints are older than they.
            if not values[name]:
                del values[name]
        if self.rope_scaling is not None and self.rope_scaling.kind != "llama3":  # Likewise.
            values["rope_scaling"] = {"kind": self.rope_scaling.kind} | values["rope_scaling"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LlamaConfig:
        """Build a config from a dictionary.

        Raises:
            ValueError: for an unknown key (naming the nearest right one), a missing key or a bad value.
        """
        check_keys(values, cls, "model config")
        values = dict(values)
        scaling = values.get("rope_scaling")
        if scaling is not None:
            values["rope_scaling"] = _rope_scaling(scaling)
        return cls(**values)


def _rope_scaling(values: Any) -> RopeScaling:
    if not isinstance(values, dict):
        raise ValueError(f"rope_scaling must be an object with keys, not {values!r}")
    settings = dict(values)
    kind = settings.pop("kind", "llama3")
    if kind not in list(ROPE_SCALINGS):
        raise ValueError(f"the kind of rope_scaling must be one of {', '.join(ROPE_SCALINGS)}, not {kind!r}")
    check_keys(settings, ROPE_SCALINGS[kind], "rope_scaling")
    return ROPE_SCALINGS[kind](**settings)


def _check_positive(scaling: RopeScaling) -> None:
    """Raise `ValueError` unless the scaling's numbers are positive, and contexts whole."""
    for field in dataclasses.fields(scaling):
        value = getattr(scaling, field.name)
        if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{field.name} of rope_scaling must be a positive whole number, not {value!r}")
        if field.type == "float" and (
            not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf
        ):
            raise ValueError(f"{field.name} of rope_scaling must be a positive number, not {value!r}")


def read_values(path: Path) -> Any:
    """What a JSON file of our own holds; `ValueError` when it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error


def check_keys(values: dict[str, Any], cls: type, what: str) -> None:
    """Raise `ValueError` when `values` has a key that dataclass `cls` lacks, or lacks one it requires."""
    if not isinstance(values, dict):
        raise ValueError(f"{what} must be an object with keys, not {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(fields)}"
            raise ValueError(f"unknown key {key!r} in {what}{hint}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(map(repr, missing))}")


def check_exit(exit_layer: int, layers: int) -> None:
    """Raise `ValueError` unless there are layers on both sides of an exit, which a target of one layer has not."""
    if not 1 <= exit_layer < layers:
        choice = (
            f"choose 1 to {layers - 1}" if layers > 1 else "a target of one layer has no exit: choose another method"
        )
        raise ValueError(f"exit layer {exit_layer} lies not inside the target's {layers} layers; {choice}")
