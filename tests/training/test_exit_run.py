"""Runs that train exit heads: what they store, resume, measure and refuse, and the script."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints_convert import convert
from pipedec_jax.exit_store import load_exit_head, stored_exit_heads
from pipedec_jax.loading import demo_directory, load
from pipedec_jax.model.exit_head import ExitHeadConfig, head_shapes
from pipedec_jax.model.parameters import flatten
from pipedec_jax.training import exit_run
from pipedec_jax.training.evaluate import EvaluationConfig
from pipedec_jax.training.exit_run import ExitRun, measure_stored, worse_than_untrained
from pipedec_jax.training.exits import ExitPlan
from pipedec_jax.training.family import read_portions
from pipedec_jax.training.generate import best_of
from pipedec_jax.training.teacher import Portion
from tests.conftest import copy_target
from tests.listed_library import needs_listed_library


@pytest.fixture
def texts(tmp_path):
    """A few source files as data."""
    names = []
    for number in range(3):
        path = tmp_path / f"{number}.py"
        path.write_text(f"def f{number}(x):\n    return x + {number}\n\n\n" * 40)
        names.append(str(path))
    return names


SETTINGS = EvaluationConfig(prompts=4, prompt=8, new=8, batch=4)


def make_run(target, texts, tmp_path, **values):
    arguments = {"settings": SETTINGS, "directory": tmp_path / "run"} | values
    plan = arguments.pop("plan", ExitPlan.simple([2], ["norm-linear"], steps=2, batch=2, length=16))
    return ExitRun(target, plan, arguments.pop("data", texts), arguments.pop("held_out", ()), **arguments)


def test_a_run_trains_measures_and_stores_heads_beside_the_target(tmp_path, family, texts):
    family = dict(family)
    plan = ExitPlan.simple([1, 3], ["norm-linear"], width=8, steps=2, batch=2, length=16)
    family["target"] = shutil.copytree(family["target"], tmp_path / "target")
    run = make_run(family["target"], texts, tmp_path, plan=plan)
    lines = []
    heads = run.train(lines.append, every=1)
    agreement = run.measure(heads)
    assert set(agreement) == {head.name for head in plan.heads} | {"1-target", "3-target"}
    assert [line["agreement"] for line in lines if "agreement" in line]
    assert run.replaced == []
    folders = run.save(heads, agreement)
    assert run.replaced == folders
    target = load(family["target"])
    assert {head.name for head in stored_exit_heads(target)} >= {head.name for head in plan.heads}
    loaded = load_exit_head(target, 3, "norm-linear-8")
    assert loaded.agreement == agreement["3-norm-linear-8"]
    for path, value in flatten(loaded.params):  # The family is stored in float32, and so are its heads.
        found, padding = (value[:, :400], value[:, 400:]) if path == "head" else (value, np.zeros(0))
        np.testing.assert_array_equal(found, dict(flatten(heads["3-norm-linear-8"]))[path])
        assert not padding.any()
    assert loaded.params["head"].shape == (8, 416)


def test_heads_of_an_int8_target_learn_from_its_scaled_matrices(tmp_path, family, texts):
    int8 = convert(family["target"], tmp_path / "int8", int8=True)
    run = make_run(int8, texts, tmp_path)
    assert run.target.source.read("layers/1/query").dtype != np.float32
    rounded = load(family["target"]).source.read("layers/1/query")
    np.testing.assert_allclose(run.own["layers"]["1"]["query"], rounded, atol=0.01)
    assert not run.geometry.int8
    head = ExitHeadConfig(2, "block")  # plain itself
    assert head_shapes(head, run.target.config) == head_shapes(head, load(family["target"]).config)


def test_padding_rows_are_neither_written_nor_counted(tmp_path, family, texts):
    """The family's tokenizer has 400 tokens, the target 416 rows: here the padding has by far the largest logits."""
    directory = Path(shutil.copytree(family["target"], tmp_path / "target"))
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"][400:] *= 20
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    run = make_run(directory, texts, tmp_path, portions=[Portion(4, 4, 8, 8, 0.5)])
    run.train()
    with np.load(tmp_path / "run" / "records" / "00-16.npz") as record:
        assert record["token"].max() < 400
        assert record["choice"].max() < 400
    assert run._texts(SETTINGS).max() < 400


