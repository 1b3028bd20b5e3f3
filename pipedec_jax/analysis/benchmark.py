"""Runs decoders over the same questions in turn (A B A B), keeps every answer, and goes on where a kill stopped it.

Two files of lines are kept for each decoder: Spec-Bench's answer file, and the figures of every answer with its
tokens. Every answer is compared, token by token, with that of the first decoder before it is kept: another token is an
error in float32 and float64, and counted in bfloat16 and float16, where near ties of two tokens are common.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipedec_jax.analysis.answer_file import LineFile, accept_lengths, answer_line
from pipedec_jax.analysis.questions import Question
from pipedec_jax.clock import TokensDifferError, first_difference
from pipedec_jax.decoding.hierarchy import AnyDecoder, HierarchyDecoder
from pipedec_jax.decoding.result import Generation
from pipedec_jax.exit_store import description_path
from pipedec_jax.loading import Model, short_names
from pipedec_jax.whole_files import write_whole

WARM_UP_TOKENS = 4
"""Tokens of the answer that a decoder warms up with: all programs have then run."""

COMPILING_S = 0.02
"""Seconds from which on an answer is taken to have compiled, or made caches, and is timed again. A hierarchy counts the
time in which it finds its programs, far less than that, as compiling."""


class Kept:
    """What one decoder has answered so far, in two files with a line for each question.

    Args:
        folder: of the run.
        name: of the decoder, fit for a file's name.

    Raises:
        ValueError: when the files are not those of one run.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._answers = LineFile(folder / "answers" / f"{name}.jsonl")
        self._figures = LineFile(folder / "figures" / f"{name}.jsonl")
        # A kill between the two writes leaves a line in one of them alone.
        count = min(len(self._answers.rows), len(self._figures.rows))
        self._answers.keep(count)
        self._figures.keep(count)
        pairs = zip(self._answers.rows, self._figures.rows, strict=True)
        for line, (answer, figures) in enumerate(pairs, start=1):
            if "turns" not in figures or answer.get("question_id") != figures.get("question_id"):
                raise ValueError(
                    f"{self._figures.path}, line {line}: does not go with the same line of {self._answers.path}; "
                    "delete both files to answer anew"
                )
        self.by_question: dict[int | str, dict[str, Any]] = {row["question_id"]: row for row in self._figures.rows}

    def add(self, question: Question, model_id: str, row: dict[str, Any]) -> None:
        """Keep an answer."""
        self._answers.append(answer_line(question, model_id, row["turns"]))
        self._figures.append(row)
        self.by_question[question.id] = row


