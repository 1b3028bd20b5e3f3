"""Small problems, the shipped curve and stored results, for tests of plans."""

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

from pipedec_jax.analysis.hit_curve import HitCurve, Setting, read_hit_curve
from pipedec_jax.analysis.links import Link
from pipedec_jax.analysis.prediction import Problem
from pipedec_jax.config import LlamaConfig
from pipedec_jax.modeled.cost import Costs

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


def geometry(name: str) -> LlamaConfig:
    return LlamaConfig.from_dict(json.loads((CONFIGS / f"{name}.json").read_text())["model"])


def results(name: str) -> str:
    """The first table of stored results that has all figures: at least ten columns."""
    text = (ROOT / "scripts" / "results" / f"{name}.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    return next(table for table in tables if table.split("\n")[0].count("|") > 10)


@functools.cache
def curve() -> HitCurve:
    return read_hit_curve(json.loads((CONFIGS / "demo_hit_curve.json").read_text()))


FREE = Link(bandwidth=1e30, latency=0)
TINY = LlamaConfig(vocab_size=100, width=8, feed_forward=16, layers=8, heads=4, kv_heads=2, head_size=2, context=64)
LEVELS = Setting("pipedec", "model", width=4, children=2, draft_steps=1)
TREE = Setting("stpp", "model", width=4, children=2, draft_steps=3)


def problem(**changes: Any) -> Problem:
    lines = {LEVELS: {4: 1.6, 8: 2.4}, TREE: {4: 1.25, 8: 2.25}}
    values: dict[str, Any] = {"target": TINY, "draft": dataclasses.replace(TINY, layers=1), "link": FREE}
    values |= {"devices": 5, "context": 40}
    values |= {"costs": Costs(layer=10.0, head=6.0, draft=3.0), "curve": HitCurve(lines, {0.25: 0.8})}
    return Problem(**{**values, **changes})