def test_a_target_without_a_begin_token_is_trained_for_as_well(tmp_path, family, texts):
    directory = Path(shutil.copytree(family["target"], tmp_path / "target"))
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    run = make_run(directory, texts, tmp_path)
    assert run.data.begin is None
    stream = np.concatenate([[*run.target.tokenizer.encode(Path(text).read_text()), 1] for text in texts[:-1]])
    for row in run.data.batches(0, 4, 16)["token"]:
        assert any((stream[at : at + 16] == row).all() for at in range(len(stream)))
    held_out = run.target.tokenizer.encode(Path(texts[-1]).read_text())
    for row in run._texts(SETTINGS)[:, : SETTINGS.prompt]:
        assert any((held_out[at : at + len(row)] == row).all() for at in range(len(held_out)))


def test_only_what_some_step_reads_is_written(tmp_path, family, texts):
    portions = [Portion(4, 4, 8, 8), Portion(4, 4, 200, 100), Portion(4, 4, 12, 4)]
    make_run(family["target"], texts, tmp_path, portions=portions).train()
    assert sorted(path.name for path in (tmp_path / "run" / "records").iterdir()) == ["00-16.npz", "02-16.npz"]


def test_recorded_choices_hold_the_tokens_of_large_vocabularies():
    logits = jnp.zeros((1, 70_000)).at[0, jnp.array([69_000, 3])].set(jnp.array([2.0, 1.0]))
    choice, _ = best_of(logits, 2)
    assert choice.tolist() == [[69_000, 3]]
    assert best_of(logits[:, : 2**16], 1)[0].dtype == jnp.uint16


def test_a_run_learns_from_text_that_the_target_wrote(tmp_path, family, texts):
    run = make_run(family["target"], texts, tmp_path, portions=[Portion(4, 4, 8, 8, 0.5)])
    lines = []
    run.train(lines.append)
    assert (tmp_path / "run" / "records" / "00-16.npz").is_file()
    records = str(tmp_path / "run" / "records")
    again = make_run(family["target"], texts, tmp_path, data=[records], held_out=texts, directory=tmp_path / "other")
    found = []
    again.train(found.append)
    assert found[-1]["2-norm-linear"] == lines[-1]["2-norm-linear"]
    with np.load(tmp_path / "run" / "records" / "00-16.npz") as record:
        arrays = {name: record[name] for name in record.files}
    arrays["choice"][0, 3, 2] = 400
    np.savez(tmp_path / "run" / "records" / "00-16.npz", **arrays)
    with pytest.raises(ValueError, match="holds token 400, and the target's tokenizer has 400 tokens"):
        make_run(family["target"], texts, tmp_path, data=[records], held_out=texts)


def test_heads_that_agree_less_than_the_untrained_one_are_found():
    shares = {
        "2-block-8": 0.5,
        "2-norm-linear": 0.4,
        "2-target": 0.4,
        "3-block-8": 0.6,
        "3-target": 0.7,
        "4-block": 0.1,
    }
    assert worse_than_untrained({name: {"1": share} for name, share in shares.items()}) == ["3-block-8"]


def test_a_folder_of_another_run_is_refused(tmp_path, family, texts):
    make_run(family["target"], texts, tmp_path).train()
    other = ExitPlan.simple([3], ["norm-linear"], steps=2, batch=2, length=16)
    with pytest.raises(ValueError, match="another plan; name another folder"):
        make_run(family["target"], texts, tmp_path, plan=other)
    with pytest.raises(ValueError, match="another data"):
        make_run(family["target"], texts, tmp_path, data=texts[:2])
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json is damaged .* name another folder \(--run\)"):
        make_run(family["target"], texts, tmp_path)


