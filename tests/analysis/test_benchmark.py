"""The benchmark: what it keeps, that it goes on after a kill, and that other tokens are never summed up."""

import dataclasses
import json
import os
import re
import shutil
import types
from typing import Any

import numpy as np
import pytest

import pipedec_jax
from pipedec_jax.analysis.answer_file import LineFile
from pipedec_jax.analysis.benchmark import Benchmark, conversation, figures, open_run, save_run
from pipedec_jax.analysis.questions import Question
from pipedec_jax.clock import TokensDifferError
from tests.analysis.asked import NAMES, QUESTIONS

OPTIONS = {"max_new_tokens": 10}
ASKED = [81, "qa/1", 83]


@pytest.fixture(scope="module")
def done(decoders, tmp_path_factory):
    """A finished run, not to be changed."""
    benchmark = Benchmark(decoders, QUESTIONS, tmp_path_factory.mktemp("done"), OPTIONS)
    benchmark.run()
    return benchmark


def files(folder):
    return sorted(path for part in ("answers", "figures") for path in (folder / part).iterdir())


def copied(done, folder):
    for path in files(done.folder):
        (folder / path.parent.name).mkdir(exist_ok=True)
        (folder / path.parent.name / path.name).write_bytes(path.read_bytes())
    return folder


class Counting:
    """A decoder that counts answers and may say other tokens."""

    def __init__(self, decoder, wrong=None):
        self._decoder = decoder
        self._wrong = wrong
        self.prompts = []

    def __getattr__(self, name):
        return getattr(self._decoder, name)

    def generate(self, prompt, **options):
        self.prompts.append(prompt)
        result = self._decoder.generate(prompt, **options)
        if prompt != self._wrong:
            return result
        last = dataclasses.replace(result.tokens[-1], id=result.tokens[-1].id + 1)
        return dataclasses.replace(result, tokens=(*result.tokens[:-1], last))


def test_answers_are_those_of_the_decoders_in_spec_benchs_format(done, decoders):
    first = decoders["pp-2"].generate(QUESTIONS[0].turns[0], **OPTIONS)
    second = QUESTIONS[0].turns[0] + first.text + "\n\n" + QUESTIONS[0].turns[1]
    expected = [first.token_ids, decoders["pp-2"].generate(second, **OPTIONS).token_ids]
    for name, rows in done.rows().items():
        assert [row["question_id"] for row in rows] == ASKED
        assert [turn["token_ids"] for turn in rows[0]["turns"]] == expected
        answers = LineFile(done.folder / "answers" / f"{name}.jsonl").rows
        assert [answer["question_id"] for answer in answers] == ASKED
        for row, answer in zip(rows, answers, strict=True):
            (choice,) = answer["choices"]
            assert choice["turns"] == [turn["text"] for turn in row["turns"]]
            assert choice["decoding_steps"] == [turn["ticks"] for turn in row["turns"]]
            assert choice["new_tokens"] == [len(turn["token_ids"]) for turn in row["turns"]]
            assert sum(choice["accept_lengths"]) == sum(choice["new_tokens"])
            assert all(seconds > 0 for seconds in choice["wall_time"])


def test_answers_name_models_and_method_and_no_place(done, family):
    for name, models in zip(NAMES, ("target", "draft + target"), strict=True):
        path = done.folder / "answers" / f"{name}.jsonl"
        assert {line["model_id"] for line in LineFile(path).rows} == {f"{models}, {name}"}
        assert str(family["target"].parent) not in path.read_text()
    assert done.directories == {name: str(family[name]) for name in ("target", "draft")}


def test_answers_of_int8_layers_say_so(family, tmp_path):
    target = pipedec_jax.load(family["target"], int8=True)
    decoder = pipedec_jax.Decoder(target, method="pp", stages=1, prefill_width=16, capacity=128)
    Benchmark({"pp-1": decoder}, QUESTIONS[3:], tmp_path, OPTIONS).run()
    (answer,) = LineFile(tmp_path / "answers" / "pp-1.jsonl").rows
    assert answer["model_id"] == "target, int8 layers, pp-1"


