"""scripts/benchmark.py: what it prints and writes, goes on with, and refuses."""

import json
import sys

import pytest

import benchmark as script
import pipedec_jax
from pipedec_jax.analysis import startup
from pipedec_jax.analysis.benchmark import Benchmark
from pipedec_jax.command_line import opening
from pipedec_jax.model.exit_head import ExitHeadConfig
from tests.analysis.asked import NAMES, QUESTIONS
from tests.conftest import copy_target, store_head


@pytest.fixture
def command(family, tmp_path, decoders, monkeypatch):
    """Arguments of the script, which takes the compiled decoders."""
    lines = [{"question_id": q.id, "category": q.category, "turns": q.turns} for q in QUESTIONS]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    by_method = {decoder.method: decoder for decoder in decoders.values()}
    monkeypatch.setattr(opening, "open_decoder", lambda used: by_method[used.method])
    options = ["--target", str(family["target"]), "--draft", str(family["draft"]), "--methods", "pp", "best-first"]
    options += ["--stages", "2", "--width", "4", "--max-new-tokens", "10", "--out", str(tmp_path / "out")]
    return ["--prompts", str(tmp_path / "question.jsonl"), *options]


def test_the_script_prints_tables_and_writes_a_summary_and_goes_on(command, family, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    script.main(command)
    shown = capsys.readouterr()
    assert "matplotlib is missing; pip install 'pipedec_jax[plots]'" in shown.err
    assert "question 82 (line 2) is left out" in shown.err
    assert "3 questions of question.jsonl (1 more are too long), 6 answers of at most 10 tokens" in shown.out
    assert "all 2 settings gave the same tokens in all 6 answers" in shown.out
    assert (tmp_path / "out" / "table.md").read_text() in shown.out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["name"] for row in summary["contenders"]] == list(NAMES)
    assert [row["models"] for row in summary["contenders"]] == [["target"], ["draft", "target"]]
    assert summary["models"] == {name: str(family[name]) for name in ("target", "draft")}
    assert summary["contenders"][0]["figures"]["ticks_per_token"]["median"] == 2
    assert list(summary["questions_left_out"]) == ["82"]
    assert list(summary["turns_left_out"]) == ["qa/1"]

    def no_answer(*_, **__):
        raise AssertionError("answered again")

    monkeypatch.setattr(pipedec_jax.Decoder, "generate", no_answer)
    script.main(command)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    capsys.readouterr()
    other = {NAMES[0]: {}, NAMES[1]: {81: "turn 1, new token 3"}}
    with monkeypatch.context() as patch:
        patch.setattr(Benchmark, "_check", lambda self, _question, name, _row: self.differing[name].update(other[name]))
        script.main(command)
    counted = "1 of 6 answers have other tokens than the first setting's (float32, where near ties are common): 1 of "
    assert counted + NAMES[1] in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert found["first_differences"] == {NAMES[0]: {}, NAMES[1]: {"81": "turn 1, new token 3"}}
    expect_error(capsys, [*command, "--seed", "1"], "holds a run with other settings (seed: 0 there, 1 now)")
    path = tmp_path / "out" / "figures" / "pp-2.jsonl"
    path.write_text(path.read_text().replace('"token_ids": [', '"token_ids": [7, '))
    expect_error(capsys, command, "tokens differ: question 81, turn 1, new token 0", status=1)
    assert not (tmp_path / "out" / "summary.json").exists()
    assert not (tmp_path / "out" / "table.md").exists()


def test_plain_decoding_is_one_more_setting_once(command):
    plain = script.contenders(script.parse([*command, "--plain"]))
    assert list(plain) == ["pp-2", "best-first-2x4", "pp-1"]
    assert (plain["pp-1"].method, plain["pp-1"].stages, plain["pp-1"].target) == ("pp", 1, plain["pp-2"].target)
    assert list(script.contenders(script.parse([*command, "--plain", "--stages", "1"]))) == ["pp-1", "best-first-1x4"]


def test_starts_of_processes_are_measured_once_cold_then_warm(command, tmp_path, capsys, monkeypatch):
    started = []

    def measured(options, prompt, new_tokens, cache):
        assert (prompt, new_tokens) == (QUESTIONS[0].turns[0], 10)
        started.append((options.get("method", "best-first"), any(cache.iterdir())))
        (cache / "compiled").touch()
        return 9.0 if len(started) % 3 == 1 else 3.0

    monkeypatch.setattr(startup, "measure_first_text", measured)
    script.main([*command, "--limit", "1", "--start-ups", "2"])
    assert started == [(method, warm) for method in ("pp", "best-first") for warm in (False, True, True)]
    figures = json.loads((tmp_path / "out" / "summary.json").read_text())["contenders"][0]["figures"]
    assert (figures["cold_s"]["median"], figures["warm_s"]["median"], figures["warm_s"]["count"]) == (9.0, 3.0, 2)
    assert "| 9.0 | 3.0 [3.0, 3.0] |" in capsys.readouterr().out
    script.main([*command, "--limit", "1"])
    assert len(started) == 6
    assert "| 9.0 | 3.0 [3.0, 3.0] |" in capsys.readouterr().out


