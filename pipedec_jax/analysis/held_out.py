"""Prompts from the demo family's held-out files, drawn by seed."""

from __future__ import annotations

import dataclasses
import importlib.resources
from pathlib import Path

import numpy as np

from pipedec_jax.analysis.questions import Question
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