def test_a_run_whose_answers_name_their_models_otherwise_goes_on(done, decoders, tmp_path):
    folder = copied(done, tmp_path)
    for name in NAMES:
        path = folder / "answers" / f"{name}.jsonl"
        path.write_text(path.read_text().replace('"model_id": "', '"model_id": "/somewhere/'))
    counting = {name: Counting(decoder) for name, decoder in decoders.items()}
    Benchmark(counting, QUESTIONS, folder, OPTIONS).run()
    assert [counted.prompts for counted in counting.values()] == [[], []]


def test_models_of_the_same_name_are_told_apart(family, tmp_path):
    for name in family:
        shutil.copytree(family[name], tmp_path / name / "model")
    draft, target = (pipedec_jax.load(tmp_path / name / "model") for name in ("draft", "target"))
    decoders = {
        "pp-2": pipedec_jax.Decoder(target, method="pp", stages=2),
        "pipedec-2": pipedec_jax.Decoder(target, draft, method="pipedec", stages=2),
        "ppsd-2": pipedec_jax.Decoder(target, method="ppsd", stages=2, exit_layer=1, exit_head="target"),
        "pipespec-1": pipedec_jax.HierarchyDecoder([draft, target], passes=[2]),
    }
    benchmark = Benchmark(decoders, QUESTIONS, tmp_path / "out", OPTIONS)
    alone, both = ["target/model"], ["draft/model", "target/model"]
    assert list(benchmark.models.values()) == [alone, both, alone, both]
    assert benchmark.directories == {f"{name}/model": str(tmp_path / name / "model") for name in ("target", "draft")}


def test_figures_of_each_method(done):
    for row in done.rows()["pp-2"]:
        for turn in row["turns"]:
            assert turn["ticks"] == 2 * turn["new_tokens"]
            assert turn["accept_lengths"] == [1] * turn["new_tokens"]
            assert (turn["hits"], turn["misses"], turn["guesses"]) == (None, None, None)
    for row in done.rows()["best-first-2x4"]:
        for turn in row["turns"]:
            assert turn["hits"] + turn["misses"] == turn["new_tokens"] - 1
            assert len(turn["accept_lengths"]) == turn["misses"] + 1
            # A hit was sent as a guess, and no tick sends more than the width.
            assert turn["hits"] <= turn["guesses"] <= 4 * turn["ticks"]


def test_guesses_are_what_the_target_did_not_choose_and_the_wall_clock_ends_with_the_last_token():
    tokens = [types.SimpleNamespace(hit=hit) for hit in (True, False, None)]
    values: dict[str, Any] = dict.fromkeys(("prompt_tokens", "finish_reason", "ticks", "hits", "late_hits"), 0)
    values |= {
        "tokens": tokens,
        "new_tokens": 3,
        "misses": 1,
        "modeled_speedup_vs_pp": 1.0,
        "token_ids": [],
        "text": "",
    }
    result: Any = types.SimpleNamespace(**values, ttft_s=0.5, tpot_s=0.125)
    found = figures(result, 10)
    assert found["guesses"] == 10 - 2, "all but the first row, and the one after the miss"
    assert found["measured_wall_s"] == 0.75
    result.tpot_s, result.new_tokens, result.misses = None, 1, None
    assert (figures(result, 10)["measured_wall_s"], figures(result, 10)["guesses"]) == (0.5, None)


def test_what_one_of_the_methods_cannot_answer_is_asked_of_none(decoders, tmp_path, capsys):
    class Short(Counting):
        def request(self, prompt, **options):
            if isinstance(prompt, str) and prompt.startswith("for x"):
                raise ValueError("does not fit into the draft's context")

    counting = {NAMES[0]: Counting(decoders[NAMES[0]]), NAMES[1]: Short(decoders[NAMES[1]])}
    questions = [Question(1, "qa", ("x = 1",), 1), QUESTIONS[3]]
    benchmark = Benchmark(counting, questions, tmp_path, OPTIONS)
    benchmark.run()
    assert benchmark.left_out == {83: "does not fit into the draft's context"}
    assert [counted.prompts for counted in counting.values()] == [["x = 1"], ["x = 1"]]


