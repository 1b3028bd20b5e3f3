"""Prompts from the demo family's held-out files, drawn by seed; or, for other models, from a file."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
from pathlib import Path

import numpy as np

from pipedec_jax.analysis.questions import Question, read_questions
from pipedec_jax.training.corpus import library_root, read_list, read_text


@dataclasses.dataclass(frozen=True)
class HeldOutPrompt:
    """A piece of a held-out file that ends at the end of a line."""

    path: str
    """The file, relative to the standard library's folder."""
    line: int
    """Number of the line that would come next, from 1."""
    text: str


def held_out_prompts(count: int, seed: int, characters: int = 600) -> list[HeldOutPrompt]:
    """Draw `count` prompts of about `characters` characters, each from another file while there are enough.

    Raises:
        ValueError: when the running interpreter's standard library is not the one the list was made from.
    """
    with importlib.resources.as_file(importlib.resources.files("pipedec_jax") / "demo") as demo:
        files = read_list(Path(demo) / "heldout_files.txt")
    texts = [(file.path, read_text(library_root(), file)) for file in files]
    texts = [(path, text) for path, text in texts if len(text) > 2 * characters]
    rng = np.random.default_rng(seed)
    prompts = []
    order: list[int] = []
    for _ in range(count):
        order = order or rng.permutation(len(texts)).tolist()
        path, text = texts[order.pop()]
        start = int(rng.integers(0, len(text) - 2 * characters))
        begin = text.rfind("\n", 0, start) + 1
        end = text.find("\n", begin + characters) + 1 or len(text)
        prompts.append(HeldOutPrompt(path, text.count("\n", 0, end) + 1, text[begin:end]))
    return prompts


def held_out_questions(count: int, seed: int) -> list[Question]:
    """The same prompts as questions; what each is called says where it ends.

    Raises:
        ValueError: as `held_out_prompts` does, and for a count below 1.
    """
    if count < 1:
        raise ValueError(f"held-out prompts must be at least 1, not {count}")
    return [
        Question(f"{prompt.path}:{prompt.line}", "held-out source", (prompt.text,), number)
        for number, prompt in enumerate(held_out_prompts(count, seed), start=1)
    ]


def prompts_given(given: str, seed: int) -> tuple[list[str], str]:
    """Texts of prompts as an option gives them, and in words what they are.

    Args:
        given: a number of held-out prompts, or a file as `questions.read_questions` takes it (first turns count).
        seed: that draws held-out prompts.

    Raises:
        OSError: when the file cannot be read.
        ValueError: as `held_out_questions` and `read_questions` do.
    """
    if given.removeprefix("-").isdigit():
        questions, words = held_out_questions(int(given), seed), f"{given} held-out prompts (seed {seed})"
    else:
        questions, path = read_questions(Path(given)), Path(given)
        sum_ = hashlib.sha256(path.read_bytes()).hexdigest()
        words = f"{len(questions)} prompts of {path.name} (SHA-256 {sum_[:16]})"
    return [question.turns[0] for question in questions], words
