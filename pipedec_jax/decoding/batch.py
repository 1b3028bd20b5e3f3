"""Many prompts from a file, one answer a line: killed at any moment and started again, it goes on where it was.

What is asked for is read here; the answers' file, which says what is finished, is `decoding.answers`.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import difflib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from pipedec_jax.decoding.answers import Answers, Line, open_answers
from pipedec_jax.decoding.request_options import check_request_options
from pipedec_jax.hosts.group import Alone
from pipedec_jax.small_files import json_kind
from pipedec_jax.soundness import NotFiniteError

if TYPE_CHECKING:
    from pipedec_jax.decoding.base import Prompt
    from pipedec_jax.decoding.hierarchy import AnyDecoder

OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop")
"""What a prompt's line may set for itself."""
KEYS = ("prompt", "messages", "id", *OPTIONS)
"""What a prompt's line may hold."""
DEEPEST = 100
"""Lists and objects within each other in a prompt's line: an answer that repeats its `id` must be written and read."""
CHUNK = 16
"""Tokens between two looks of the host: an interrupt is noticed so soon."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a call of `decode_file` did."""

    prompts: int
    """In the file."""
    found: int
    """Of them, finished before."""
    found_bad: int
    """Of these, with an error."""
    answered: int
    """Now."""
    bad: int
    """Now; their lines say why."""
    new_tokens: int
    seconds: float
    """Of decoding, compiling and making caches included."""
    compile_s: float

    @property
    def status(self) -> int:
        """For a command to end with: 1 where there are prompts and all are bad, now or before, else 0."""
        return int(0 < self.prompts == self.found_bad + self.bad)

    def __str__(self) -> str:
        rate = f", {self.new_tokens / self.seconds:.1f} tokens/s" if self.new_tokens else ""
        return (
            f"{self.prompts} prompts: {self.found} finished before, {self.answered} answered, {self.bad} bad; "
            f"{self.new_tokens} tokens in {self.seconds:.1f} s measured, {self.compile_s:.1f} s of them compiling{rate}"
        )


def decode_file(
    decoder: AnyDecoder,
    prompts: str | Path,
    out: str | Path,
    *,
    settings: Mapping[str, Any],
    chat: bool = False,
    group: Alone | None = None,
    lines: Sequence[Line] | None = None,
    **options: Any,
) -> Summary:
    """Decode the prompts of a file that have no line in the answers' file yet, one at a time, in order.

    A prompt's line is a JSON string, or an object with `prompt` (text or token ids) or `messages` (of a chat), and, if
    wanted, `id` (anything, repeated in its answer) and `OPTIONS` of its own. Empty lines are left out. An answer's line
    has `line`, `digest`, `id` and either `error` or the figures of `Generation.to_dict`. A prompt that is bad, or that
    makes the target give NaN, is reported so and counts as finished.

    Args:
        decoder: a `Decoder` or a `HierarchyDecoder`.
        prompts: JSON Lines in UTF-8.
        out: the answers' file; made when there is none.
        settings: JSON-ready; recorded in the first line.
        chat: put a prompt's text into the target's chat template.
        group: the processes that decode together; the first of them alone reads and writes `out`.
        lines: what stands in `prompts`, where that has been read: the file may grow while processes compare it.
        **options: as for `Decoder.request`, for prompts that do not set their own.

    Raises:
        ValueError: when an option is out of its range, before `out` is made; when `out` holds answers of other settings
            or to other prompts, or is damaged or no such file.
        OSError: when a file cannot be read or written, or another process writes to `out`.
    """
    group = group or Alone()
    check_request_options(**{name: options[name] for name in OPTIONS if name in options})
    lines = read_lines(Path(prompts)) if lines is None else lines
    if Path(out).exists() and Path(out).samefile(prompts):
        raise ValueError(f"the answers must go to another file than the prompts: {out}")
    begun, answered, bad, tokens, compiling = time.perf_counter(), 0, 0, 0, 0.0
    with contextlib.ExitStack() as held:
        answers = (
            held.enter_context(open_answers(Path(out), settings, lines))
            if group.leads
            else Answers(None, Path(out), {})
        )
        answers.finished.update(group.share("finished", sorted(answers.finished.items())))
        found, found_bad = len(answers.finished), sum(answers.finished.values())
        with tqdm(total=len(lines), initial=found, unit="prompt", disable=None if group.leads else True) as bar:
            for line in lines:
                if line.number in answers.finished:
                    continue
                answer = decode_line(decoder, line, chat, options, group)
                answers.append(line, answer)
                bad += "error" in answer
                answered += "error" not in answer
                tokens += answer.get("new_tokens", 0)
                compiling += answer.get("compile_s", 0.0)
                bar.update()
                bar.set_postfix(bad=bad, tokens=tokens)
    return Summary(len(lines), found, found_bad, answered, bad, tokens, time.perf_counter() - begun, compiling)


