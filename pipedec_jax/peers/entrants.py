"""Who takes part: the demo family's target, by name, decoded by every peer and by our own methods."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipedec_jax.decoding.decoder import Decoder
from pipedec_jax.loading import load_demo
from pipedec_jax.peers.answer import Peer
from pipedec_jax.peers.gguf_file import write_gguf
from pipedec_jax.peers.ours import Ours


def entrants(folder: Path, slots: int, threads: int) -> dict[str, Callable[[], Peer]]:
    """Makers of all peers, by name; ours begin with "ours".

    Args:
        folder: for GGUF files.
        slots: tokens of prompt and answer at most.
        threads: of each peer.
    """
    return ours() | llama_cpp(folder, slots, threads) | hugging_face(threads)


def ours() -> dict[str, Callable[[], Peer]]:
    """Our decoders, on one device and on two ranks."""
    target, draft = load_demo("target"), load_demo("draft")

    def make(own_draft: bool = False, **options: Any) -> Peer:
        return Ours(Decoder(target, draft if own_draft else None, dtype="float32", **options))

    settings: dict[str, dict[str, Any]] = {
        "plain, one device": {"method": "pp", "stages": 1},
        "pp, two stages": {"method": "pp", "stages": 2},
        "ppsd, chain, two stages": {"method": "ppsd", "stages": 2, "exit_layer": 8},
    }
    tree = {"method": "best-first", "adaptive": False}
    settings["best-first, look-up, width 2, two stages"] = {
        **tree,
        "stages": 2,
        "drafter": "ngram",
        "draft_steps": 1,
        "width": 2,
        "children": 2,
    }
    for width, steps in ((2, 2), (4, 4)):
        settings[f"best-first, draft and look-up, width {width}, a stage and a draft"] = {
            **tree,
            "stages": 1,
            "drafter": "both",
            "draft_steps": steps,
            "width": width,
            "children": width,
            "own_draft": True,
        }
    return {f"ours: {name}": functools.partial(make, **options) for name, options in settings.items()}


def llama_cpp(folder: Path, slots: int, threads: int) -> dict[str, Callable[[], Peer]]:
    """llama.cpp on the same weights."""
    from pipedec_jax.peers.cpp import Context, LlamaCpp

    @functools.cache
    def context(name: str) -> Context:
        model, path = load_demo(name), folder / f"{name}.gguf"
        write_gguf(model, path)
        return Context(path, model.vocab_size, slots, threads)

    found: dict[str, Callable[[], Peer]] = {"llama.cpp: plain": lambda: LlamaCpp(context("target"))}
    for guesses in (2, 4, 8):
        found[f"llama.cpp: draft model, {guesses} guesses"] = functools.partial(
            lambda guesses: LlamaCpp(context("target"), context("draft"), guesses), guesses
        )
    found["llama.cpp: draft model, at most 16 guesses, each of 0.75 at least"] = lambda: LlamaCpp(
        context("target"), context("draft"), 16, 0.75
    )
    for guesses in (4, 10):
        found[f"llama.cpp: look-up, {guesses} guesses"] = functools.partial(
            lambda guesses: LlamaCpp(context("target"), None, guesses), guesses
        )
    return found


def hugging_face(threads: int) -> dict[str, Callable[[], Peer]]:
    """Transformers on the same weights."""
    from pipedec_jax.peers.hugging_face import HuggingFace, load_torch

    @functools.cache
    def model(name: str) -> Any:
        import torch

        torch.set_num_threads(threads)
        with importlib.resources.as_file(importlib.resources.files("pipedec_jax") / "demo" / name) as directory:
            return load_torch(directory)

    return {
        "transformers: plain": lambda: HuggingFace(model("target")),
        "transformers: assistant model": lambda: HuggingFace(model("target"), assistant_model=model("draft")),
        "transformers: prompt look-up, 10 guesses": lambda: HuggingFace(model("target"), prompt_lookup_num_tokens=10),
    }
