"""What all processes of one program must have alike: their versions, settings and models."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pipedec_jax
from pipedec_jax.exit_store import description_path
from pipedec_jax.loading import Model
from pipedec_jax.model.exit_head import ExitHeadConfig
from pipedec_jax.model.int8 import unrounded
from pipedec_jax.model.parameters import ParameterSource, parameter_shapes

VARIABLES = ("JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")
"""Of the environment, that decide what is computed."""
CORNER = 16
"""Elements along each axis of an array that are compared."""


def versions() -> dict[str, Any]:
    """Of all that decides what is computed."""
    return {
        "pipedec_jax": f"{pipedec_jax.__version__} ({_source_digest()})",
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "Python": platform.python_version(),
        **{name: os.environ.get(name) for name in VARIABLES},
    }


def model_facts(models: Mapping[str, Model]) -> dict[str, Any]:
    """Of models, by their part: geometry, tokens and a hash of some of their weights, wherever they lie."""
    return {
        f"{part} {name}": value
        for part, model in models.items()
        for name, value in (
            ("geometry", model.config.to_dict()),
            ("tokens", model.vocab_size),
            ("dtype", model.dtype),
            ("weights", _digest(_corners(unrounded(model.source)))),
        )
    }


def exit_facts(target: Model, head: ExitHeadConfig | None) -> dict[str, Any]:
    """Of the exit head that drafts, which each process may have chosen of those stored where it runs."""
    if head is None or head.variant == "target":
        return {"exit head": head and head.name}
    return {"exit head": head.name, "exit head's description": file_digest(description_path(target, head))}


def file_digest(path: Path) -> str:
    """A hash of a file's content."""
    return _digest([path.read_bytes()])


def _corners(source: ParameterSource) -> Iterable[bytes]:
    """Of what is no layer's, and of the first and the last layer: fine-tuning often leaves norms as they were.

    Not of all layers: a converted model is read in whole chunks.
    """
    held = {"0", str(source.config.layers - 1)}
    for path, shape in parameter_shapes(source.config).items():
        if not path.startswith("layers/") or path.split("/")[1] in held:
            corner = source.read(path, tuple(slice(0, min(CORNER, size)) for size in shape))
            yield np.ascontiguousarray(corner).tobytes()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _source_digest() -> str:
    """A hash of this package's modules: checkouts of the same version may differ."""
    root = Path(pipedec_jax.__file__).parent
    return _digest(path.read_bytes() for path in sorted(root.rglob("*.py")))
