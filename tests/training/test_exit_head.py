"""Early-exit heads as they are trained: weights, batches, rates, teachers, and plans."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.exit_head import ExitHeadConfig, initialize_head
from pipedec_jax.model.parameters import flatten, nest, parameter_shapes
from pipedec_jax.training.batches import TextWindows
from pipedec_jax.training.exits import ExitPlan, ExitTraining, Stretch, distillation_loss, train_exit_heads
from pipedec_jax.training.trainer import loss_of
from tests.training.test_trainer import optimizer_steps

TARGET = LlamaConfig(vocab_size=64, width=16, feed_forward=24, layers=3, heads=2, kv_heads=1, head_size=8, context=64)
DOCUMENTS = [np.arange(1, 63, dtype=np.int32).repeat(3) for _ in range(4)]
SHAPE = (2, 16)
TRAINING = ExitTraining((Stretch(3, *SHAPE), Stretch(4, *SHAPE)), learning_rate=0.01, adam_learning_rate=0.01)
LINEAR, BLOCK = ExitHeadConfig(1, "norm-linear"), ExitHeadConfig(2, "block", width=8)
BOTH = ExitPlan((LINEAR, BLOCK), TRAINING)


@pytest.fixture(scope="module")
def own():
    noise = np.random.default_rng(0)
    shapes = parameter_shapes(TARGET)
    return nest({path: jnp.asarray(noise.normal(0, 0.1, shape), jnp.float32) for path, shape in shapes.items()})


@pytest.fixture(scope="module")
def batches():
    windows = TextWindows(DOCUMENTS, begin=0)
    return lambda window, B, T: {"token": windows(window, B, T)["token"]}


@pytest.fixture(scope="module")
def both(tmp_path_factory, own, batches):
    """The heads of an undisturbed run of two exits."""
    return train_exit_heads(BOTH, TARGET, own, batches, tmp_path_factory.mktemp("both"))


def test_a_stopped_and_resumed_run_ends_with_the_same_weights(tmp_path, own, batches, both):
    for stop in (2, 5, None):  # Once in each stretch.
        resumed = train_exit_heads(BOTH, TARGET, own, batches, tmp_path, stop_after=stop)
    jax.tree.map(np.testing.assert_array_equal, both, resumed)
    assert optimizer_steps(tmp_path, 7) == {7}, "the optimizers' state goes from step to step"


def test_a_head_trained_beside_others_equals_one_trained_alone(tmp_path, own, batches, both):
    alone = train_exit_heads(ExitPlan((LINEAR,), TRAINING), TARGET, own, batches, tmp_path)
    for (path, one), (_, two) in zip(flatten(alone[LINEAR.name]), flatten(both[LINEAR.name]), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4, err_msg=path)


def test_the_target_stays_as_it_is_and_every_array_of_the_heads_moves(tmp_path, own, batches):
    before = jax.tree.map(np.array, own)
    heads = train_exit_heads(BOTH, TARGET, own, batches, tmp_path, stop_after=2)
    jax.tree.map(np.testing.assert_array_equal, before, own)
    for head in BOTH.heads:
        first = dict(flatten(initialize_head(head, TARGET, own, TRAINING.seed)))
        for path, value in flatten(heads[head.name]):
            assert (np.asarray(value) != np.asarray(first[path])).any(), path


def test_training_teaches_heads_what_the_target_will_say(tmp_path, own, batches):
    losses = []
    plan = ExitPlan(BOTH.heads, dataclasses.replace(TRAINING, stretches=(Stretch(60, *SHAPE),)))
    train_exit_heads(plan, TARGET, own, batches, tmp_path, log=losses.append)
    for head in plan.heads:
        assert losses[-1][head.name] < losses[0][head.name] - 0.01


def test_bfloat16_learns_in_float32_weights(tmp_path, own, batches):
    losses = []
    training = dataclasses.replace(TRAINING, stretches=(Stretch(60, *SHAPE),), dtype="bfloat16")
    heads = train_exit_heads(ExitPlan((LINEAR,), training), TARGET, own, batches, tmp_path, log=losses.append)
    assert {value.dtype for value in jax.tree.leaves(heads)} == {jnp.dtype("float32")}
    assert losses[-1][LINEAR.name] < losses[0][LINEAR.name] - 0.01


def test_accumulated_batches_give_the_step_of_one_large_batch(tmp_path, own, batches):
    def train(batch, accumulate):
        training = dataclasses.replace(TRAINING, stretches=(Stretch(2, batch, 16),), accumulate=accumulate)
        return train_exit_heads(ExitPlan((LINEAR,), training), TARGET, own, batches, tmp_path / str(batch))

    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=1e-4), train(4, 1), train(2, 2))


def test_every_step_has_the_sequences_after_those_of_the_steps_before():
    training = ExitTraining((Stretch(3, 2, 8), Stretch(2, 5, 16)), accumulate=4)
    assert [training.locate(step)[1] for step in range(5)] == [0, 8, 16, 24, 44]
    with pytest.raises(ValueError, match="0 steps after the last"):
        training.locate(5)


def test_the_rate_rises_to_its_peak_and_falls_to_nearly_zero():
    training = dataclasses.replace(TRAINING, stretches=(Stretch(100, 1, 8),), warmup=0.1)
    rates = [training.fraction(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.001


def test_computed_and_recorded_teachers_agree():
    teacher = jax.random.normal(jax.random.key(1), (32, 64))
    logits = jax.random.normal(jax.random.key(2), (32, 64))
    log_prob, choice = jax.lax.top_k(jax.nn.log_softmax(teacher), 63)
    record = {"choice": choice.reshape(2, 16, 63), "log_prob": log_prob.reshape(2, 16, 63)}
    for hard in (0.0, 0.6, 1.0):
        found = jax.jit(distillation_loss)(logits, teacher, hard)
        # 63 of 64 tokens: the class of all others is the last token.
        np.testing.assert_allclose(found, jax.jit(loss_of)(logits, record, hard), rtol=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heads": []}, "at least one exit head"),
        ({"heads": 3}, "heads must be a list, not 3"),
        ({"heads": [3]}, "exit head must be an object with keys, not 3"),
        ({"training": {"stretches": 3}}, "stretches must be a list, not 3"),
        ({"heads": [{"exit_layer": 2}] * 2}, "2-norm-linear is named twice"),
        ({"heads": [{"exit_layer": 2, "variant": "target"}]}, "not trained"),
        ({"training": {"stretches": []}}, "at least one stretch"),
        ({"training": {"stretches": [{"steps": 0, "batch": 1, "length": 8}]}}, "steps must be a positive"),
        ({"training": {"stretches": [{"steps": 1, "batch": 1, "length": 8}], "hard": 2}}, "hard must lie between"),
        ({"training": {"stretches": [{"steps": 1, "batch": 1, "length": 8}], "dtype": "int8"}}, "float32, bfloat16"),
        ({"training": {"stretches": [{"steps": 1, "batch": 1, "length": 8}], "seed": -1}}, "seed must be at least 0"),
        ({"training": {"stretches": [{"steps": 1, "batch": 1, "length": 8}], "warm": 2}}, "did you mean 'warmup'"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(values, message):
    whole = {"heads": [{"exit_layer": 2}], "training": {"stretches": [{"steps": 1, "batch": 1, "length": 8}]}}
    with pytest.raises(ValueError, match=message):
        ExitPlan.from_dict(whole | values)


def test_sizes_of_a_block_that_is_not_trained_are_refused():
    with pytest.raises(ValueError, match="leave --feed-forward 8 out"):
        ExitPlan.simple([2], ["norm-linear"], feed_forward=8)
    ExitPlan.simple([2], ["norm-linear", "block"], feed_forward=8)
