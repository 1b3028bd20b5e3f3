"""The cases of the grid of methods and processes, and that no difference between answers goes uncounted."""

from pathlib import Path

import pytest

from pipedec_jax.hosts import grid
from pipedec_jax.hosts.grid import Case, cases, check


def test_every_case_uses_all_devices():
    for case in cases():
        arguments = case.arguments
        assert arguments is not None
        given = {name: arguments[arguments.index(name) + 1] for name in arguments if name.startswith("--")}
        models = 1 + ("--draft" in given)
        if "--models" in given:
            models = 3 if case.method.endswith("three") else 2
        ranks = int(given["--stages"]) + models - 1
        assert ranks * int(given.get("--tensor-parallel", 1)) == case.total, case.name
    assert {case.method for case in cases()} == set(grid.METHODS)
    assert Case("pipespec of three", 2, 1).arguments is None, "too few devices"


@pytest.mark.parametrize(
    ("found", "differing"),
    [
        ([[1, 2, 3], [4]], 0),
        ([[1, 9, 3], [4]], 1),
        ([[1, 2], [4]], 1),
        ([[1, 2, 3], [4, 5, 6]], 2),
        ([[], [5]], 4),
    ],
)
def test_tokens_that_are_missing_or_too_many_differ(monkeypatch, found, differing):
    monkeypatch.setattr(grid, "decode", lambda *_: found)
    outcome = check(Case("pp", 2, 1), [[1, 2, 3], [4]], Path(), Path(), 1.0)
    assert (outcome.differing, outcome.tokens) == (differing, sum(map(len, found)))
