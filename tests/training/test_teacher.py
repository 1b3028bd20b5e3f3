"""Records of the teacher: their prompts and noise, that a kill leaves none torn, and how they are drawn."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from pipedec_jax.training import teacher
from pipedec_jax.training.batches import TextWindows
from pipedec_jax.training.generate import Record
from pipedec_jax.training.teacher import Portion, TeacherWindows, record_portion, write_records

WINDOWS = TextWindows([np.arange(1, 500, dtype=np.int32)], begin=0)
CONFIG = SimpleNamespace()


def record(token):
    best = np.zeros((*np.shape(token), 2))
    return Record(np.asarray(token, np.int32), best.astype(np.uint16), best.astype(np.float16))


def test_every_batch_of_a_portion_continues_other_text_with_other_noise(monkeypatch):
    calls = []

    def generate(config, params, prompt, new, temperature, K, key):
        calls.append((prompt, new, temperature.tolist(), jax.random.key_data(key).tolist()))
        best = np.zeros((len(prompt), prompt.shape[1] + new - 1, K))
        return np.pad(prompt, ((0, 0), (0, new))), best, best

    monkeypatch.setattr(teacher, "generate", generate)
    found = list(record_portion(CONFIG, {}, WINDOWS, Portion(12, 4, 6, 8, 0.25), 1000, 3, 7))
    assert [one.token.shape for one in found] == [(4, 14)] * 3
    assert [one.choice.shape for one in found] == [(4, 14, 3)] * 3
    for number, (prompt, new, temperature, _) in enumerate(calls):
        np.testing.assert_array_equal(prompt, WINDOWS(1000 + 4 * number, 4, 6)["token"])
        assert new == 9, "the last kept token has the teacher's choices too"
        assert temperature == [0.0, 1.0, 1.0, 1.0]
    assert len({tuple(key) for *_, key in calls}) == 3


def test_prompts_of_portions_differ_and_a_killed_run_goes_on_with_the_next(tmp_path, monkeypatch):
    firsts = []

    def portion_records(config, params, windows, portion, first, K, seed):
        firsts.append(first)
        yield record(np.full((portion.sequences, portion.length), len(firsts)))

    monkeypatch.setattr(teacher, "record_portion", portion_records)
    portions = [Portion(500_000, 500_000, 1), Portion(3, 3, 4), Portion(3, 3, 4)]
    save, saved = np.savez, []

    def stop(file, **arrays):
        if len(saved) == 2:
            file.write(b"torn")
            raise KeyboardInterrupt
        saved.append(file)
        save(file, **arrays)

    monkeypatch.setattr(np, "savez", stop)
    with pytest.raises(KeyboardInterrupt):
        write_records(CONFIG, {}, WINDOWS, portions, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.npz")) == ["00-1.npz", "01-4.npz"]
    assert np.diff(firsts).min() >= 500_000
    monkeypatch.setattr(np, "savez", save)
    write_records(CONFIG, {}, WINDOWS, portions, tmp_path)
    assert firsts[3:] == firsts[2:3], "what was finished is not made again"
    assert sorted(TeacherWindows(tmp_path)(0, 6, 4)["token"][:, 0]) == [2, 2, 2, 4, 4, 4]


def test_every_round_draws_each_sequence_once_in_an_order_of_its_own(tmp_path):
    held = record(np.arange(8)[:, None].repeat(3, axis=1))
    np.savez(tmp_path / "00-3.npz", token=held.token, choice=held.choice, log_prob=held.log_prob)

    def drawn(window, B, seed=0):
        return TeacherWindows(tmp_path, seed)(window, B, 3)["token"][:, 0].tolist()

    rounds = [drawn(8 * number, 8) for number in range(3)]
    assert all(sorted(one) == list(range(8)) for one in rounds)
    assert len({tuple(one) for one in rounds}) == 3
    assert drawn(5, 8) == [*rounds[0][5:], *rounds[1][:5]], "a batch may lie in two rounds"
    assert drawn(0, 8, seed=1) != rounds[0]
    with pytest.raises(ValueError, match="a batch of 9 needs more sequences of length 3 than the 8 recorded"):
        drawn(0, 9)
