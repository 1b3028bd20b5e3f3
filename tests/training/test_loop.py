"""Numbered steps: what is logged, saved and refused."""

import jax
import numpy as np
import pytest

from pipedec_jax.training.loop import compile_step, run_steps


class Saved:
    """In place of checkpoints on disk: what was saved under which step."""

    def __init__(self):
        self.steps = {}

    def save(self, step, params, state):
        self.steps[step] = (params, state)


def count(number, carry):
    params, state = carry
    return (params + 1, [*state, number]), {"loss": np.float32(number)}, 10


@pytest.mark.parametrize(("platform", "expected"), [("cpu", None), ("gpu", True), ("tpu", None)])
def test_gpus_and_no_others_are_told_to_add_in_a_fixed_order(platform, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "jit", lambda _, **options: options["compiler_options"])
    assert (compile_step(count) or {}).get("xla_gpu_deterministic_ops") is expected


def test_the_last_step_is_saved_whatever_the_time_and_under_the_number_of_the_next():
    saved = Saved()
    assert run_steps("x", range(3, 8), 20, (0, []), count, saved, save_seconds=1e9) == (5, [3, 4, 5, 6, 7])
    assert saved.steps == {8: (5, [3, 4, 5, 6, 7])}
    saved = Saved()
    run_steps("x", range(3, 6), 20, (0, []), count, saved, save_seconds=-1)
    assert {step: state for step, (_, state) in saved.steps.items()} == {4: [3], 5: [3, 4], 6: [3, 4, 5]}


def test_a_log_is_the_mean_of_the_steps_since_the_last_one():
    lines = []
    run_steps("x", range(30, 65), 100, (0, []), count, Saved(), log=lines.append)
    assert [(line["model"], line["step"], line["loss"]) for line in lines] == [
        ("x", 40, np.mean(range(30, 40))),
        ("x", 60, np.mean(range(40, 60))),
        ("x", 65, np.mean(range(60, 65))),
    ]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(bad):
    def advance(number, carry):
        return carry, {"loss": np.float32(bad if number == 25 else 1)}, 1

    saved = Saved()
    with pytest.raises(ValueError, match=r"the loss of x is .* at step 40; lower learning_rate"):
        run_steps("x", range(50), 50, (0, []), advance, saved, save_seconds=1e9)
    assert saved.steps == {}