def decode_line(
    decoder: AnyDecoder, line: Line, chat: bool, options: Mapping[str, Any], group: Alone
) -> dict[str, Any]:
    """The answer to one line, or its `error`."""
    mark: dict[str, Any] = {}
    try:
        asked = read_object(line)
        if "id" in asked:
            mark["id"] = asked["id"]
        check_asked(asked)
        if "messages" in asked:
            prompt: Prompt = decoder.target.chat(asked["messages"])
        elif chat and isinstance(asked["prompt"], str):
            prompt = decoder.target.chat(asked["prompt"])
        else:
            prompt = asked["prompt"]
        given = {**options, **{name: asked[name] for name in OPTIONS if name in asked}}
        decoder.request(prompt, **given)
    except ValueError as error:
        return {**mark, "error": str(error)}
    group.prepare(decoder)  # what is wrong with the weights is not the prompt's fault
    try:
        with group.step():
            stream = decoder.stream(prompt, chunk=CHUNK, **given)
        for _ in group.steps(stream):
            pass
    except NotFiniteError as error:
        return {**mark, "error": str(error)}
    return {**mark, **stream.result.to_dict()}


def read_lines(path: Path) -> list[Line]:
    """The lines of the prompts' file that are not empty; editors of Windows put a mark before the first."""
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    return [Line(number, line.strip()) for number, line in enumerate(content, start=1) if line.strip()]


def read_object(line: Line) -> dict[str, Any]:
    """A line's object; text alone is that of a `prompt`.

    Raises:
        ValueError: when it is neither.
    """
    try:
        asked = json.loads(line.content.decode(), parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("the line is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the line is not UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"the line is not JSON: {error}") from error
    if isinstance(asked, str):
        asked = {"prompt": asked}
    if not isinstance(asked, dict):
        raise ValueError(f"a line must be a JSON string or object, not {json_kind(asked)}")
    _check_depth(asked)
    return asked


def check_asked(asked: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a line's object has not `prompt` or `messages`, and perhaps `id` and `OPTIONS`."""
    for name in asked:
        if name not in KEYS:
            near = difflib.get_close_matches(name, KEYS, 1)
            raise ValueError(
                f"unknown key {name!r}{f', perhaps {near[0]}' if near else ''}; allowed: {', '.join(KEYS)}"
            )
    if ("prompt" in asked) == ("messages" in asked):
        raise ValueError("a line needs either prompt or messages")
    if "prompt" in asked and not isinstance(asked["prompt"], str | list):
        raise ValueError(f"prompt must be text or a list of token ids, not {json_kind(asked['prompt'])}")
    if "messages" in asked:
        _check_messages(asked["messages"])


def _check_depth(value: Any, left: int = DEEPEST) -> None:
    if not left:
        raise ValueError("the line is nested too deeply")
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            _check_depth(inner, left - 1)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):  # no JSON where an answer repeats it
        raise ValueError(f"{text} is too large a number")
    return number


def _check_messages(messages: Any) -> None:
    def is_message(one: Any) -> bool:
        return isinstance(one, dict) and all(isinstance(one.get(name), str) for name in ("role", "content"))

    if not isinstance(messages, list) or not all(is_message(one) for one in messages):
        raise ValueError("messages must be a list of objects with role and content, both text")
