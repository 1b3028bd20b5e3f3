"""By what processes know that they would compute the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import pipedec_jax
from pipedec_jax.hosts import facts
from pipedec_jax.loading import Model, load
from pipedec_jax.model.parameters import MemorySource, nest, parameter_shapes


@pytest.mark.parametrize("name", facts.VARIABLES)
def test_a_variable_that_decides_what_is_computed_is_a_fact(monkeypatch, name):
    monkeypatch.delenv(name, raising=False)
    before = facts.versions()
    assert facts.versions() == before
    monkeypatch.setenv(name, "another")
    assert {key for key, value in facts.versions().items() if value != before[key]} == {name}


def test_checkouts_of_one_version_that_differ_in_any_module_are_told_apart(monkeypatch, tmp_path):
    (tmp_path / "part").mkdir()
    for name in ("__init__.py", "part/tick.py"):
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(pipedec_jax, "__file__", str(tmp_path / "__init__.py"))
    before = facts.versions()["pipedec_jax"]
    assert before.startswith(f"{pipedec_jax.__version__} (")
    (tmp_path / "part" / "tick.py").write_text("x = 2\n")
    assert facts.versions()["pipedec_jax"] != before


def test_models_are_the_same_by_geometry_tokens_dtype_and_weights_wherever_they_lie(family):
    target = load(family["target"])
    noise = np.random.default_rng(0)
    tree = {path: noise.normal(size=shape) for path, shape in parameter_shapes(target.config).items()}

    def known(**changes):
        shifted = changes.pop("shifted", "final_norm")
        arrays = tree | {shifted: tree[shifted] + changes.pop("shift", 0.0)}
        config = dataclasses.replace(target.config, **changes.pop("geometry", {}))
        source = MemorySource(config, nest(arrays))
        model = Model(config, target.tokenizer, lambda: source, **({"name": "here"} | changes))
        return facts.model_facts({"target": model, "draft": target})

    before = known()
    assert known(name="there") == before
    assert len(before) == 2 * 4, "of each model its own"
    for changes, what in (
        ({"shift": 1.0}, "target weights"),
        ({"shift": 1e-3, "shifted": "layers/0/query"}, "target weights"),
        ({"shift": 1e-3, "shifted": f"layers/{target.config.layers - 1}/down"}, "target weights"),
        ({"dtype": "bfloat16"}, "target dtype"),
        ({"geometry": {"norm_eps": 1e-3}}, "target geometry"),
    ):
        found = known(**changes)
        assert [name for name in before if found[name] != before[name]] == [what]
