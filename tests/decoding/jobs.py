"""Jobs over a file of prompts with a decoder that only pretends."""

import json
import types

from pipedec_jax.decoding import batch
from pipedec_jax.pipeline.progress import Progress
from pipedec_jax.soundness import NotFiniteError

SETTINGS = {"seed": 0, "stop": (), "target": "fake"}


PROMPTS = [
    "one",
    {"prompt": "two", "id": "b"},
    {"prompt": [3, 4], "max_new_tokens": 2},
    {"messages": []},
    "five",
    "six",
]


class FakeDecoder:
    """Answers with its prompt; counts, and can be interrupted or find NaN at a prompt."""

    def __init__(self, interrupted=None, unsound=None):
        self.decoded = []
        self.interrupted, self.unsound = interrupted, unsound
        self.target = types.SimpleNamespace(chat=self.chat)

    def prepare(self):
        pass

    def chat(self, messages):
        if not messages:
            raise ValueError("the prompt is empty; give at least one message")
        return f"chat of {messages}"

    def request(self, prompt, **options):
        if not prompt:
            raise ValueError("the prompt is empty")
        if options["max_new_tokens"] == 0:
            raise ValueError("max_new_tokens must be")

    def stream(self, prompt, *, chunk, **options):
        if prompt == self.interrupted:
            raise KeyboardInterrupt
        if prompt == self.unsound:
            raise NotFiniteError(2, 4, (3, 4), 7, Progress([1], [1], [1.0], [1], [0.0], 1, False))
        self.decoded.append(prompt)
        figures = {"text": f"{prompt} {options['max_new_tokens']}", "new_tokens": 1, "compile_s": 0.0}
        stream = iter([str(prompt)])
        return FakeStream(stream, types.SimpleNamespace(to_dict=lambda: figures))


class FakeStream:
    def __init__(self, pieces, result):
        self.pieces, self.result = pieces, result

    def __iter__(self):
        return self.pieces


def run(decoder, prompts, out, settings=SETTINGS, **options):
    return batch.decode_file(decoder, prompts, out, settings=settings, **({"max_new_tokens": 9} | options))


def answers(out):
    header, *lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert set(header) == {"pipedec_jax_answers", "settings"}
    return lines