def test_a_run_does_not_go_on_with_other_weights_or_other_portions(tmp_path, family, texts):
    target = copy_target(family, tmp_path)
    portions = [Portion(4, 4, 8, 8)]
    make_run(target, texts, tmp_path, portions=portions)._begin()
    make_run(target, texts, tmp_path, portions=portions)._begin()
    with pytest.raises(ValueError, match="another portions; name another folder"):
        make_run(target, texts, tmp_path)
    tensors = load_file(target / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    again = make_run(target, texts, tmp_path, portions=portions)
    with pytest.raises(ValueError, match="holds a run for other weights"):
        again.train()


def test_agreement_is_reported_after_so_many_steps_each(tmp_path, family, texts, monkeypatch):
    run = make_run(family["target"], texts, tmp_path)
    monkeypatch.setattr(exit_run, "train_exit_heads", lambda *arguments: arguments[-1])
    monkeypatch.setattr(run, "_texts", lambda _: np.zeros((1, 1)))
    monkeypatch.setattr(run, "_agreement", lambda heads, _: heads)
    report: Any = run.train(every=3)
    assert [done for done in range(1, 10) if report(done, {}) == {"agreement": {}}] == [3, 6, 9]
    report = run.train()
    assert [report(done, {}) for done in (3, 6)] == [{}, {}]


def test_heads_are_measured_as_they_will_be_stored(tmp_path, family, texts, monkeypatch):
    run = make_run(family["target"], texts, tmp_path, store_dtype="bfloat16")
    monkeypatch.setattr(run, "_texts", lambda _: np.zeros((1, 1)))
    monkeypatch.setattr(run, "_agreement", lambda heads, *_, **__: heads)
    (found,) = jax.tree.leaves(run.measure({"2-norm-linear": {"final_norm": jnp.full(3, 1 + 2**-9)}}))
    assert (found.dtype, found.tolist()) == (np.float32, [1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"plan": ExitPlan.simple([4], length=16)}, "exit layer 4 lies not inside the target's 4 layers"),
        ({"plan": ExitPlan.simple([2], length=129)}, "length 129 exceeds the target's context of 128"),
        ({"portions": [Portion(4, 4, 8, 4)]}, r"0 sequences of length 16, .* it writes lengths \[12\]"),
        ({"settings": EvaluationConfig(prompt=100, new=100)}, "100 after it, more than the target's context of 128"),
        ({"settings": EvaluationConfig(prompt=125, new=3), "held_out": ["{short}"]}, "no held-out file has more than"),
        ({"data": ["{folder}"]}, "a folder without records"),
        ({"data": ["absent.py"]}, "absent.py is no file"),
        ({"data": ["@absent.txt"]}, "absent.txt is no file"),
        ({"store_dtype": "int8"}, "int8"),
    ],
)
def test_bad_input_is_refused_before_weights_are_read(tmp_path, family, texts, monkeypatch, values, message):
    monkeypatch.setattr("pipedec_jax.loading.Model.source", property(lambda _: pytest.fail("weights were read")))
    (tmp_path / "short.py").write_text("short")
    places = {"{short}": str(tmp_path / "short.py"), "{folder}": str(tmp_path)}
    values = values | {
        name: [places.get(one, one) for one in values[name]] for name in ("data", "held_out") if name in values
    }
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_run(family["target"], texts, tmp_path, **values)