def test_what_is_too_long_is_left_out_and_said_and_the_rest_goes_on(decoders, tmp_path, capsys, done):
    assert list(done.left_out) == [82]
    assert "exceed the target's context of 128 tokens" in done.left_out[82]
    for rows in done.rows().values():
        assert [len(row["turns"]) for row in rows] == [2, 1, 3]
        assert [row["left_out"] is None for row in rows] == [True, False, True]
        assert rows[1]["left_out"].startswith("turn 2: prompt (")
    Benchmark(decoders, QUESTIONS[1:3], tmp_path, OPTIONS).run()
    shown = capsys.readouterr().err
    assert shown.count("question 82 (line 2) is left out: prompt (") == 1
    assert shown.count("question qa/1 (line 3) ends before turn 2: prompt (") == 1
    with pytest.raises(ValueError, match="no question fits into the target's context of 128 tokens"):
        Benchmark(decoders, QUESTIONS[1:2], tmp_path, OPTIONS).run()


def test_methods_take_turns_on_each_question_and_warm_up_before(decoders, tmp_path):
    order = []

    class Named(Counting):
        def generate(self, prompt, **options):
            order.append((self.method, prompt))
            return super().generate(prompt, **options)

    questions = [Question(number, "text", (f"x{number} =",), number) for number in (1, 2)]
    benchmark = Benchmark({name: Named(decoder) for name, decoder in decoders.items()}, questions, tmp_path, OPTIONS)
    benchmark.run()
    assert order == [(method, f"x{number} =") for number in (1, 2) for method in ("pp", "best-first")]
    assert [row["decoder"] for row in benchmark.warm_ups.rows] == list(NAMES)
    assert all(
        turn["measured_compile_s"] == 0 for rows in benchmark.rows().values() for row in rows for turn in row["turns"]
    )


def test_an_answer_that_had_to_compile_is_timed_again(decoders, tmp_path):
    class Compiling(Counting):
        def generate(self, prompt, **options):
            result = super().generate(prompt, **options)
            return dataclasses.replace(result, compile_s=5.0, ttft_s=99.0) if len(self.prompts) == 1 else result

    decoder = Compiling(decoders["pp-2"])
    benchmark = Benchmark({"pp-2": decoder}, QUESTIONS[:1], tmp_path, OPTIONS)
    benchmark.run()
    first, second = benchmark.rows()["pp-2"][0]["turns"]
    assert [first["measured_compile_s"], second["measured_compile_s"]] == [5.0, 0.0]
    assert first["measured_ttft_s"] < 99
    assert len(decoder.prompts) == 3


