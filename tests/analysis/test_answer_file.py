"""Files of lines after a kill at any byte, and Spec-Bench's answers."""

import json

import pytest

from pipedec_jax.analysis.answer_file import LineFile, accept_lengths, answer_line
from pipedec_jax.analysis.questions import Question

ROWS = [{"text": "a\nb"}, {"text": "ü\r\u2028"}, {"number": 3}]


def test_after_a_kill_at_any_byte_the_whole_lines_are_there_and_more_can_be_added(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    file = LineFile(path)
    for row in ROWS:
        file.append(row)
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        file = LineFile(path)
        whole = data[:cut].count(b"\n")
        assert file.rows == ROWS[:whole]
        assert path.read_bytes() == data[:cut][: data.rfind(b"\n", 0, cut) + 1]
        for row in ROWS[whole:]:
            file.append(row)
        assert path.read_bytes() == data


def test_lines_after_those_to_keep_are_dropped(tmp_path):
    file = LineFile(tmp_path / "rows.jsonl")
    for row in ROWS:
        file.append(row)
    file.keep(5)
    file.keep(1)
    file.append(ROWS[2])
    assert file.rows == LineFile(file.path).rows == [ROWS[0], ROWS[2]]


@pytest.mark.parametrize(("line", "message"), [("{", "no JSON"), ("7", "must be a JSON object")])
def test_a_whole_line_that_is_no_object_is_an_error_with_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n" + line + "\n{}\n")
    with pytest.raises(ValueError, match=rf"rows.jsonl, line 2: {message}.*; delete the line to go on"):
        LineFile(path)
    assert path.read_text() == "{}\n" + line + "\n{}\n"


@pytest.mark.parametrize(
    ("hits", "lengths"),
    [
        ([None, None, None], [1, 1, 1]),
        ([True, True, None], [3]),
        ([False, True, False, False, True, None], [1, 2, 1, 2]),
        ([True, False, True, True], [2, 2]),
        ([None], [1]),
    ],
)
def test_accept_lengths_end_at_misses_and_sum_to_the_tokens(hits, lengths):
    assert accept_lengths(hits) == lengths
    assert sum(lengths) == len(hits)


def test_an_answer_has_spec_benchs_keys_and_json():
    turn = {"text": "a", "ticks": 7, "new_tokens": 3, "measured_wall_s": 0.5, "accept_lengths": [1, 2], "hits": 1}
    line = answer_line(Question(81, "writing", ("x", "y"), 1), "demo, pp-2", [turn, turn | {"text": "b"}])
    assert json.loads(json.dumps(line)) == line
    assert list(line) == ["question_id", "category", "answer_id", "model_id", "tstamp", "choices"]
    assert (line["question_id"], line["category"], line["model_id"]) == (81, "writing", "demo, pp-2")
    assert line["choices"] == [
        {
            "index": 0,
            "turns": ["a", "b"],
            "decoding_steps": [7, 7],
            "new_tokens": [3, 3],
            "wall_time": [0.5, 0.5],
            "accept_lengths": [1, 2, 1, 2],
        }
    ]
