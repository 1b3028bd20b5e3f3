"""The geometry of a LLaMA model, as a frozen dataclass that any JSON file can fill."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from pathlib import Path
from typing import Any

LARGEST = 2**31 - 1
"""Bound of every size of a model."""
MOST_LAYERS = 2**13
"""Bound of the number of layers."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The `llama3` frequency scaling of LLaMA 3.1 and later (Hugging Face `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


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
        if not isinstance(self.int8, bool):
            raise ValueError(f"int8 must be true or false, not {self.int8!r}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads ({self.kv_heads}) must divide heads ({self.heads})")
        if self.head_size % 2:
            raise ValueError(f"head_size must be even for rotary embeddings, not {self.head_size}")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name} must be a positive number, not {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary that `from_dict` reads back."""
        values = dataclasses.asdict(self)
        if not self.int8:  # Left out where it says nothing: files and fingerprints are older than it.
            del values["int8"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LlamaConfig:
        """Build a config from a dictionary.

        Raises:
            ValueError: for an unknown key (naming the nearest right one), a missing key or a bad value.
        """
        values = dict(values)
        check_keys(values, cls, "model config")
        scaling = values.get("rope_scaling")
        if scaling is not None:
            check_keys(scaling, RopeScaling, "rope_scaling")
            values["rope_scaling"] = RopeScaling(**scaling)
        return cls(**values)


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
