"""The command line: an error in one line for every bad input, and help for every option."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipedec_jax.command_line.options import parse, read_prompt
from tests.command_line.commands import OPTIONS, SIZES, expect_error
from tests.conftest import write_byte_level

BAD = {
    "an empty prompt": (["--prompt", ""], "the prompt is empty"),
    "two prompts": (["--prompt", "a", "--prompt-file", "b"], "not allowed with argument --prompt"),
    "prompts without out": (["--prompts", "/nowhere"], "--prompts FILE and --out FILE need each other"),
    "out without prompts": (["--out", "/nowhere"], "--prompts FILE and --out FILE need each other"),
    "no prompts": (["--prompts", "/nowhere/prompts", "--out", "/nowhere/out"], "No such file"),
    "no prompt file": (["--prompt-file", "/nowhere/prompt.txt"], "error: /nowhere/prompt.txt: No such file"),
    "a folder of prompts": (["--prompts", "/", "--out", "/nowhere/out"], "error: /: Is a directory"),
    "too long": (["--max-new-tokens", "128"], "exceed the target's context of 128 tokens"),
    "no new tokens": (["--max-new-tokens", "0"], "max_new_tokens must be a whole number of at least 1"),
    "no number": (["--stages", "many"], "argument --stages: invalid int value: 'many'"),
    "stages over layers": (["--stages", "5"], "stages (5) must not exceed the target's layers (4)"),
    "no stage": (["--stages", "0"], "stages must be"),
    "stages of two models": (
        ["--stages", "1", "2"],
        "--stages takes one number with --method best-first, not 1 2: one",
    ),
    "no width": (["--width", "0"], "width must be"),
    "children over tokens": (["--children", "1000"], "children (1000) must not exceed"),
    "another method": (["--method", "magic"], "ppsd, eesd, pipespec, speculative, not 'magic'"),
    "models of another method": (["--models", "/nowhere"], "--models is not for --method best-first, but for pipespec"),
    "a form of another method": (["--form", "free"], "--form is not for --method best-first, but for pipespec"),
    "a depth of another method": (["--depth", "3"], "--depth is not for --method best-first, but for stpp"),
    "no calibration": (["--calibration", "/nowhere.json"], "there is no calibration /nowhere.json"),
    "a target beside models": (["--method", "pipespec"], "--method pipespec takes --models, not --target and --draft"),
    "another drafter": (["--drafter", "oracle"], "drafter must be one of model, ngram, both"),
    "ngram with a draft": (["--drafter", "ngram"], "--drafter ngram takes no --draft"),
    "no draft step": (["--method", "best-first", "--draft-steps", "0"], "draft_steps must be"),
    "two draft steps of pipedec": (
        ["--method", "pipedec", "--draft-steps", "2"],
        "--draft-steps is not for --method pipedec, but for best-first",
    ),
    "draft steps of stpp": (
        ["--method", "stpp", "--draft-steps", "2"],
        "--draft-steps is not for --method stpp, but for",
    ),
    "a width of pp": (["--method", "pp", "--width", "3"], "--width is not for --method pp, but for stpp, pipedec"),
    "a pool of pipedec": (["--method", "pipedec", "--pool", "64"], "--pool is not for --method pipedec, but for best"),
    "noise of look-up": (["--drafter", "ngram", "--noise", "none"], "--noise is for guesses of a model"),
    "a tree too deep": (["--method", "stpp", "--depth", "200"], "depth must be at most 64, not 200"),
    "a tree too large": (["--width", "100000"], "the tree would need"),
    "a dtype by another name": (["--dtype", "float"], "dtype must be one of"),
    "no depth": (["--method", "stpp", "--depth", "0"], "depth must be"),
    "sharpness": (["--sharpness", "-1"], "sharpness must be"),
    "noise": (["--noise", "white"], "noise must be one of shared, independent, none"),
    "another dtype": (["--dtype", "int8"], "dtype must be one of"),
    "temperature": (["--temperature", "-1"], "temperature must be"),
    "temperature nan": (["--temperature", "nan"], "temperature must be"),
    "top-p": (["--top-p", "1.5"], "top_p must be"),
    "top-k": (["--top-k", "-5"], "top_k must be"),
    "seed": (["--seed", "-1"], "seed must be"),
    "an empty stop string": (["--stop", ""], "a stop string must be text and not empty"),
    "an unknown option": (["--speed", "9"], "unrecognized arguments: --speed 9"),
    "an exit and a draft": (["--exit-layer", "2"], "with an exit the target drafts for itself: leave --draft out"),
    "ppsd and a draft": (["--method", "ppsd"], "with an exit the target drafts for itself: leave --draft out"),
    "a coordinator alone": (["--coordinator", "localhost:1"], "--num-processes and --process-id must be given too"),
    "hosts and a coordinator": (["--hosts", "auto", "--process-id", "0"], "--hosts finds the processes by itself"),
    "a process too many": (
        ["--coordinator", "localhost:1", "--num-processes", "2", "--process-id", "2"],
        "--process-id must be 0 to 1 for --num-processes 2, not 2",
    ),
    "no process": (
        ["--coordinator", "localhost:1", "--num-processes", "0", "--process-id", "0"],
        "--num-processes must be at least 1, not 0",
    ),
    "a coordinator without a port": (
        ["--coordinator", "localhost", "--num-processes", "2", "--process-id", "0"],
        "--coordinator must be HOST:PORT, with a port from 1 to 65535, not 'localhost'",
    ),
    "no patience": (["--patience", "0"], "--patience must be 1 to 1,000,000 seconds, not 0.0"),
    "no checkpoint": (["--target", "/nowhere"], "/nowhere does not exist"),
    "no draft checkpoint": (["--draft", "/nowhere"], "/nowhere does not exist"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_on_standard_error(script, models, no_engine, capsys, arguments, message):
    expect_error(script, capsys, [*models, *SIZES, *arguments], message)


JOB_WIDE = ("no new tokens", "temperature", "temperature nan", "top-p", "top-k", "seed", "an empty stop string")


@pytest.mark.parametrize(("arguments", "message"), [BAD[name] for name in JOB_WIDE], ids=JOB_WIDE)
def test_settings_of_a_job_are_refused_before_a_model_is_read_and_the_answers_file_is_made(
    script, capsys, tmp_path, arguments, message
):
    (tmp_path / "prompts.jsonl").write_text('"x = 1"\n', encoding="utf-8")
    job = ["--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--target", "/nowhere"]
    expect_error(script, capsys, [*job, *arguments], message)
    assert not (tmp_path / "out.jsonl").exists()


def test_plain_pipeline_parallelism_takes_no_draft(script, models, no_engine, capsys):
    expect_error(script, capsys, [*models, "--method", "pp"], "--draft is not for --method pp, where nobody guesses")


EXITS = {
    "no exit layer": (["--method", "ppsd"], "method 'ppsd' drafts at an exit of the target: give exit_layer"),
    "all layers": (["--method", "ppsd", "--exit-layer", "4"], "exit layer 4 lies not inside the target's 4 layers"),
    "no layer": (["--method", "ppsd", "--exit-layer", "0"], "exit_layer"),
    "a named head and no layer": (["--method", "ppsd", "--exit-head", "target"], "fits every exit: give exit_layer"),
    "no head": (
        ["--method", "ppsd", "--exit-layer", "3"],
        "no exit head after layer 3 (stored: none)",
    ),
    "another head": (["--method", "eesd", "--exit-layer", "2", "--exit-head", "mlp"], "has no exit head 2-mlp"),
    "an exit of pp": (["--method", "pp", "--exit-layer", "2", "--exit-head", "target"], "method 'pp' has no exit"),
    "a tree of eesd": (
        ["--method", "eesd", "--exit-layer", "2", "--exit-head", "target", "--width", "4"],
        "eesd drafts a chain: width and children must be 1",
    ),
    "too many exit stages": (
        ["--method", "ppsd", "--exit-layer", "2", "--exit-head", "target", "--exit-stages", "2"],
        "exit_stages must be 1 to 1 for 2 stages and an exit after 2 of 4 layers, not 2",
    ),
    "a head without an exit": (["--exit-head", "target", "--drafter", "ngram"], "exit_head is for an exit: give exit"),
}


@pytest.mark.parametrize(("arguments", "message"), EXITS.values(), ids=EXITS.keys())
def test_a_bad_exit_is_one_line_on_standard_error(script, models, no_engine, capsys, arguments, message):
    expect_error(script, capsys, [*models[:2], "--stages", "2", *arguments], message)


def test_a_hierarchy_of_one_model_is_an_error(script, family, no_engine, capsys):
    options = ["--method", "pipespec", "--models", str(family["target"]), "--passes", "1"]
    expect_error(script, capsys, options, "needs at least two models")


def test_the_target_of_a_hierarchy_comes_last(script, family, no_engine, capsys):
    draft, target = str(family["draft"]), str(family["target"])
    options = ["--method", "pipespec", "--models", target, draft, "--passes", "1"]
    expect_error(script, capsys, options, f"the target last, but {draft} is smaller than {target}")


def test_stages_of_a_hierarchy_are_the_targets_or_one_for_each_model(script, family, no_engine, capsys):
    draft, target = str(family["draft"]), str(family["target"])
    options = ["--method", "pipespec", "--models", draft, target, "--passes", "1", "--stages"]
    message = (
        f"--stages takes the target's number alone or one for each of the 2 models ({draft}, {target}), not 3: 1 2 4"
    )
    expect_error(script, capsys, [*options, "1", "2", "4"], message)
    expect_error(script, capsys, [*options, "1", "0"], "stages must be a whole number of at least 1, not 0")
    expect_error(
        script, capsys, [*options, "9", "1"], "model 0 (counted from 0, the smallest): stages (9) must not exceed"
    )


def test_a_target_without_a_draft_is_an_error_for_pipedec(script, models, no_engine, capsys):
    expect_error(
        script, capsys, models[:2], "needs --draft DIR beside --target DIR, or --drafter ngram, or --exit-layer"
    )


def test_different_token_maps_are_an_error(script, models, family, no_engine, capsys, tmp_path):
    shutil.copytree(family["draft"], tmp_path, dirs_exist_ok=True)
    write_byte_level(tmp_path, extra=("<|extra|>",))
    expect_error(script, capsys, [*models, *SIZES, "--draft", str(tmp_path)], "must have the same tokens: '!'")


def test_a_chat_without_a_template_is_an_error(script, models, family, no_engine, capsys, tmp_path):
    shutil.copytree(family["target"], tmp_path, dirs_exist_ok=True)
    write_byte_level(tmp_path, chat=False)
    expect_error(script, capsys, [*models, *SIZES, "--target", str(tmp_path), "--chat"], "no chat template")


def test_a_prompt_file_that_is_no_text_is_an_error(script, models, no_engine, capsys, tmp_path):
    (tmp_path / "prompt").write_bytes(b"\xff\xfe\x00")
    expect_error(script, capsys, [*models, "--prompt-file", str(tmp_path / "prompt")], "is not UTF-8 text")


def test_a_mark_of_the_encoding_is_no_part_of_a_prompt_file(tmp_path):
    (tmp_path / "prompt").write_bytes(b"\xef\xbb\xbfdef f(x):\r\n")
    assert read_prompt(parse(["--prompt-file", str(tmp_path / "prompt")])) == "def f(x):\r\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("null", "must hold one JSON object of seconds, not null"),
        ("[1]", "must hold one JSON object"),
        ('{"layer": 1}', "calibration lacks 'head'"),
        ('{"layer": "x", "head": 1, "draft": 1}', "cost layer must be a finite number"),
    ],
)
def test_a_calibration_that_is_none_is_an_error(script, models, no_engine, capsys, tmp_path, text, message):
    (tmp_path / "times.json").write_text(text, encoding="utf-8")
    expect_error(script, capsys, [*models, *SIZES, "--calibration", str(tmp_path / "times.json")], message)


def test_weights_that_cannot_be_read_are_an_error(script, models, family, capsys, tmp_path):
    shutil.copytree(family["target"], tmp_path / "target")
    weights = tmp_path / "target" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    expect_error(script, capsys, [*models, *SIZES, "--target", str(tmp_path / "target")], "model.safetensors")


def test_pickled_weights_without_torch_are_an_error_in_one_line(script, models, family, capsys, tmp_path, monkeypatch):
    import torch

    shutil.copytree(family["target"], tmp_path / "target")
    (tmp_path / "target" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "target" / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    arguments = [*models, *SIZES, "--target", str(tmp_path / "target")]
    expect_error(script, capsys, arguments, "pip install 'pipedec_jax[torch]'")


@pytest.mark.parametrize(
    "command",
    [
        ["benchmark", "--prompts", "questions.txt", "--out", "out", "--draft", "target"],
        ["calibrate", "--draft", "target"],
        ["find_static_tree", "--stages", "2", "--draft", "target"],
        ["trace", "--out", "out", "--draft", "target"],
        ["train_exit_head", "--exit-layer", "2", "--data", "questions.txt"],
    ],
    ids=lambda command: command[0],
)
def test_other_commands_say_in_one_line_too_that_torch_is_missing(command, family, tmp_path):
    import torch

    shutil.copytree(family["target"], tmp_path / "target")
    (tmp_path / "target" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "target" / "pytorch_model.bin")
    (tmp_path / "questions.txt").write_text("def f(x):\n")
    file = str(Path("scripts", f"{command[0]}.py").resolve())
    paths = os.pathsep.join(map(os.path.abspath, (".", "scripts")))
    run = f"import runpy, sys; sys.modules['torch'] = None; runpy.run_path({file!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", run, *command[1:], "--target", "target"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "pip install 'pipedec_jax[torch]'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_every_option_is_in_the_help(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in shown for name in OPTIONS)