def test_one_file_alone_leaves_nothing_to_measure_on(tmp_path, family, texts):
    with pytest.raises(ValueError, match="held-out files"):
        make_run(family["target"], texts, tmp_path, data=texts[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan", "{plan}"], "plan.json: unknown key 'head' in plan of exit heads; did you mean 'heads'?"),
        (["--exit-layer", "2", "--run", "{plan}"], "--run {plan}/run cannot be written: Not a directory"),
        (["--exit-layer", "2", "--log", "{plan}/log"], "--log {plan}/log cannot be written: Not a directory"),
        (["--exit-layer", "2", "--every", "-1"], "--every must be at least 0, not -1"),
        (["--exit-layer", "2", "--save-seconds", "nan"], "--save-seconds must be at least 0, not nan"),
    ],
)
def test_the_script_refuses_before_it_computes(tmp_path, family, texts, monkeypatch, capsys, options, message):
    plan = tmp_path / "plan.json"
    plan.write_text('{"head": []}')
    options = [option.replace("{plan}", str(plan)) for option in options]
    monkeypatch.setattr("pipedec_jax.training.prefer_fast_products", lambda: None)
    monkeypatch.setattr("pipedec_jax.loading.Model.source", property(lambda _: pytest.fail("weights were read")))
    given = ["--target", str(family["target"]), "--data", *texts, "--length", "16", *options]
    if "--plan" in options:
        given = [option for option in given if option not in ("--length", "16")]
    monkeypatch.setattr(sys, "argv", ["train_exit_head.py", *given])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "train_exit_head.py"), run_name="__main__")
    assert ended.value.code == 2
    assert message.replace("{plan}", str(plan)) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "must hold a list of portions"),
        ("[]", "must hold a list of portions"),
        ("[", "is no JSON file"),
        ('[{"sequences": 0, "batch": 1, "prompt": 8}]', "sequences of a portion must be a whole number of at least 1"),
        ('[{"sequences": 4, "batch": 1, "prompt": 8, "greedy": 2}]', "greedy of a portion must lie between 0 and 1"),
    ],
)
def test_records_that_cannot_be_are_refused(tmp_path, text, message):
    (tmp_path / "records.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_portions(tmp_path / "records.json")


def test_a_killed_script_leaves_a_run_that_ends_with_the_same_heads(tmp_path, family, texts):
    """Killed as soon as it has a second checkpoint; whole and resumed runs are made here, from the same options."""
    plan = ExitPlan.simple([1, 3], ["norm-linear"], steps=12, batch=2, length=16)
    whole, killed = (shutil.copytree(family["target"], tmp_path / name) for name in ("whole", "killed"))
    root = Path(__file__).parents[2]
    script = str(root / "scripts" / "train_exit_head.py")
    arguments = [
        "--target", str(killed), "--exit-layer", "1", "3", "--data", *texts, "--steps", "12", "--batch", "2",
        "--length", "16", "--every", "0", "--run", str(tmp_path / "killed-run"), "--save-seconds", "0",
    ]  # fmt: skip
    # The script chooses how products are computed, which this process cannot any more.
    program = (
        "import runpy, sys, pipedec_jax.training\n"
        "pipedec_jax.training.prefer_fast_products = lambda: None\n"
        f"sys.argv = {[script, *arguments]!r}\n"
        f"runpy.run_path({script!r}, run_name='__main__')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = tmp_path / "killed-run" / "checkpoints"
    while process.poll() is None and len(list(checkpoints.glob("[0-9]*"))) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert not (killed / "exits").exists()
    resumed = make_run(killed, texts, tmp_path, plan=plan, directory=tmp_path / "killed-run").train()
    undisturbed = make_run(whole, texts, tmp_path, plan=plan, directory=tmp_path / "whole-run").train()
    jax.tree.map(np.testing.assert_array_equal, undisturbed, resumed)


@needs_listed_library
def test_shipped_heads_agree_with_the_target_as_recorded():
    """On the first tokens after an eighth of the prompts that the record was measured on."""
    from pipedec_jax.exit_store import load_exit_head, stored_exit_heads

    target = load(demo_directory("target"))
    stored = stored_exit_heads(target)
    assert {head.exit_layer for head in stored} == {2, 4, 8}
    files = [f"@{demo_directory('target').parent / 'heldout_files.txt'}"]
    found = measure_stored(target, stored, files, EvaluationConfig(prompts=8, new=64, batch=8))
    for head in stored:
        recorded = load_exit_head(target, head.exit_layer, head.kind).agreement
        for top, share in recorded.items():
            assert found[head.name][top] == pytest.approx(share, abs=0.08)