@dataclasses.dataclass
class Benchmark:
    """A run of several decoders of the same target over the same questions.

    Args:
        decoders: by a name that is fit for a file's; the first one's tokens are what the others' are compared with.
        questions: to ask.
        folder: where everything is kept.
        options: of `Decoder.generate`, the same for all.
        chat: put the turns into the target's chat template.
    """

    decoders: Mapping[str, AnyDecoder]
    questions: Sequence[Question]
    folder: Path
    options: dict[str, Any]
    chat: bool = False

    def __post_init__(self) -> None:
        self.model = next(iter(self.decoders.values())).target
        for name, decoder in self.decoders.items():
            if decoder.target.name != self.model.name:
                raise ValueError(
                    f"all methods must have the same target, but that of {name} is {decoder.target.name}, not "
                    f"{self.model.name}"
                )
            # Bad options are an error; a question that is too long is not.
            decoder.request([0], **self.options)
        models = {name: directories_of(decoder) for name, decoder in self.decoders.items()}
        self.directories = {short: path for path, short in short_names(itertools.chain(*models.values())).items()}
        """Of all models, by the shortest names that keep them apart."""
        names = {path: short for short, path in self.directories.items()}
        self.models = {name: [names[path] for path in paths] for name, paths in models.items()}
        """Names of each decoder's models, the target last."""
        self.left_out: dict[int | str, str] = {}
        """Why questions were not asked at all."""
        self.differing: dict[str, dict[int | str, str]] = {name: {} for name in self.decoders}
        """In bfloat16 and float16: by decoder and question, where its tokens first differ from the first decoder's."""
        self.kept = {name: Kept(self.folder, name) for name in self.decoders}
        self.warm_ups = LineFile(self.folder / "warm_ups.jsonl")
        """`measured_compile_s` of each decoder's first compiling, once in each session."""

    def run(self) -> None:
        """Ask all questions that are not answered yet.

        Raises:
            TokensDifferError: when decoders gave different tokens in float32 or float64; the answer that differs is not
                kept.
            ValueError: when no question fits into the target's context.
        """
        asked = [question for question in self.questions if self._fits(question)]
        if not asked:
            raise ValueError(f"no question fits into the target's context of {self.model.config.context} tokens")
        missing = [
            (question, name) for question in asked for name in self.decoders if question.id not in self._answered(name)
        ]
        for question in asked:
            for name in self.decoders:
                if question.id in self._answered(name):
                    self._check(question, name, self._answered(name)[question.id])
        cold = list(dict.fromkeys(name for _, name in missing))
        for name in tqdm(cold, desc="compiling", unit="setting", disable=None):
            self._warm_up(name, missing[0][0])
        total = len(asked) * len(self.decoders)
        bar = tqdm(total=total, initial=total - len(missing), unit="answer", disable=None, smoothing=0.05)
        with bar:
            for question, name in missing:
                bar.set_postfix_str(name)
                row = self._ask(question, self.decoders[name])
                self._check(question, name, row)
                layers = ", int8 layers" if self.model.config.int8 else ""
                self.kept[name].add(question, f"{' + '.join(self.models[name])}{layers}, {name}", row)
                bar.update()

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """By decoder, the kept figures of all questions of this run that were asked, in their order."""
        asked = [question for question in self.questions if question.id not in self.left_out]
        return {name: [kept.by_question[question.id] for question in asked] for name, kept in self.kept.items()}

    def _answered(self, name: str) -> dict[int | str, dict[str, Any]]:
        return self.kept[name].by_question

    def _fits(self, question: Question) -> bool:
        try:
            self._request(conversation(self.model, question.turns[:1], (), self.chat))
        except ValueError as error:
            self.left_out[question.id] = str(error)
            tell(f"question {question.id} (line {question.line}) is left out: {error}")
            return False
        return True

    def _request(self, prompt: str | list[int]) -> None:
        """Raise `ValueError` when a decoder cannot take a prompt: all shall answer the same ones."""
        for decoder in self.decoders.values():
            decoder.request(prompt, **self.options)

    def _warm_up(self, name: str, question: Question) -> None:
        decoder = self.decoders[name]
        before = decoder.engine.compile_seconds
        stream = decoder.stream(conversation(self.model, question.turns[:1], (), self.chat), **self.options)
        # Not every step gives text, so the end of the stream may come first.
        for _ in itertools.islice(stream, WARM_UP_TOKENS):
            pass
        seconds = decoder.engine.compile_seconds - before
        self.warm_ups.append({"decoder": name, "question_id": question.id, "measured_compile_s": seconds})

    def _ask(self, question: Question, decoder: AnyDecoder) -> dict[str, Any]:
        """Figures of the answers to all turns that fit."""
        turns: list[dict[str, Any]] = []
        left_out = None
        for count in range(1, len(question.turns) + 1):
            answers = [turn["text"] for turn in turns]
            prompt = conversation(self.model, question.turns[:count], answers, self.chat)
            try:
                self._request(prompt)
            except ValueError as error:
                left_out = f"turn {count}: {error}"
                if decoder is next(iter(self.decoders.values())):
                    tell(f"question {question.id} (line {question.line}) ends before {left_out}")
                break
            result = decoder.generate(prompt, **self.options)
            compile_s = result.compile_s
            if compile_s > COMPILING_S:
                # A length that needs other programs or caches: that was the warm-up.
                result = decoder.generate(prompt, **self.options)
            turns.append(figures(result, decoder.engine.run(0).nodes) | {"measured_compile_s": compile_s})
        return {"question_id": question.id, "category": question.category, "left_out": left_out, "turns": turns}

    def _check(self, question: Question, name: str, row: dict[str, Any]) -> None:
        """Raise `TokensDifferError`, or count it, when a row has other tokens than the first decoder's."""
        first = next((other for other in self.decoders if question.id in self._answered(other)), name)
        expected = self._answered(first).get(question.id, row)
        where = difference(row, expected)
        if where is None:
            return
        turn, place, own, other = where
        found = f"turn {turn + 1}, new token {place}: {own} by {name}, {other} by {first}"
        if self.decoders[name].dtype.itemsize > 2:
            raise TokensDifferError(
                f"tokens differ: question {question.id!r}, {found}; nothing was summed up. This is a bug or a near tie "
                "of two tokens"
            )
        self.differing[name][question.id] = found