def test_a_run_goes_on_with_the_exit_that_it_has_chosen(family, tmp_path, capsys, monkeypatch):
    directory = copy_target(family, tmp_path)
    store_head(directory, ExitHeadConfig(2, "norm-linear", width=8), {"1": 0.5})
    (tmp_path / "prompts.txt").write_text("def f(x):\n")
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--target", str(directory), "--methods", "pp", "ppsd"]
    options += ["--stages", "2", "--max-new-tokens", "6", "--out", str(tmp_path / "out")]
    script.main(options)
    said = "\nppsd-2: chosen: exit after layer 2, head 2-norm-linear-8, predicted quickest for 2 stages"
    assert said in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["contenders"][0]["chosen"] == []
    assert "2-norm-linear-8" in summary["contenders"][1]["chosen"][0]
    assert summary["contenders"][1]["models"] == ["2-norm-linear-8", "target"]
    # A head that is better came in between.
    store_head(directory, ExitHeadConfig(1, "norm-linear", width=8), {"1": 1.0})
    made = []
    opened = opening.open_decoder
    monkeypatch.setattr(opening, "open_decoder", lambda used: made.append(used) or opened(used))
    monkeypatch.setattr(pipedec_jax.Decoder, "generate", lambda *_, **__: pytest.fail("answered again"))
    for _ in range(2):
        script.main(options)
        assert (made[-1].exit_layer, made[-1].exit_head) == (2, "2-norm-linear-8")
        assert said in capsys.readouterr().out
        assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary


@pytest.mark.slow
def test_a_process_finds_what_the_one_before_compiled(family, tmp_path):
    options = {"method": "pp", "stages": 1, "target": str(family["target"])}
    assert all(startup.measure_first_text(options, "def f():", 4, tmp_path) > 0 for _ in range(2))
    assert any((tmp_path / "compiled").iterdir())


BAD = {
    "a file": (["--out", __file__], "--out must be a directory"),
    "starts": (["--start-ups", "-1"], "--start-ups must be at least 0, not -1"),
    "no file": (["--prompts", "/nowhere/question.jsonl"], "No such file"),
    "another method": (["--methods", "pp", "magic"], "ppsd, eesd, pipespec, speculative, not 'magic'"),
    "no limit": (["--limit", "0"], "limit must be at least 1"),
    "a temperature": (["--temperature", "-1"], "temperature must be"),
    "no draft": (
        ["--target", "a", "--draft", "", "--methods", "pipespec"],
        "pipespec needs --draft DIR beside --target",
    ),
    "selected models": (["--models", "auto", "a", "b"], "--models auto is for generate.py"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_on_standard_error(command, capsys, arguments, message):
    expect_error(capsys, [*command, *arguments], message)


def expect_error(capsys, arguments, message, status=2):
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    shown = capsys.readouterr()
    assert stopped.value.code == status
    assert shown.out == ""
    lines = [line for line in shown.err.splitlines() if not line.startswith("question ")]
    assert len(lines) == 1, shown.err
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_settings_take_the_options_of_their_methods():
    every = ["pp", "stpp", "pipedec", "best-first", "ppsd", "eesd", "pipespec", "speculative"]
    given = ["--prompts", "p", "--methods", *every, "--stages", "2", "4", "--width", "8", "16"]
    given += ["--exit-layer", "3", "--draft-steps", "2", "--passes", "5", "--models", "small", "middle", "big"]
    found = script.contenders(script.parse(given))
    assert len(found) == 2 * (2 + 3 * 2 + 3)
    assert (found["pp-4"].stages, found["pp-4"].target, found["pp-4"].draft) == (4, "big", None)
    tree = found["best-first-2x8"]
    assert (tree.width, tree.draft_steps, tree.target, tree.draft, tree.exit_layer) == (8, 2, "big", "small", None)
    assert found["pipedec-4x16"].draft_steps is None
    assert (found["eesd-2"].exit_layer, found["eesd-2"].width, found["eesd-2"].draft) == (3, None, None)
    assert (found["pipespec-2"].models, found["pipespec-2"].passes) == (["small", "middle", "big"], [5])
    assert (found["speculative-4"].models, found["speculative-4"].passes) == (["small", "big"], None)
    assert found["pipespec-2"].target is None
    pair = script.contenders(script.parse(["--prompts", "p", "--methods", "pipespec", "--target", "t", "--draft", "d"]))
    assert pair["pipespec-4"].models == ["d", "t"]
    ngram = ["--prompts", "p", "--target", "t", "--draft", "d", "--drafter", "ngram", "--methods", "pipedec"]
    assert script.contenders(script.parse(ngram))["pipedec-4x16"].draft is None


def test_an_option_that_no_method_has_is_refused():
    for option, methods in (("--width", "ppsd"), ("--passes", "best-first"), ("--draft-steps", "pipedec")):
        with pytest.raises(ValueError, match=f"{option} is of no use to --methods pp {methods}"):
            script.contenders(script.parse(["--prompts", "p", "--methods", "pp", methods, option, "3"]))
    used = ["--prompts", "p", "--methods", "pp", "eesd", "--draft-length", "3"]
    assert script.contenders(script.parse(used))["eesd-4"].draft_length == 3
