"""500 corrupted inputs by seed; `scripts/fuzz_checkpoints.py` tries 10,000."""

import pytest

from checkpoint_trials.fuzzing import Fuzzer


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    return Fuzzer(tmp_path_factory.mktemp("fuzz") / "work")


@pytest.mark.parametrize("first", range(0, 500, 100))
def test_corrupted_inputs_end_in_a_clear_error_or_a_correct_result(first, fuzzer):
    outcomes = [fuzzer.run(seed) for seed in range(first, first + 100)]
    assert any(outcome.error is None for outcome in outcomes)
    assert len({outcome.error for outcome in outcomes}) > 30
