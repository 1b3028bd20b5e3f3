"""The shipped models against plain decoding in NumPy: what trained ones guess hits deep, as random ones' does not."""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib.resources import files
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

import pipedec_jax
from pipedec_jax.exit_store import load_exit_head
from pipedec_jax.hierarchy.engine import HierarchyEngine
from pipedec_jax.hierarchy.settings import HierarchySettings
from pipedec_jax.modeled.exit_cost import ppsd_ticks
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.sampling import Sampling
from tests import oracle
from tests.exactness import check_state
from tests.oracle import GREEDY, Draw

NEW = 64
PROMPTS = ("def quicksort(items):\n", "x", "    for name in names:\n        try:\n            self.")
"""Of several lengths, in one process; the second is a single token."""
DRAWS = {"sampled": Draw(0.7, seed=5), "greedy": GREEDY}
METHODS = {
    "pipedec, uneven stages": ("model", "sampled", EngineSettings(method="pipedec", stages=3, width=8, children=4)),
    "best-first, two draft steps": (
        "both",
        "greedy",
        EngineSettings(method="best-first", stages=5, width=8, children=4, draft_steps=2),
    ),
    "best-first from an exit, a tree": (
        "both",
        "sampled",
        EngineSettings(method="best-first", stages=4, exit_layer=4, width=8, children=4),
    ),
    "ppsd, an exit path of four stages": (
        "model",
        "greedy",
        EngineSettings(method="ppsd", stages=16, exit_layer=4, width=1, children=1),
    ),
}
"""The drafter, how tokens are drawn, and the settings."""


@functools.cache
def plain() -> oracle.Llama:
    """The target's own files, read without the package."""
    folder = files("pipedec_jax") / "demo" / "target"
    config = json.loads((folder / "config.json").read_text())
    weights = safetensors.numpy.load_file(str(folder / "model.safetensors"))
    return oracle.Llama(config, weights, np.float64, 256)


@functools.cache
def expected(prompt: tuple[int, ...], draw: Draw, vocab_size: int) -> list[int]:
    return [step.token for step in oracle.decode(plain(), prompt, NEW, draw, vocab_size=vocab_size)]


@functools.cache
def engine(method: str) -> Engine:
    """Weights in float64: a test without rounding."""
    target = pipedec_jax.load_demo("target")
    drafter, _, settings = METHODS[method]
    settings = dataclasses.replace(settings, dtype=np.dtype(np.float64))
    models: dict[str, Any] = {"draft": pipedec_jax.load_demo("draft").source}
    if settings.exit_layer is not None:
        models = {"draft": None, "exit_head": load_exit_head(target, settings.exit_layer)}
    return Engine(target.source, settings=settings, vocab_size=target.vocab_size, drafter=drafter, **models)


@pytest.mark.parametrize("method", METHODS)
def test_a_trained_pair_writes_the_text_of_plain_decoding(method: str) -> None:
    target, draw = pipedec_jax.load_demo("target"), DRAWS[METHODS[method][1]]
    hits = []
    with jax.enable_x64(True):
        decoder = engine(method)
        for text in PROMPTS:
            prompt = tuple(target.tokenizer.encode(text))
            decoder.start(prompt, max_new_tokens=NEW, sampling=Sampling(draw.temperature, seed=draw.seed))
            for piece in (5, NEW):
                progress = decoder.run(piece)
                check_state(decoder)
            assert progress.tokens == expected(prompt, draw, target.vocab_size)
            hits += progress.hits[:-1]
            if method.startswith("ppsd"):
                counts = sum(progress.hits[:-1]), NEW - 1 - sum(progress.hits[:-1])
                assert progress.ticks[-1] == ppsd_ticks(16, 4, *counts)
    assert 0.3 < np.mean(hits) < 1


@pytest.mark.parametrize("form", ["lockstep", "free"])
def test_a_trained_hierarchy_writes_the_text_of_plain_decoding(form: str) -> None:
    decoder, rolled = hierarchy(), 0
    decoder.settings = dataclasses.replace(decoder.settings, form=form)
    with jax.enable_x64(True):
        for text in PROMPTS:
            target = pipedec_jax.load_demo("target")
            prompt = tuple(target.tokenizer.encode(text))
            decoder.start(prompt, max_new_tokens=NEW)
            progress = decoder.run(NEW)
            assert progress.tokens == expected(prompt, GREEDY, target.vocab_size)
            rolled += sum(figures.rollbacks for figures in decoder.figures())
    assert rolled > 0


@functools.cache
def hierarchy() -> HierarchyEngine:
    """Of all three models; both forms share the programs."""
    models = [pipedec_jax.load_demo(name) for name in ("draft", "middle", "target")]
    settings = HierarchySettings(stages=(1, 1, 2), passes=(4, 2), width=5, dtype=np.dtype(np.float64))
    with jax.enable_x64(True):
        return HierarchyEngine([model.source for model in models], settings, vocab_size=models[-1].vocab_size)
