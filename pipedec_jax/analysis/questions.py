"""Reads files of prompts: Spec-Bench questions, HumanEval's problems, plain text lines."""

from __future__ import annotations

import dataclasses
import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipedec_jax.small_files import json_kind


@dataclasses.dataclass(frozen=True)
class Question:
    """What a benchmark asks, in one turn or several."""

    id: int | str
    """Spec-Bench's `question_id`, HumanEval's `task_id`, or the number of the line, from 1."""
    category: str
    """Spec-Bench's, or the name of the file."""
    turns: tuple[str, ...]
    """What the user says; every turn after the first follows an answer."""
    line: int
    """Where it stands in its file, counted from 1."""


def read_questions(path: Path) -> list[Question]:
    """Read all questions of a file.

    A file called `.jsonl` or `.jsonl.gz` holds JSON objects, each with `turns` (Spec-Bench) or with `prompt`
    (HumanEval); any other holds a prompt on each line. Blank lines count for nothing.

    Raises:
        OSError: when the file cannot be read.
        ValueError: naming file and line, for what is no question, an id that was there before, or no question at all.
    """
    lines = _read_text(path).split("\n")
    name = path.name.removesuffix(".gz")
    parse = _from_json if name.endswith(".jsonl") else _from_text
    stem = name.rsplit(".", 1)[0]
    questions: dict[int | str, Question] = {}
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        try:
            question = parse(line, number, stem)
            if question.id in questions:
                raise ValueError(f"question {question.id!r} was already on line {questions[question.id].line}")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        questions[question.id] = question
    if not questions:
        raise ValueError(f"{path} holds no question")
    return list(questions.values())


def spread_over(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """At most `limit` questions, evenly spread over the file, so that few of them still have many categories.

    Raises:
        ValueError: for a limit below 1.
    """
    if limit is None or limit >= len(questions):
        return list(questions)
    if limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    return [questions[index * len(questions) // limit] for index in range(limit)]


def of_each_category(questions: Sequence[Question], count: int) -> list[Question]:
    """The first `count` questions of each category, in the file's order.

    Raises:
        ValueError: for a count below 1.
    """
    if count < 1:
        raise ValueError(f"questions of each category must be at least 1, not {count}")
    seen: dict[str, int] = {}
    chosen = []
    for question in questions:
        seen[question.category] = seen.get(question.category, 0) + 1
        if seen[question.category] <= count:
            chosen.append(question)
    return chosen


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is no whole gzip file: {error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise ValueError(f"{path}, line {line}: no UTF-8 text ({error.reason})") from error


def json_object(line: str | bytes) -> dict[str, Any]:
    """What a line of JSON Lines holds.

    Raises:
        ValueError: when that is no JSON object.
    """
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"must be a JSON object, not {json_kind(found)}")
    return found


def _from_text(line: str, number: int, stem: str) -> Question:
    return Question(number, stem, (line,), number)


def _from_json(line: str, number: int, stem: str) -> Question:
    found = json_object(line)
    if "turns" in found:
        turns = found["turns"]
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"turns must be a list of texts, not {turns!r:.60}")
    elif "prompt" in found:
        turns = [found["prompt"]]
    else:
        raise ValueError(f"neither turns (Spec-Bench) nor prompt (HumanEval) among its keys: {', '.join(found)}")
    for turn in turns:
        _check_text(turn)
    identity = found.get("question_id", found.get("task_id", number))
    if isinstance(identity, bool) or not isinstance(identity, int | str):
        raise ValueError(f"question_id must be a number or text, not {identity!r:.60}")
    category = found.get("category", stem)
    if not isinstance(category, str) or not category:
        raise ValueError(f"category must be a text, not {category!r:.60}")
    return Question(identity, category, tuple(turns), number)


def _check_text(turn: Any) -> None:
    """Raise `ValueError` for what no tokenizer can take."""
    if not isinstance(turn, str) or not turn.strip():
        raise ValueError(f"a prompt must be a text and not empty, not {turn!r:.60}")
    try:
        turn.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a prompt is no valid Unicode text ({error.reason} at character {error.start})") from error