@pytest.mark.parametrize("part", ["answers", "figures"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_killed_run_goes_on_where_it_stopped(done, decoders, tmp_path, part, share):
    # As if killed while `best-first` wrote its last answer, or before.
    folder = copied(done, tmp_path)
    torn = folder / part / "best-first-2x4.jsonl"
    os.truncate(torn, int(torn.stat().st_size * share))
    whole = torn.read_bytes().count(b"\n")
    counting = {name: Counting(decoder) for name, decoder in decoders.items()}
    benchmark = Benchmark(counting, QUESTIONS, folder, OPTIONS)
    benchmark.run()
    assert counting["pp-2"].prompts == []
    asked = [question for question in QUESTIONS if question.id in ASKED][whole:]
    assert counting["best-first-2x4"].prompts[0] == asked[0].turns[0]
    turns = {81: 2, "qa/1": 1, 83: 3}
    assert len(counting["best-first-2x4"].prompts) == sum(turns[question.id] for question in asked)
    times = {"measured_wall_s", "measured_ttft_s", "measured_tpot_s", "measured_compile_s"}
    for name, rows in done.rows().items():
        for ours, theirs in zip(benchmark.rows()[name], rows, strict=True):
            for turn, other in zip(ours["turns"], theirs["turns"], strict=True):
                assert {k: v for k, v in turn.items() if k not in times} == {
                    k: v for k, v in other.items() if k not in times
                }
        answers = LineFile(folder / "answers" / f"{name}.jsonl").rows
        assert [answer["question_id"] for answer in answers] == ASKED
    again = {name: Counting(decoder) for name, decoder in decoders.items()}
    Benchmark(again, QUESTIONS, folder, OPTIONS).run()
    assert [counted.prompts for counted in again.values()] == [[], []]


def test_other_tokens_are_an_error_and_not_kept(decoders, tmp_path):
    wrong = decoders | {"best-first-2x4": Counting(decoders["best-first-2x4"], wrong=QUESTIONS[3].turns[0])}
    benchmark = Benchmark(wrong, QUESTIONS, tmp_path, OPTIONS)
    with pytest.raises(
        TokensDifferError, match=r"question 83, turn 1, new token 9: \d+ by best-first-2x4, \d+ by pp-2"
    ):
        benchmark.run()
    assert [row["question_id"] for row in LineFile(tmp_path / "answers" / "best-first-2x4.jsonl").rows] == ASKED[:2]
    assert [row["question_id"] for row in LineFile(tmp_path / "answers" / "pp-2.jsonl").rows] == ASKED


def test_other_tokens_are_counted_in_16_bits(decoders, tmp_path):
    names = list(decoders)
    half = {name: Counting(decoders[name], wrong=QUESTIONS[3].turns[0] if name != names[0] else None) for name in names}
    for decoder in half.values():
        decoder.dtype = np.dtype("float16")
    benchmark = Benchmark(half, QUESTIONS, tmp_path, OPTIONS)
    benchmark.run()
    assert benchmark.differing["pp-2"] == {}
    assert list(benchmark.differing["best-first-2x4"]) == [83]
    assert re.fullmatch(
        r"turn 1, new token 9: \d+ by best-first-2x4, \d+ by pp-2", benchmark.differing["best-first-2x4"][83]
    )
    assert [row["question_id"] for row in benchmark.rows()["best-first-2x4"]] == ASKED
    again = Benchmark(half, QUESTIONS, tmp_path, OPTIONS)
    again.run()
    assert again.differing == benchmark.differing


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", ["a token", "an answer"])
def test_other_tokens_among_the_kept_ones_are_an_error(done, decoders, tmp_path, name, part):
    path = copied(done, tmp_path) / "figures" / f"{name}.jsonl"
    rows = LineFile(path).rows
    if part == "a token":
        del rows[2]["turns"][1]["token_ids"][-1]
    else:
        del rows[2]["turns"][2]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = "turn 2, new token 9" if part == "a token" else "turn 3, new token 0"
    with pytest.raises(TokensDifferError, match=f"question 83, {where}"):
        Benchmark(decoders, QUESTIONS, tmp_path, OPTIONS).run()


def test_files_of_two_runs_are_an_error(done, decoders, tmp_path):
    path = copied(done, tmp_path) / "answers" / "pp-2.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[::-1]))
    with pytest.raises(ValueError, match=r"pp-2.jsonl, line 1: does not go with the same line"):
        Benchmark(decoders, QUESTIONS, tmp_path, OPTIONS)


def test_bad_options_are_an_error_before_anything_is_written(decoders, tmp_path):
    with pytest.raises(ValueError, match="temperature must be"):
        Benchmark(decoders, QUESTIONS, tmp_path / "out", OPTIONS | {"temperature": -1.0})
    assert not (tmp_path / "out").exists()


def test_a_conversation_is_in_the_chat_template_or_one_text(decoders):
    model = decoders["pp-2"].target
    assert conversation(model, ["a", "b"], ["A"], chat=False) == "aA\n\nb"
    messages = [("user", "a"), ("assistant", "A"), ("user", "b")]
    tokens = conversation(model, ["a", "b"], ["A"], chat=True)
    assert tokens == model.chat([{"role": role, "content": content} for role, content in messages])


def test_a_run_goes_on_only_with_the_same_settings(tmp_path):
    settings = {"methods": ["pp"], "stages": (2, 4)}
    assert open_run(tmp_path, settings) == {}
    save_run(tmp_path, settings, {"pipespec-2": {"passes": [3]}})
    assert open_run(tmp_path, settings) == {"pipespec-2": {"passes": [3]}}
    with pytest.raises(ValueError, match=r"other settings \(stages: \[2, 4\] there, \[2\] now\): choose another --out"):
        open_run(tmp_path, settings | {"stages": [2]})
    with pytest.raises(ValueError, match=r"other settings \(int8: None there, True now\)"):
        open_run(tmp_path, settings | {"int8": True})
    with pytest.raises(ValueError, match=r"other settings \(methods: \['pp'\] there, None now\)"):
        open_run(tmp_path, {"stages": (2, 4)})
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=r"run\.json is no file of a benchmark"):
        open_run(tmp_path, settings)
