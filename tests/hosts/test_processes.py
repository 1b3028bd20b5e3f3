"""Cores that processes may use, by their affinity, where they share machines and where they do not."""

from __future__ import annotations

import os
import types
from typing import Any, cast

import numpy as np
import pytest

from pipedec_jax.hosts import processes

if not hasattr(os, "sched_getaffinity"):
    pytest.skip("this system tells no affinity", allow_module_level=True)


def test_a_process_may_use_the_cores_of_its_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.usable_cores() == len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 9})
    assert processes.usable_cores() == 2


@pytest.mark.parametrize(
    ("members", "each", "cores"),
    [
        ([("a", {0, 1}), ("a", {0, 1})], 4, 2),  # one container
        ([("a", {0, 1}), ("a", {2, 3, 40})], 4, 5),  # pinned apart
        ([("a", {0, 1}), ("b", {0, 1})], 4, 4),  # two machines
        ([("a", set(range(200))), ("b", {7})], 4, 5),  # no more than there are devices
    ],
)
def test_cores_of_a_machine_count_once(monkeypatch: pytest.MonkeyPatch, members, each, cores) -> None:
    told: list[np.ndarray] = []

    def gather(mine: np.ndarray) -> np.ndarray:
        told.append(mine)
        return np.stack([*told, *[mine] * (len(members) - len(told))])

    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
    devices = [types.SimpleNamespace(process_index=index) for index in range(len(members)) for _ in range(each)]
    for host, affinity in members:
        monkeypatch.setattr(processes.socket, "gethostname", lambda host=host: host)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, affinity=affinity: affinity)
        found = processes.cores_in_all(cast(Any, devices))
    assert found == cores
