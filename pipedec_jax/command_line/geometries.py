"""Geometries that a command is given: in a JSON file, or as a model's directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pipedec_jax
from pipedec_jax.command_line.output import in_words
from pipedec_jax.config import LlamaConfig
from pipedec_jax.tokenizer import Tokenizer


def read_object(path: str | Path, what: str) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        ValueError: naming the file and `what` it should be, when it holds none.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"there is no {what} {path}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{what} {path} cannot be read: {in_words(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{what} {path} must hold a JSON object")
    return values


def read_geometry(name: str, what: str) -> LlamaConfig:
    """Of a JSON file, such as those in configs/, or of a model's directory.

    Args:
        name: of the file or the directory.
        what: it is called in errors, such as `target`.

    Raises:
        ValueError: when it is none.
    """
    return geometry_and_tokenizer(name, what)[0]


def geometry_and_tokenizer(name: str, what: str) -> tuple[LlamaConfig, Tokenizer | None]:
    """The same, with the tokenizer of a model's directory."""
    if not name.endswith(".json"):
        model = pipedec_jax.load(name)
        return model.config, model.tokenizer
    values = read_object(name, what)
    try:
        return LlamaConfig.from_dict(values.get("model", values)), None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} {name} is no geometry: {error}") from None
