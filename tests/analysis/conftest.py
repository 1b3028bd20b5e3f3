"""Compiled decoders of the benchmark's tests."""

import pytest

import pipedec_jax


@pytest.fixture(scope="module")
def decoders(family):
    target, draft = pipedec_jax.load(family["target"]), pipedec_jax.load(family["draft"])
    sizes = {"stages": 2, "prefill_width": 16, "capacity": 128}
    tree = {"drafter": "both", "width": 4, "children": 2, "draft_steps": 2}
    return {
        "pp-2": pipedec_jax.Decoder(target, method="pp", **sizes),
        "best-first-2x4": pipedec_jax.Decoder(target, draft, method="best-first", **sizes, **tree),
    }
