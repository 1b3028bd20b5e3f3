"""What drafters claim is compared with what came: of models of your own, in plain decoding's words."""

import numpy as np
import pytest

import fit_calibration
import pipedec_jax
from pipedec_jax.analysis.claims import LENGTHS, Guesses, collect, fit_sharpness, log_softmax, reliability

PROMPTS = ["class Stack:", "x"]


def test_guesses_stand_beside_the_targets_own_text(family):
    target, draft = pipedec_jax.load(family["target"]), pipedec_jax.load(family["draft"])
    found = collect(target, draft, PROMPTS, max_new_tokens=12)
    plain = pipedec_jax.Decoder(target, method="pp", stages=1)
    answers = [plain.generate(prompt, max_new_tokens=12, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    assert found.token.tolist() == [token for answer in answers for token in answer.token_ids]
    assert found.logit.shape == (len(found.token), target.vocab_size)
    assert found.looked_up.shape == found.length.shape
    assert np.all((found.looked_up >= 0) == (found.length > 0))
    assert found.length.max() <= LENGTHS
    with pytest.raises(ValueError, match="max_new_tokens must be"):
        collect(target, draft, PROMPTS, max_new_tokens=0)
    # A draft that is the target: its favourite is the token that comes.
    same = collect(target, target, PROMPTS, max_new_tokens=12)
    assert np.argmax(same.logit, axis=1).tolist() == same.token.tolist()


def test_sharpness_is_the_factor_that_was_taken_off():
    random = np.random.default_rng(0)
    sharp = 2 * random.normal(size=(4000, 8))
    token = np.argmax(sharp + random.gumbel(size=sharp.shape), axis=1)
    none = np.zeros((4000, 1), int)
    factor, before, after = fit_sharpness(Guesses((sharp / 2).astype(np.float32), token, none - 1, none))
    assert factor == pytest.approx(2.0, rel=0.1)
    assert before < after
    claimed = np.exp(log_softmax(sharp))
    right = np.arange(8) == token[:, None]
    cells = reliability(claimed.ravel(), right.ravel(), [0.0, 0.5, 1.0])
    for cell in cells:
        said, was = cell.split(": ")[1].split(" -> ")
        assert float(said) == pytest.approx(float(was), abs=0.02)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--children", "0"], "--children must be at least 1, not 0"),
        (["--prompts", "0"], "held-out prompts must be at least 1, not 0"),
        (["--prompts", "nowhere"], "nowhere: No such file"),
    ],
)
def test_bad_input_is_one_clear_line(given, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fit_calibration.py", *given])
    monkeypatch.setattr("pipedec_jax.use_cpu_devices", lambda _: None)
    with pytest.raises(SystemExit) as stopped:
        fit_calibration.main()
    shown = capsys.readouterr()
    assert (stopped.value.code, shown.out, shown.err.count("\n")) == (2, "", 1)
    assert message in shown.err
