"""One run of the command line: its figures and text, what it imports, interrupts, and files of prompts."""

import json
import os
import subprocess
import sys

import pytest

import pipedec_jax
from pipedec_jax.command_line import opening, printing, running
from pipedec_jax.command_line.options import parse
from pipedec_jax.command_line.printing import counted
from pipedec_jax.decoding.result import FIGURES
from pipedec_jax.hosts.group import Alone
from pipedec_jax.model.exit_head import ExitHeadConfig
from pipedec_jax.modeled.cost import head_bytes, layer_bytes
from pipedec_jax.pipeline import engine
from pipedec_jax.soundness import NotFiniteError
from tests.command_line.commands import OPTIONS, SCRIPT, SIZES, expect_error
from tests.conftest import copy_target, store_head


def test_json_figures_in_a_process_without_torch_and_model_classes(models, tmp_path):
    (tmp_path / "prompt.txt").write_text("def f(x):\n", encoding="utf-8")
    arguments = [*models, *SIZES, "--prompt-file", str(tmp_path / "prompt.txt"), "--memory", "--json"]
    program = (
        "import runpy, sys\n"
        f"sys.argv = {[str(SCRIPT), *arguments]!r}\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "assert 'torch' not in sys.modules\n"
        "assert not [n for n in sys.modules if n.startswith('transformers.') and '.modeling_' in n]\n"
        "print('looked', file=sys.stderr)\n"
    )
    on_cpu = os.environ | {"JAX_PLATFORMS": "cpu"}  # where an accelerator has too few devices, stderr says so
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, env=on_cpu)
    assert (done.returncode, done.stderr) == (0, "looked\n")
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


def test_stages_and_devices_are_named_as_many_as_they_are():
    assert [counted(number, "stage") for number in (1, 2)] == ["1 stage", "2 stages"]


def test_a_single_token_has_no_time_per_token_after_it(script, family, capsys):
    options = ["--target", str(family["target"]), "--method", "pp", "--stages", "2", "--prompt", "Hi"]
    script.main([*options, "--max-new-tokens", "1"])
    rows = capsys.readouterr().out.splitlines()
    assert any("first token" in row for row in rows)
    assert not any("per token" in row and "TPOT" in row for row in rows)


def test_values_that_were_used_are_given_also_where_a_method_ignores_what_it_was_told(models, family):
    """PP sends a row at a time; a hierarchy splits no stage."""
    alone = ["--target", str(family["target"]), "--stages", "2"]
    pair = ["--method", "pipespec", "--models", str(family["draft"]), str(family["target"]), "--passes", "2"]
    expected = [
        ([*models, *SIZES], {"width": 4, "children": 2, "drafter": "both", "tensor_parallel": 1}),
        ([*alone, "--method", "pp"], {"width": 1, "children": 0, "drafter": None, "tensor_parallel": 1}),
        (pair, {"tensor_parallel": 1}),
    ]
    for arguments, values in expected:
        options = parse(arguments)
        found = printing.described(options, opening.open_decoder(options), "x")
        assert {name: found[name] for name in values} == values


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
    assert "a tick lasts as long as the longest stage, stage 2: 3.00 layers' work (the head " in shown


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
    # Values that were used, and none of what another method uses.
    used = {name: [one[name] for one in (plain, found)] for name in ("sharpness", "noise", "draft_length", "depth")}
    assert used == {
        "sharpness": [None, 1.0],
        "noise": [None, "shared"],
        "draft_length": [None] * 2,
        "depth": [None] * 2,
    }
    assert found["tensor_parallel"] == 1
    script.main([*options, "--method", "ppsd"])
    shown = capsys.readouterr().out
    for line in (*found["chosen"], "exit head 2-norm-linear-8 after stage 1 of 2 + 2 layers"):
        assert f"\n  {line}\n" in shown
    script.main([*options, "--method", "ppsd", "--exit-layer", "2", "--memory"])
    shown = capsys.readouterr().out
    assert "chosen" not in shown
    assert "exit head's vocabulary " in shown
    assert "draft" not in shown


def test_a_hierarchy_gives_the_text_of_plain_decoding(script, family, capsys):
    options = ["--max-new-tokens", "20", "--prompt", "x = 1", "--json"]
    script.main([*options, "--method", "pp", "--stages", "1", "--target", str(family["target"])])
    plain = json.loads(capsys.readouterr().out)
    draft, target = str(family["draft"]), str(family["target"])
    # In the middle the target's own weights, on two stages.
    three = ["--models", draft, target, target, "--passes", "3", "1", "--stages", "1", "2", "1"]
    two = ["--models", draft, target, "--passes", "2", "--stages", "1"]
    small = pipedec_jax.load(draft).config
    token = plain["modeled_cost"] / plain["new_tokens"]  # PP's: all of the target's weights
    guess = small.layers * layer_bytes(small, 4) + head_bytes(small, 4)
    for method, given, stages, tick in (
        ("pipespec", three, [1, 2, 1], max(3 * guess, token)),  # all at once
        ("speculative", two, [1, 1], 3 * guess + token),  # one after the other, the lookahead and one more
    ):
        script.main([*options, *given, "--method", method, "--memory"])
        found = json.loads(capsys.readouterr().out)
        assert found["token_ids"] == plain["token_ids"]
        assert (found["method"], found["stages"], found["stages_by_model"]) == (method, 1, stages)
        assert found["ticks"] <= 20
        assert found["modeled_cost"] == pytest.approx(tick * found["ticks"], rel=1e-5)
        assert found["modeled_speedup_vs_pp"] == pytest.approx(20 * token / found["modeled_cost"], rel=1e-5)
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
    assert script.main(options) == 0
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


def test_a_file_of_bad_prompts_alone_ends_with_status_1(script, models, no_engine, capsys, tmp_path):
    (tmp_path / "prompts").write_text('7\n{"prompt": ""}\n', encoding="utf-8")
    job = [*models, *SIZES, "--prompts", str(tmp_path / "prompts"), "--out", str(tmp_path / "out")]
    for found, bad in ((0, 2), (2, 0)):
        assert script.main(job) == 1
        assert capsys.readouterr().out.startswith(f"2 prompts: {found} finished before, 0 answered, {bad} bad; ")


class Comparing(Alone):
    """One of three processes, that says what it would compare."""

    count = 3

    def __init__(self):
        self.facts = {}

    def check_same(self, name, facts):
        self.facts |= facts


def test_processes_compare_what_they_decode_and_not_where_it_lies(models, tmp_path):
    (tmp_path / "prompt").write_text("a", encoding="utf-8")
    found = []
    for place in (["--prompt", "a"], ["--prompt-file", str(tmp_path / "prompt"), "--process-id", "1"]):
        group = Comparing()
        running.open_with(parse([*models, *SIZES, *place]), group, {"prompt": "a"})
        found.append(group.facts)
    assert found[0] == found[1]
    assert found[0]["prompt"] == "a"
    assert found[0]["--num-processes"] == 3
    assert {"--seed", "--stages", "jax", "model 0 weights", "model 1 weights"} < set(found[0])
    assert not {"--target", "--draft", "--prompt", "--prompt-file", "--process-id"} & set(found[0])


def test_answers_do_not_go_where_the_last_words_go(script, capfd, monkeypatch, tmp_path):
    """They would stand in the place of the answers' first line."""
    (tmp_path / "prompts").write_text('"a"\n', encoding="utf-8")
    with (tmp_path / "out").open("w+", encoding="utf-8") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as ended:
            script.main(["--prompts", str(tmp_path / "prompts"), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "out is this command's own output, where its last words go: give another file" in capfd.readouterr().err


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