def difference(row: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[int, int, int | None, int | None] | None:
    """Turn and place, from 0, at which two answers first have different tokens, and these; `None` for nowhere."""
    answers = ([turn["token_ids"] for turn in answer["turns"]] for answer in (row, expected))
    for turn, (ours, theirs) in enumerate(itertools.zip_longest(*answers, fillvalue=[])):
        if (place := first_difference(ours, theirs)) is not None:
            own, other = (tokens[place] if place < len(tokens) else None for tokens in (ours, theirs))
            return turn, place, own, other
    return None


def directories_of(decoder: AnyDecoder) -> list[str]:
    """Where a decoder's models lie, the target last; a trained exit head is one of them."""
    if isinstance(decoder, HierarchyDecoder):
        return [model.name for model in decoder.models]
    models = [model.name for model in (decoder.draft, decoder.target) if model is not None]
    head = decoder.exit_head_config
    if head is None or head.variant == "target":
        return models
    return [str(description_path(decoder.target, head).parent), *models]


def tell(message: str) -> None:
    """Say something on standard error, above the progress bar."""
    tqdm.write(message, file=sys.stderr)


def conversation(model: Model, turns: Sequence[str], answers: Sequence[str], chat: bool) -> str | list[int]:
    """The prompt of the last turn: text, or the chat template's tokens.

    Without the template, each answer continues the text before it, and a blank line parts it from the next turn.

    Args:
        model: the target.
        turns: of the question, up to the one to answer.
        answers: to all of them but the last.
        chat: use the target's chat template.
    """
    if chat:
        messages = [{"role": "user", "content": turns[0]}]
        for answer, turn in zip(answers, turns[1:], strict=True):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
        return model.chat(messages)
    return turns[0] + "".join(f"{answer}\n\n{turn}" for answer, turn in zip(answers, turns[1:], strict=True))


def figures(result: Generation, nodes: int) -> dict[str, Any]:
    """What is kept of an answer, JSON-ready: counts, ratios of counts, modeled and measured figures.

    Args:
        result: a whole answer.
        nodes: rows the target was sent for it (`pipeline.progress.Progress`); under PipeSpec also those it read before
            the host saw the end.
    """
    misses = result.misses
    return {
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens,
        "finish_reason": result.finish_reason,
        "ticks": result.ticks,
        "hits": result.hits,
        "misses": misses,
        "late_hits": result.late_hits,
        "accept_lengths": accept_lengths([token.hit for token in result.tokens]),
        # The others are what the target chose itself: the first row, and one after each miss.
        "guesses": None if misses is None else max(0, nodes - misses - 1),
        "modeled_speedup_vs_pp": result.modeled_speedup_vs_pp,
        "measured_ttft_s": result.ttft_s,
        "measured_tpot_s": result.tpot_s,
        "measured_wall_s": result.ttft_s + (result.tpot_s or 0.0) * (result.new_tokens - 1),
        "token_ids": result.token_ids,
        "text": result.text,
    }


def digest(path: Path) -> str:
    """A file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def open_run(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier session of the same run chose, or nothing.

    Raises:
        ValueError: when the folder holds a run with other settings.
    """
    path = folder / "run.json"
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        earlier, chosen = found["settings"], found["chosen"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of a benchmark: choose another --out, or delete that folder") from error
    ours = json.loads(json.dumps(settings))
    for name in sorted(ours.keys() | earlier.keys()):
        if ours.get(name) != earlier.get(name):
            raise ValueError(
                f"{folder} holds a run with other settings ({name}: {earlier.get(name)} there, {ours.get(name)} now): "
                "choose another --out, or delete that folder"
            )
    return chosen


def save_run(folder: Path, settings: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    """Write down what a later session must have alike."""
    write_whole(folder / "run.json", json.dumps({"settings": settings, "chosen": chosen}, indent=1) + "\n")
