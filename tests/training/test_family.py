import dataclasses
import json

import numpy as np
import pytest

from checkpoints_convert import open_any
from pipedec_jax.training import tokenizer as tokenizers
from pipedec_jax.training.evaluate import EvaluationConfig, held_out_windows, step_weights, table
from pipedec_jax.training.family import STAGES, Family, ModelPlan, read_portions, thin
from pipedec_jax.whole_files import write_whole
from tests.training.test_corpus import make_library

SIZES = {"heads": 2, "kv_heads": 1, "head_size": 8, "context": 64, "vocab_size": 300}
PLANS = {
    "target": {"width": 16, "feed_forward": 24, "layers": 2, "tied_embeddings": True},
    "middle": {"width": 16, "feed_forward": 24, "layers": 1, "tied_embeddings": True},
    "draft": {"width": 8, "feed_forward": 8, "layers": 1},
}


@pytest.fixture
def plans(tmp_path):
    read = {}
    for name, model in PLANS.items():
        phases = [{"steps": 3, "layers": model["layers"], "batch": 4, "length": 32, "rate": [1.0, 0.0]}]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"model": SIZES | model, "training": {"phases": phases, "warmup": 1}}))
        read[name] = ModelPlan.read(path)
    return read


@pytest.fixture
def portions(tmp_path):
    path = tmp_path / "records.json"
    written = {"sequences": 8, "batch": 8, "prompt": 16, "new": 16, "greedy": 0.5}
    path.write_text(json.dumps([written, {"sequences": 8, "batch": 4, "prompt": 32}]))
    return read_portions(path)


@pytest.mark.slow
def test_a_family_is_made_exported_and_measured(tmp_path, plans, portions):
    root = make_library(tmp_path / "lib")
    (root / "json" / "decoder.py").write_text("class Decoder:\n    pass\n\n\nvalue = [1, 2, 3]\n" * 40)
    family = Family(tmp_path / "run", plans, portions, root)
    for stage in STAGES[:-1]:
        family.run(stage)
    settings = EvaluationConfig(windows=4, window=16, prompts=4, prompt=8, new=8, samples=1, batch=2)
    report = family.evaluate(settings)
    assert set(report["models"]) == {"target", "middle", "draft"}
    shares = list(report["models"]["draft"]["agreement"].values())
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1
    assert "draft" in table(report)
    for name in PLANS:
        checkpoint = open_any(family.family / name)
        assert checkpoint.dtype == "bfloat16"
        assert checkpoint.config == plans[name].model
    again = Family(tmp_path / "run", plans, portions, root)
    for one, two in zip(
        (family.target["embedding"], family.student("draft")["head"]),
        (again.target["embedding"], again.student("draft")["head"]),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)


def test_a_thinned_model_keeps_the_first_and_the_last_layer():
    params = {"layers": {str(index): {"up": np.full(1, index)} for index in range(16)}}
    assert [int(layer["up"][0]) for layer in thin(params, 4)["layers"].values()] == [0, 5, 10, 15]


def test_step_weights_leave_the_embedding_out_unless_it_is_the_head(plans):
    tied, untied = plans["target"].model, plans["draft"].model
    layer = 8 * 16 + 2 * 8 * 8 + 16 * 8 + 3 * 8 * 8 + 2 * 8
    assert step_weights(untied) == layer + 8 + 8 * 300
    assert step_weights(tied) > 300 * 16


def test_held_out_windows_cut_each_document_from_its_start():
    token, target = held_out_windows([np.arange(20), np.arange(30, 37)], begin=0, length=6)
    np.testing.assert_array_equal(target[:, 0], [1, 7, 13, 31])
    assert (token[:, 0] == 0).all()
    np.testing.assert_array_equal(token[:, 1:], target[:, :-1])


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"model": {}, "training": {}, "optimizer": {}}', "optimizer"), ("# a plan", r"plan\.json is no JSON file")],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        ModelPlan.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequences": 3}, "a step of the middle takes 4 sequences of length 32, but of these the target records 3"),
        ({"new": 8}, r"but of these the target records 0; it records lengths \[24\]"),
        ({"new": 100}, "records of 116 tokens exceed the target's context of 64"),
    ],
)
def test_records_that_a_student_could_not_learn_from_are_refused_at_once(tmp_path, plans, portions, change, message):
    with pytest.raises(ValueError, match=message):
        Family(tmp_path / "run", plans, [dataclasses.replace(portions[0], **change)])
    assert not (tmp_path / "run").exists()


def test_a_student_of_another_vocabulary_is_refused(tmp_path, plans, portions):
    model = dataclasses.replace(plans["draft"].model, vocab_size=299)
    plans["draft"] = dataclasses.replace(plans["draft"], model=model)
    with pytest.raises(ValueError, match="vocab_size of the draft must be the target's 300, not 299"):
        Family(tmp_path / "run", plans, portions)


def test_a_run_goes_on_with_its_own_plans_alone(tmp_path, plans, portions):
    root = make_library(tmp_path / "lib")
    Family(tmp_path / "run", plans, portions, root).run("text")
    again = Family(tmp_path / "run", plans, portions, root)
    again.run("text")
    with pytest.raises(ValueError, match=r"run holds a run with another list of records; name another folder \(--run"):
        Family(tmp_path / "run", plans, [*portions, portions[0]], root)
    longer = plans | {"draft": plans["draft"].scaled(9)}
    with pytest.raises(ValueError, match="run holds a run with another plan of the draft; name another folder"):
        Family(tmp_path / "run", longer, portions, root)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_kill_while_the_tokenizer_is_written_is_made_good_by_the_next_run(
    tmp_path, plans, portions, monkeypatch, number, late
):
    """Before or after any of its three files: the stage is skipped only where all are there."""
    root = make_library(tmp_path / "lib")
    whole = Family(tmp_path / "whole", plans, portions, root)
    whole.text()
    files = {path.name: path.read_bytes() for path in (whole.family / "target").iterdir()}
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    written = []

    def killed(path, text):
        written.append(path)
        if len(written) < number or late:
            write_whole(path, text)
        if len(written) == number:
            raise KeyboardInterrupt

    again = Family(tmp_path / "again", plans, portions, root)
    monkeypatch.setattr(tokenizers, "write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        again.text()
    monkeypatch.undo()
    again.text()
    assert {path.name: path.read_bytes() for path in (again.family / "target").iterdir()} == files
    assert again.tokenizer.get_vocab_size() == whole.tokenizer.get_vocab_size()
