"""The command line: figures and text of one run, what it imports, and an error for every bad input."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipedec_jax.decoding import decoder
from pipedec_jax.decoding.result import FIGURES
from pipedec_jax.model.exit_head import ExitHeadConfig
from pipedec_jax.pipeline import engine
from pipedec_jax.soundness import NotFiniteError
from tests.conftest import copy_target, store_head, write_byte_level

SCRIPT = Path(__file__).parents[1] / "scripts" / "generate.py"
SIZES = ["--stages", "2", "--width", "4", "--children", "2", "--max-new-tokens", "20"]
OPTIONS = {
    *(
        "prompt",
        "prompt_file",
        "prompts",
        "out",
        "chat",
        "target",
        "draft",
        "method",
        "stages",
        "tensor_parallel",
        "width",
        "children",
        "max_new_tokens",
    ),
    *("temperature", "top_k", "top_p", "seed", "stop", "dtype", "memory", "json"),
    *("calibration", "drafter", "draft_steps", "depth", "pool", "sharpness", "noise", "int8"),
    *("exit_layer", "exit_head", "exit_stages", "draft_length", "models", "passes", "form"),
    *("coordinator", "num_processes", "process_id", "hosts", "patience", "start_patience"),
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("generate_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def models(family):
    return ["--target", str(family["target"]), "--draft", str(family["draft"])]


@pytest.fixture
def no_engine(monkeypatch):
    """Fail if weights are read."""

    def read(*_, **__):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(decoder, "Engine", read)


def test_json_figures_in_a_process_without_torch_and_model_classes(models, tmp_path):
    (tmp_path / "prompt.txt").write_text("def f(x):\n", encoding="utf-8")
    arguments = [*models, *SIZES, "--prompt-file", str(tmp_path / "prompt.txt"), "--memory", "--json"]
    program = (
        "import runpy, sys\n"
        f"sys.argv = {[str(SCRIPT), *arguments]!r}\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "assert 'torch' not in sys.modules\n"
        "assert not [n for n in sys.modules if n.startswith('transformers.') and '.modeling_' in n]\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert set(found) == OPTIONS | set(FIGURES) | {"bytes_per_device", "layers_by_stage", "chosen"}
    assert (found["method"], found["stages"], found["dtype"]) == ("best-first", 2, "float32")
    assert found["prompt"] == "def f(x):\n"
    assert found["new_tokens"] == len(found["token_ids"]) <= 20
    assert found["hits"] + found["misses"] == found["new_tokens"] - 1
    assert found["ticks_per_token"] == found["ticks"] / found["new_tokens"]
    assert found["modeled_speedup_vs_pp"] > 0
    assert len(found["bytes_per_device"]) == 3


def test_text_is_streamed_after_the_prompt_and_before_the_table(script, models, capsys):
    options = [*models, *SIZES, "--prompt", "for x in", "--temperature", "0.7", "--seed", "5"]
    script.main([*options, "--json"])
    answer = json.loads(capsys.readouterr().out)
    script.main([*options, "--memory"])
    shown = capsys.readouterr().out
    assert shown.startswith("for x in" + answer["text"] + "\n\nbest-first, 2 stages, 3 devices, float32\n")
    table = shown.removeprefix("for x in" + answer["text"])
    for word in (
        "counted",
        "modeled",
        "measured",
        str(answer["ticks"]),
        f"{answer['ticks_per_token']:.2f}",
        "bytes per",
    ):
        assert word in table


def test_pp_needs_no_draft_and_stops_at_a_string(script, family, capsys):
    options = ["--target", str(family["target"]), "--method", "pp", "--stages", "2", "--max-new-tokens", "20"]
    script.main([*options, "--chat", "--prompt", "Hi", "--json"])
    whole = json.loads(capsys.readouterr().out)
    assert (whole["hits"], whole["misses"], whole["modeled_speedup_vs_pp"]) == (None, None, 1.0)
    assert whole["draft"] is None
    assert whole["prompt_tokens"] > 2, "the chat template"
    stop = whole["text"][3:5]
    script.main([*options, "--chat", "--prompt", "Hi", "--json", "--stop", "never there", "--stop", stop])
    cut = json.loads(capsys.readouterr().out)
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    script.main([*options, "--chat", "--prompt", "Hi"])
    shown = capsys.readouterr().out
    assert shown.startswith(whole["text"] + "\n\npp, 2 stages, 2 devices")
    assert "hits" not in shown


BAD = {
    "an empty prompt": (["--prompt", ""], "the prompt is empty"),
    "two prompts": (["--prompt", "a", "--prompt-file", "b"], "not allowed with argument --prompt"),
    "prompts without out": (["--prompts", "/nowhere"], "--prompts FILE and --out FILE need each other"),
    "out without prompts": (["--out", "/nowhere"], "--prompts FILE and --out FILE need each other"),
    "no prompts": (["--prompts", "/nowhere/prompts", "--out", "/nowhere/out"], "No such file"),
    "no prompt file": (["--prompt-file", "/nowhere/prompt.txt"], "No such file"),
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
    "a coordinator without a port": (
        ["--coordinator", "localhost", "--num-processes", "2", "--process-id", "0"],
        "--coordinator must be HOST:PORT, not 'localhost'",
    ),
    "no patience": (["--patience", "0"], "--patience must be a number of seconds of at least 1, not 0.0"),
    "no checkpoint": (["--target", "/nowhere"], "/nowhere does not exist"),
    "no draft checkpoint": (["--draft", "/nowhere"], "/nowhere does not exist"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_on_standard_error(script, models, no_engine, capsys, arguments, message):
    expect_error(script, capsys, [*models, *SIZES, *arguments], message)


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


def test_an_exit_is_named_with_the_longest_stage(script, models, family, capsys):
    options = [*models[:2], "--stages", "2", "--max-new-tokens", "20", "--prompt", "for x in"]
    options += ["--method", "ppsd", "--exit-layer", "1", "--exit-head", "target"]
    script.main([*options, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["width"], found["children"], found["drafter"], found["draft"]) == (1, 1, "model", None)
    assert (found["exit_head"], found["exit_stages"], found["layers_by_stage"]) == ("1-target", 1, [1, 3])
    assert found["ticks"] == 2 + found["hits"] + 2 * found["misses"]
    script.main(options)
    shown = capsys.readouterr().out
    assert "exit head 1-target after stage 1 of 1 + 3 layers\n" in shown
    assert "a tick lasts as long as the longest stage, which is stage 2: 3.00 layers' work; the head with its" in shown


def test_an_exit_that_is_left_open_is_chosen_of_the_stored_heads_and_said(script, family, tmp_path, capsys):
    directory = copy_target(family, tmp_path)
    for layer, agreement in ((1, 0.2), (2, 0.9)):
        store_head(directory, ExitHeadConfig(layer, "norm-linear", width=8), {"1": agreement})
    options = ["--target", str(directory), "--stages", "2", "--max-new-tokens", "20", "--prompt", "for x in"]
    script.main([*options, "--method", "pp", "--json"])
    plain = json.loads(capsys.readouterr().out)
    script.main([*options, "--method", "ppsd", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["exit_layer"], found["exit_head"]) == (2, "2-norm-linear-8")
    assert found["token_ids"] == plain["token_ids"]
    assert plain["chosen"] == []
    script.main([*options, "--method", "ppsd"])
    shown = capsys.readouterr().out
    for line in (*found["chosen"], "exit head 2-norm-linear-8 after stage 1 of 2 + 2 layers"):
        assert f"\n  {line}\n" in shown
    script.main([*options, "--method", "ppsd", "--exit-layer", "2"])
    assert "chosen" not in capsys.readouterr().out


def test_a_hierarchy_gives_the_text_of_plain_decoding(script, family, capsys):
    options = ["--max-new-tokens", "20", "--prompt", "x = 1", "--json"]
    script.main([*options, "--method", "pp", "--stages", "1", "--target", str(family["target"])])
    plain = json.loads(capsys.readouterr().out)
    draft, target = str(family["draft"]), str(family["target"])
    # In the middle the target's own weights, on two stages.
    three = ["--models", draft, target, target, "--passes", "3", "1", "--stages", "1", "2", "1"]
    two = ["--models", draft, target, "--passes", "2", "--stages", "1"]
    for method, given, stages in (("pipespec", three, [1, 2, 1]), ("speculative", two, [1, 1])):
        script.main([*options, *given, "--method", method, "--memory"])
        found = json.loads(capsys.readouterr().out)
        assert found["token_ids"] == plain["token_ids"]
        assert (found["method"], found["stages"], found["stages_by_model"]) == (method, 1, stages)
        assert found["ticks"] <= 20
        assert len(found["bytes_per_device"]) == sum(stages)


@pytest.fixture
def interrupted(monkeypatch):
    """Interrupts the engine at one of its runs."""

    def at(number):
        run, runs = engine.Engine.run, []

        def counted(self, new_tokens):
            runs.append(new_tokens)
            if len(runs) == number:
                raise KeyboardInterrupt
            return run(self, new_tokens)

        monkeypatch.setattr(engine.Engine, "run", counted)

    return at


@pytest.mark.parametrize("number", [1, 2])
def test_an_interrupted_answer_is_given_as_far_as_it_was_committed(script, models, capsys, interrupted, number):
    options = [*models, *SIZES, "--prompt", "for x in"]
    script.main([*options, "--json"])
    whole = json.loads(capsys.readouterr().out)
    interrupted(number)
    expect_interrupt(script, [*options, "--json"])
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert shown.err.endswith("\ninterrupted\n")
    assert found["finish_reason"] == "interrupted"
    assert found["new_tokens"] == len(found["token_ids"]) == (0 if number == 1 else 1)
    assert found["token_ids"] == whole["token_ids"][: found["new_tokens"]]
    assert whole["text"].startswith(found["text"].rstrip("\ufffd"))
    assert found["prompt"] == "for x in"


def test_an_interrupted_text_ends_with_its_table(script, models, capsys, interrupted):
    options = [*models, *SIZES, "--prompt", "for x in"]
    script.main([*options, "--json"])
    whole = json.loads(capsys.readouterr().out)
    interrupted(4)
    expect_interrupt(script, options)
    shown = capsys.readouterr().out
    text, table = shown.removeprefix("for x in").split("\n\nbest-first, 2 stages")
    assert text.rstrip("\ufffd")
    assert whole["text"].startswith(text.rstrip("\ufffd"))
    assert "ended by interrupted" in table


def expect_interrupt(script, arguments):
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert stopped.value.code == 130


def test_nan_is_an_error_after_what_was_committed(script, models, capsys, monkeypatch):
    options = [*models, *SIZES, "--prompt", "for x in"]
    script.main([*options, "--json"])
    whole = json.loads(capsys.readouterr().out)
    run = engine.Engine.run

    def unsound(self, new_tokens):
        progress = run(self, new_tokens)
        if len(progress.tokens) > 1:
            raise NotFiniteError(2, 2, (3, 4), 9, progress)
        return progress

    monkeypatch.setattr(engine.Engine, "run", unsound)
    with pytest.raises(SystemExit) as stopped:
        script.main([*options, "--json"])
    shown = capsys.readouterr()
    assert stopped.value.code == 2
    assert "error: the output of the target's stage 2 of 2 (layers 3 to 4) is not finite" in shown.err
    found = json.loads(shown.out)
    assert found["finish_reason"] == "interrupted"
    assert 1 < found["new_tokens"] <= len(whole["token_ids"])
    assert found["token_ids"] == whole["token_ids"][: found["new_tokens"]]


def test_prompts_of_a_file_go_on_with_the_same_settings_alone(script, models, capsys, tmp_path):
    (tmp_path / "prompts").write_text('"for x in"\n{"prompt": ""}\n', encoding="utf-8")
    options = [*models, *SIZES, "--prompts", str(tmp_path / "prompts"), "--out", str(tmp_path / "out")]
    script.main(options)
    assert capsys.readouterr().out.startswith("2 prompts: 0 finished before, 1 answered, 1 bad; ")
    (tmp_path / "prompts").write_text('"for x in"\n{"prompt": ""}\n"x = 1"', encoding="utf-8")
    script.main([*options, "--json"])
    assert json.loads(capsys.readouterr().out)["found"] == 2
    header, *answers = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert header["settings"]["dtype"] == "float32"
    assert [answer["line"] for answer in answers] == [1, 2, 3]
    script.main([*models, *SIZES, "--prompt", "x = 1", "--json"])
    assert json.loads(capsys.readouterr().out)["token_ids"] == answers[2]["token_ids"]
    message = "was begun with temperature 0.0 and not 1.0: give the same settings, or another --out"
    expect_error(script, capsys, [*options, "--temperature", "1"], message)


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
    expect_error(script, capsys, models[:2], "needs --draft DIR")


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "must hold one JSON object"),
        ('{"layer": 1}', "calibration lacks 'head'"),
        ('{"layer": "x", "head": 1, "draft": 1}', "cost layer must be a finite number"),
    ],
)
def test_a_calibration_that_is_none_is_an_error(script, models, no_engine, capsys, tmp_path, text, message):
    (tmp_path / "times.json").write_text(text, encoding="utf-8")
    expect_error(script, capsys, [*models, *SIZES, "--calibration", str(tmp_path / "times.json")], message)


def test_modeled_time_follows_a_calibration(script, models, capsys, tmp_path):
    times = {"layer": {"1": 1.0, "64": 3.0}, "head": 1.0, "draft": 0.5}
    (tmp_path / "times.json").write_text(json.dumps(times), encoding="utf-8")
    calibration = ["--calibration", str(tmp_path / "times.json"), "--draft-steps", "1"]
    script.main([*models, *SIZES, "--prompt", "x = 1", *calibration, "--json"])
    found = json.loads(capsys.readouterr().out)
    layers, cost, ticks = 4, found["modeled_cost"], found["ticks"]
    # Two layers a stage at 1, or 3 for more rows; the head over three ranks; PP: all layers at 1, its head over two.
    assert ticks * 2 < cost < ticks * (6 + 1 / 3)
    assert found["modeled_speedup_vs_pp"] == pytest.approx((layers + 1 / 2) * found["new_tokens"] / cost)


def test_weights_that_cannot_be_read_are_an_error(script, models, family, capsys, tmp_path):
    shutil.copytree(family["target"], tmp_path / "target")
    weights = tmp_path / "target" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    expect_error(script, capsys, [*models, *SIZES, "--target", str(tmp_path / "target")], "model.safetensors")


def test_every_option_is_in_the_help(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in shown for name in OPTIONS)


def expect_error(script, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    shown = capsys.readouterr()
    assert stopped.value.code == 2
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err
