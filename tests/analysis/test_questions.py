"""Files of prompts: what is read from each kind, and an error with file and line for what is none."""

import gzip
import json

import pytest

from pipedec_jax.analysis.questions import Question, read_questions, spread_over

SPEC_BENCH = [
    {
        "question_id": 81,
        "category": "writing",
        "turns": ["Compose a post.", "Rewrite\u2028it."],
        "reference": [],
    },
    {"question_id": 101, "category": "qa", "turns": ["Who?"]},
]
HUMAN_EVAL = [{"task_id": "HumanEval/0", "prompt": "def f():\n", "test": ""}, {"prompt": "def g():\n"}]


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_spec_bench_questions_keep_their_turns_and_categories(tmp_path):
    path = tmp_path / "question.jsonl"
    path.write_text(as_lines(SPEC_BENCH) + "\n", encoding="utf-8")
    assert read_questions(path) == [
        Question(81, "writing", ("Compose a post.", "Rewrite\u2028it."), 1),
        Question(101, "qa", ("Who?",), 2),
    ]


@pytest.mark.parametrize("name", ["HumanEval.jsonl", "HumanEval.jsonl.gz"])
def test_human_eval_is_read_plain_and_packed(tmp_path, name):
    data = as_lines(HUMAN_EVAL).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read_questions(tmp_path / name) == [
        Question("HumanEval/0", "HumanEval", ("def f():\n",), 1),
        Question(2, "HumanEval", ("def g():\n",), 2),
    ]


def test_every_line_of_a_text_is_a_prompt_but_blank_ones(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufefffirst \r\n\n  \nfourth\u2028still".encode())
    assert read_questions(path) == [
        Question(1, "prompts", ("first ",), 1),
        Question(4, "prompts", ("fourth\u2028still",), 4),
    ]


GOOD = '{"prompt": "a"}\n'
BAD = {
    "no JSON": (GOOD + "{", "line 2: no JSON"),
    "a list": (GOOD + "\n[1]", "line 3: must be a JSON object, not a list"),
    "no prompt": ('{"text": "a"}', "line 1: neither turns (Spec-Bench) nor prompt (HumanEval) among its keys: text"),
    "no turns": ('{"turns": []}', "line 1: turns must be a list of texts"),
    "a turn that is none": ('{"turns": ["a", 7]}', "line 1: a prompt must be a text and not empty, not 7"),
    "an empty prompt": ('{"prompt": " "}', "line 1: a prompt must be a text and not empty"),
    "half a character": ('{"prompt": "a\\ud83d"}', "line 1: a prompt is no valid Unicode text"),
    "a wrong id": ('{"prompt": "a", "question_id": true}', "line 1: question_id must be a number or text"),
    "a wrong category": ('{"prompt": "a", "category": 3}', "line 1: category must be a text"),
    "an id twice": ('{"prompt": "a", "question_id": 5}\n' * 2, "line 2: question 5 was already on line 1"),
    "nothing": ("\n \n", "holds no question"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_what_is_no_question_is_an_error_with_file_and_line(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        read_questions(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [5, -3])
def test_half_a_gzip_file_is_an_error(tmp_path, cut):
    path = tmp_path / "half.jsonl.gz"
    path.write_bytes(gzip.compress(as_lines(HUMAN_EVAL).encode())[:cut])
    with pytest.raises(ValueError, match=r"half\.jsonl\.gz is no whole gzip file"):
        read_questions(path)


def test_what_is_no_utf8_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"good\n\nb\xe4d\n")
    with pytest.raises(ValueError, match=r"latin.txt, line 3: no UTF-8 text"):
        read_questions(path)


def test_a_limit_takes_questions_from_all_over_the_file():
    questions = [Question(number, "text", ("a",), number) for number in range(10)]
    assert [question.id for question in spread_over(questions, 4)] == [0, 2, 5, 7]
    assert spread_over(questions, None) == spread_over(questions, 99) == questions
    with pytest.raises(ValueError, match="limit must be at least 1, not 0"):
        spread_over(questions, 0)
