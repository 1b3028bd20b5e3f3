"""Files of JSON lines that survive a kill at any moment, and Spec-Bench's answers, which are written to such files."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipedec_jax.analysis.questions import Question, json_object


class LineFile:
    """JSON objects, a line each; opening it reads what is there, and `append` adds a line with one write.

    A last line without its line end was cut off by a kill: it is dropped from the file.

    Args:
        path: of the file, made when it is not there; its folder too.

    Raises:
        OSError: when it cannot be read or written.
        ValueError: naming file and line, when a whole line is no JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        lines = data.split(b"\n")[:-1]
        self.rows: list[dict[str, Any]] = [self._parse(number, line) for number, line in enumerate(lines, start=1)]
        self._ends = [0]
        for line in lines:
            self._ends.append(self._ends[-1] + len(line) + 1)
        if self._ends[-1] < len(data):
            os.truncate(path, self._ends[-1])

    def append(self, row: dict[str, Any]) -> None:
        """Add a line."""
        line = (json.dumps(row) + "\n").encode()
        with self.path.open("ab", buffering=0) as file:
            file.write(line)
        self.rows.append(row)
        self._ends.append(self._ends[-1] + len(line))

    def keep(self, count: int) -> None:
        """Drop all lines after the first `count`."""
        if count < len(self.rows):
            os.truncate(self.path, self._ends[count])
            del self.rows[count:], self._ends[count + 1 :]

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            return json_object(line)
        except ValueError as error:
            raise ValueError(f"{self.path}, line {number}: {error}; delete the line to go on") from error


def accept_lengths(hits: Sequence[bool | None]) -> list[int]:
    """Tokens that came out of each filling of the pipe: the first one, and one more after each miss.

    Args:
        hits: of each token of an answer (`decoding.result.Token.hit`). `None` under PP, where every token fills the
            pipe anew; what it says of the last token counts for nothing.
    """
    lengths, run = [], 0
    for index, hit in enumerate(hits):
        run += 1
        if not hit or index == len(hits) - 1:
            lengths.append(run)
            run = 0
    return lengths


def answer_line(question: Question, model_id: str, turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A line of a Spec-Bench answer file, `decoding_steps` being ticks and `accept_lengths` tokens per refill.

    Args:
        question: that was answered.
        model_id: how: models and method.
        turns: figures of the answer to each turn, from `analysis.benchmark.figures`.
    """
    choice = {
        "index": 0,
        "turns": [turn["text"] for turn in turns],
        "decoding_steps": [turn["ticks"] for turn in turns],
        "new_tokens": [turn["new_tokens"] for turn in turns],
        "wall_time": [turn["measured_wall_s"] for turn in turns],
        "accept_lengths": [length for turn in turns for length in turn["accept_lengths"]],
    }
    return {
        "question_id": question.id,
        "category": question.category,
        "answer_id": uuid.uuid4().hex,
        "model_id": model_id,
        "tstamp": time.time(),
        "choices": [choice],
    }
