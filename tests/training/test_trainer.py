import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model import llama
from pipedec_jax.model.parameters import initialize
from pipedec_jax.training.batches import TextWindows
from pipedec_jax.training.generate import score
from pipedec_jax.training.loop import Checkpoints
from pipedec_jax.training.teacher import Portion, TeacherWindows, write_records
from pipedec_jax.training.trainer import Phase, TrainingConfig, grow, loss_of, make_optimizer, train

MODEL = LlamaConfig(
    vocab_size=64, width=16, feed_forward=24, layers=2, heads=2, kv_heads=1, head_size=8, context=64
)  # fmt: skip
RUN = TrainingConfig(phases=(Phase(5, 1, 4, 16), Phase(4, 2, 2, 32)), warmup=2)
DOCUMENTS = [np.arange(1, 63, dtype=np.int32).repeat(3) for _ in range(4)]


@pytest.fixture(scope="module")
def initial():
    return jax.jit(initialize, static_argnums=0)(dataclasses.replace(MODEL, layers=1), jax.random.key(0))


def test_a_killed_and_resumed_run_ends_with_the_same_weights(tmp_path, initial):
    windows = TextWindows(DOCUMENTS, begin=0)
    whole = train("whole", MODEL, RUN, initial, windows, tmp_path / "whole")
    for stop in (5, 7, None):  # Once when the model is about to grow and once after.
        resumed = train("parts", MODEL, RUN, initial, windows, tmp_path / "parts", stop_after=stop)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    assert len(whole["layers"]) == 2
    assert optimizer_steps(tmp_path / "whole", 9) == {4}, "the optimizer's state goes from step to step, until it grows"


def optimizer_steps(directory, step):
    """How many steps the optimizers that were saved with a step have counted."""
    state = Checkpoints(directory)._manager.restore(step, args=ocp.args.StandardRestore())["state"]
    return {int(leaf) for leaf in state.values() if np.ndim(leaf) == 0 and np.issubdtype(leaf.dtype, np.integer)}


def test_training_lowers_the_loss(tmp_path, initial):
    windows = TextWindows(DOCUMENTS, begin=0)
    losses = []
    run = TrainingConfig(phases=(Phase(40, 1, 4, 16),), warmup=2)
    model = dataclasses.replace(MODEL, layers=1)
    train("short", model, run, initial, windows, tmp_path, log=lambda figures: losses.append(figures["loss"]))
    assert losses[-1] < losses[0] < np.log(64) + 0.1


def test_a_gradient_counts_for_no_more_than_the_clip():
    params, slope = {"final_norm": jnp.ones(4)}, {"final_norm": jnp.asarray([1.0, -2.0, 0.0, 2.0])}
    optimizer = make_optimizer(dataclasses.replace(RUN, clip=3.0))  # its norm

    def after(*scales):
        state = optimizer.init(params)
        for scale in scales:
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                update, state = optimizer.update(jax.tree.map(lambda x, by=scale: by * x, slope), state, params)
        return update

    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-4), after(1.0, 100.0), after(1.0, 1.0))
    assert not np.allclose(after(1.0, 0.5)["final_norm"], after(1.0, 1.0)["final_norm"]), "less is left as it is"


def test_a_grown_model_repeats_its_layers(initial):
    grown = grow(initial, 6)
    assert list(grown["layers"]) == [str(index) for index in range(6)]
    np.testing.assert_array_equal(grown["layers"]["5"]["up"], initial["layers"]["0"]["up"])


def test_every_step_has_the_sequences_after_those_of_the_steps_before():
    run = TrainingConfig(phases=(Phase(3, 1, 4, 16), Phase(2, 2, 5, 32)))
    assert [run.locate(step)[1] for step in range(5)] == [0, 4, 8, 12, 17]
    with pytest.raises(ValueError, match="0 steps after the last"):
        run.locate(5)


def test_the_rate_rises_stays_and_falls_to_zero():
    run = TrainingConfig(phases=(Phase(50, 1, 1, 8), Phase(50, 1, 1, 8, (1.0, 0.0))), warmup=10)
    rates = [run.fraction(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:51] == [1.0] * 42
    assert rates[75] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.02)


def test_distillation_loss_is_least_at_the_teacher(initial):
    model = dataclasses.replace(MODEL, layers=1)
    token = jnp.asarray(TextWindows(DOCUMENTS, begin=0)(0, 2, 16)["token"])
    choice, log_prob = score(model, initial, token, 8)
    batch = {"choice": choice.astype(jnp.int32), "log_prob": log_prob}
    logits = jax.jit(llama.forward, static_argnums=0)(model, initial, token).reshape(-1, 64)
    loss = jax.jit(loss_of)
    best = loss(logits, batch)
    for seed in range(3):
        noise = 0.3 * jax.random.normal(jax.random.key(seed), logits.shape)
        assert loss(logits + noise, batch) > best


def test_windows_start_with_the_begin_token_and_shift_by_one():
    batch = TextWindows(DOCUMENTS, begin=0)(7, 3, 16)
    assert (batch["token"][:, 0] == 0).all()
    np.testing.assert_array_equal(batch["token"][:, 1:], batch["target"][:, :-1])
    again = TextWindows(DOCUMENTS, begin=0)(8, 1, 16)
    np.testing.assert_array_equal(again["target"][0], batch["target"][1])


def test_windows_visit_the_whole_text_evenly():
    windows = TextWindows([np.arange(10_000)], begin=0)
    starts = np.sort([windows(number, 1, 16)["target"][0, 0] for number in range(200)])
    assert np.diff(starts).max() < 3 * 10_000 / 200


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="fewer than one sequence"):
        TextWindows([np.arange(5)], begin=0)(0, 1, 16)


def test_records_hold_source_and_written_text_and_are_drawn_in_rounds(tmp_path, initial):
    model = dataclasses.replace(MODEL, layers=1)
    portions = [Portion(8, 4, 16), Portion(4, 4, 8, 8, 0.5)]
    write_records(model, initial, TextWindows(DOCUMENTS, begin=0), portions, tmp_path, K=4)
    batches = TeacherWindows(tmp_path)
    batch = batches(0, 12, 16)
    assert batch["token"].shape == (12, 16)
    assert batch["choice"].shape == batch["log_prob"].shape == (12, 16, 4)
    assert len(np.unique(batch["token"], axis=0)) == 12
    assert sorted(map(tuple, batches(12, 12, 16)["token"])) == sorted(map(tuple, batch["token"]))
    with pytest.raises(ValueError, match="no records of length 99"):
        batches(0, 1, 99)


def test_a_plan_with_a_wrong_key_names_the_right_one():
    with pytest.raises(ValueError, match="did you mean 'layers'"):
        TrainingConfig.from_dict({"phases": [{"steps": 1, "layer": 2, "batch": 1, "length": 8}]})
