"""Pipeline-parallel LLaMA decoding in JAX: a pipe kept full by speculation, the tokens of plain decoding.

    target, draft = pipedec_jax.load("target-dir"), pipedec_jax.load("draft-dir")
    decoder = pipedec_jax.Decoder(target, draft, stages=4, width=16)
    print(decoder.generate("def quicksort(", max_new_tokens=128).text)

Names are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipedec_jax import disk_cache
    from pipedec_jax.config import LlamaConfig
    from pipedec_jax.decoding.decoder import Decoder
    from pipedec_jax.decoding.devices import use_cpu_devices
    from pipedec_jax.decoding.hierarchy import HierarchyDecoder
    from pipedec_jax.decoding.result import Generation, Token
    from pipedec_jax.decoding.stream import Stream
    from pipedec_jax.loading import Model, load, load_demo
    from pipedec_jax.model.module import Llama
    from pipedec_jax.model.parameters import MemorySource
    from pipedec_jax.recording.history import Recording
    from pipedec_jax.sampling import Sampling
    from pipedec_jax.soundness import NotFiniteError
    from pipedec_jax.tokenizer import Tokenizer

__version__ = "0.1.0"

_HOMES = {
    "Decoder": "pipedec_jax.decoding.decoder",
    "Generation": "pipedec_jax.decoding.result",
    "HierarchyDecoder": "pipedec_jax.decoding.hierarchy",
    "Llama": "pipedec_jax.model.module",
    "LlamaConfig": "pipedec_jax.config",
    "MemorySource": "pipedec_jax.model.parameters",
    "Model": "pipedec_jax.loading",
    "NotFiniteError": "pipedec_jax.soundness",
    "Recording": "pipedec_jax.recording.history",
    "Sampling": "pipedec_jax.sampling",
    "Stream": "pipedec_jax.decoding.stream",
    "Token": "pipedec_jax.decoding.result",
    "Tokenizer": "pipedec_jax.tokenizer",
    "load": "pipedec_jax.loading",
    "load_demo": "pipedec_jax.loading",
    "use_cpu_devices": "pipedec_jax.decoding.devices",
}

__all__ = [
    "Decoder",
    "Generation",
    "HierarchyDecoder",
    "Llama",
    "LlamaConfig",
    "MemorySource",
    "Model",
    "NotFiniteError",
    "Recording",
    "Sampling",
    "Stream",
    "Token",
    "Tokenizer",
    "disk_cache",
    "load",
    "load_demo",
    "use_cpu_devices",
]


if not TYPE_CHECKING:  # A type checker would take any name for one of these.

    def __getattr__(name: str) -> Any:
        if name == "disk_cache":
            return importlib.import_module("pipedec_jax.disk_cache")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
