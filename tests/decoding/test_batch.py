"""Many prompts from a file: nothing lost or doubled wherever it is killed, and bad prompts in their lines."""

import contextlib
import json
import types

import numpy as np
import pytest

import pipedec_jax
from pipedec_jax.decoding import batch
from pipedec_jax.decoding.result import FIGURES
from pipedec_jax.hosts.group import Alone
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


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS), encoding="utf-8")
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "answers.jsonl"


def run(decoder, prompts, out, settings=SETTINGS, **options):
    return batch.decode_file(decoder, prompts, out, settings=settings, **({"max_new_tokens": 9} | options))


def answers(out):
    header, *lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert set(header) == {"pipedec_jax_answers", "settings"}
    return lines


def test_every_prompt_has_one_line_in_order_with_its_statistics(prompts, out):
    done = run(FakeDecoder(), prompts, out)
    found = answers(out)
    assert [answer["line"] for answer in found] == [1, 2, 3, 4, 5, 6]
    assert [answer.get("text") for answer in found] == ["one 9", "two 9", "[3, 4] 2", None, "five 9", "six 9"]
    assert found[1]["id"] == "b"
    assert "id" not in found[0]
    assert found[3]["error"] == "the prompt is empty; give at least one message"
    assert (done.prompts, done.found, done.answered, done.bad, done.new_tokens) == (6, 0, 5, 1, 5)
    assert str(done).startswith("6 prompts: 0 finished before, 5 answered, 1 bad; 5 tokens in ")


def test_cut_off_at_any_byte_it_ends_with_the_same_bytes_and_decodes_no_finished_prompt_again(
    prompts, out, monkeypatch
):
    monkeypatch.setattr(batch.os, "fsync", lambda _: None)
    run(FakeDecoder(), prompts, out)
    whole = out.read_bytes()
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    lengths = {*range(0, len(whole) + 1, 7), *(end + more for end in ends for more in (-1, 0, 1))}
    for length in sorted(lengths):
        out.write_bytes(whole[:length])
        decoder = FakeDecoder()
        done = run(decoder, prompts, out)
        assert out.read_bytes() == whole
        assert done.found == max(0, whole[:length].count(b"\n") - 1)
        assert len(decoder.decoded) == done.answered == sum("text" in line for line in answers(out)[done.found :])


def test_an_interrupt_loses_the_prompt_under_way_alone(prompts, out):
    with pytest.raises(KeyboardInterrupt):
        run(FakeDecoder(interrupted="five"), prompts, out)
    assert [answer["line"] for answer in answers(out)] == [1, 2, 3, 4]
    decoder = FakeDecoder()
    assert run(decoder, prompts, out).found == 4
    assert decoder.decoded == ["five", "six"]
    assert run(FakeDecoder(), prompts, out).answered == 0


def test_reads_and_writes_that_the_system_cuts_short_lose_nothing(prompts, out, monkeypatch):
    run(FakeDecoder(), prompts, out)
    whole = out.read_bytes()
    out.unlink()
    read, write = batch.os.read, batch.os.write
    monkeypatch.setattr(batch.os, "read", lambda file, size: read(file, min(size, 50)))
    monkeypatch.setattr(batch.os, "write", lambda file, data: write(file, data[:7]))
    with pytest.raises(KeyboardInterrupt):
        run(FakeDecoder(interrupted="five"), prompts, out)
    assert run(FakeDecoder(), prompts, out).found == 4
    assert out.read_bytes() == whole


def test_prompts_may_be_added_behind(prompts, out):
    run(FakeDecoder(), prompts, out)
    with prompts.open("a") as file:
        file.write('\n\n"nine"')
    decoder = FakeDecoder()
    run(decoder, prompts, out)
    assert decoder.decoded == ["nine"]
    assert answers(out)[-1]["line"] == 9


def test_what_the_disk_has_is_there_before_the_next_prompt_begins(prompts, out, monkeypatch):
    synced = []
    monkeypatch.setattr(batch.os, "fsync", lambda _: synced.append(out.read_bytes().count(b"\n")))
    run(FakeDecoder(), prompts, out)
    assert synced == [1, 1, 2, 3, 4, 5, 6, 7], "the header, the file's name, each answer"


def test_nan_in_the_target_is_reported_in_its_line(prompts, out):
    done = run(FakeDecoder(unsound="two"), prompts, out)
    assert "stage 2 of 4 (layers 3 to 4) is not finite (NaN or infinity) in tick 7, after 1" in answers(out)[1]["error"]
    assert answers(out)[1]["id"] == "b"
    assert (done.answered, done.bad) == (4, 2)


def test_an_error_while_decoding_is_no_prompts_fault(prompts, out):
    class Broken(FakeDecoder):
        def stream(self, prompt, **options):
            if prompt == "two":
                raise ValueError("a shape that does not fit")
            return super().stream(prompt, **options)

    with pytest.raises(ValueError, match="a shape that does not fit"):
        run(Broken(), prompts, out)
    assert [answer["line"] for answer in answers(out)] == [1]


def test_a_bad_prompt_keeps_its_id(prompts, out):
    prompts.write_text('{"prompt": "", "id": ["a", 1]}')
    run(FakeDecoder(), prompts, out)
    assert answers(out)[0]["id"] == ["a", 1]


def test_text_goes_into_the_chat_template_where_that_is_asked_and_tokens_never_do(prompts, out):
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in ("one", {"prompt": [3, 4]}, chat)))
    decoder = FakeDecoder()
    run(decoder, prompts, out, chat=True)
    assert decoder.decoded == ["chat of one", [3, 4], f"chat of {chat['messages']}"]


class Waiting(Alone):
    """A group that knows whether it waits for the devices, and of which others have answered what."""

    def __init__(self, index=0, finished=None):
        self.index, self.waiting, self.finished = index, False, finished

    @contextlib.contextmanager
    def step(self):
        self.waiting = True
        yield
        self.waiting = False

    def share(self, name, value):
        assert name == "finished"
        return json.loads(json.dumps(value if self.finished is None else self.finished))


def test_whatever_runs_on_the_devices_is_in_a_step_and_nothing_else(prompts, out):
    """A watch ends a process only in a step: what hangs outside of one would hang for ever."""
    seen = []

    class Asking(FakeDecoder):
        def request(self, prompt, **options):
            assert not group.waiting
            super().request(prompt, **options)

        def stream(self, prompt, **options):
            seen.append(group.waiting)
            found = super().stream(prompt, **options)
            return FakeStream((seen.append(group.waiting) or piece for piece in found), found.result)

    group = Waiting()
    run(Asking(), prompts, out, group=group)
    assert seen == [True] * (5 + 5)
    assert not group.waiting


def test_of_several_processes_one_reads_and_writes_and_all_decode_the_same_prompts(prompts, out):
    with pytest.raises(KeyboardInterrupt):
        run(FakeDecoder(interrupted="five"), prompts, out, group=Waiting())
    before = out.read_bytes()
    decoder, lines = FakeDecoder(), batch.read_lines(prompts)
    with batch.open_answers(out, SETTINGS, lines) as held:  # as the first process holds it
        finished = sorted(held.finished.items())
        done = run(decoder, prompts, out, group=Waiting(1, finished))
    assert decoder.decoded == ["five", "six"]
    assert (done.found, done.found_bad, done.answered) == (4, 1, 2)
    assert out.read_bytes() == before
    again = FakeDecoder()
    run(again, prompts, out, group=Waiting())
    assert again.decoded == decoder.decoded


BAD = {
    b"{": "not JSON",
    b"\xff": "not UTF-8",
    b"7": "a JSON string or object, not a number",
    b"null": "a JSON string or object, not null",
    b"[" * 100000: "nested too deeply",
    b"{}": "either prompt or messages",
    b'{"prompt": "a", "messages": []}': "either prompt or messages",
    b'{"prompt": 5}': "prompt must be text or a list of token ids, not a number",
    b'{"prompt": ""}': "the prompt is empty",
    b'{"prompt": "a", "max_tokens": 5}': "unknown key 'max_tokens', perhaps max_new_tokens; allowed: prompt, messages",
    b'{"prompt": "a", "max_new_tokens": 0}': "max_new_tokens must be",
    b'{"prompt": "a", "temperature": NaN}': "NaN is not JSON",
    b'{"messages": ["a"]}': "messages must be a list of objects with role and content",
    b'{"messages": [{"role": "user"}]}': "messages must be a list of objects with role and content",
}


def test_a_bad_prompt_is_reported_in_its_line_and_the_rest_go_on(prompts, out):
    prompts.write_bytes(b"\n".join(line + b'\n"good"' for line in BAD))
    done = run(FakeDecoder(), prompts, out)
    found = answers(out)
    assert (done.bad, done.answered) == (len(BAD), len(BAD))
    for message, bad, good in zip(BAD.values(), found[::2], found[1::2], strict=True):
        assert message in bad["error"]
        assert good["text"] == "good 9"
    assert run(FakeDecoder(), prompts, out).found == 2 * len(BAD), "known as finished"


def test_weights_that_cannot_be_read_are_no_prompts_fault(prompts, out):
    class Broken(FakeDecoder):
        def prepare(self):
            raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        run(Broken(), prompts, out)
    assert answers(out) == []


def test_other_settings_are_an_error_that_names_them(prompts, out):
    run(FakeDecoder(), prompts, out)
    before = out.read_bytes()
    with pytest.raises(
        ValueError, match=r'with seed 0 and not 7, method null and not "pp": give the same settings, or'
    ):
        run(FakeDecoder(), prompts, out, {**SETTINGS, "seed": 7, "method": "pp"})
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"temperature": -4},
        {"top_k": -3},
        {"top_p": 7},
        {"seed": -1},
        {"stop": [""]},
    ],
    ids=str,
)
def test_settings_that_are_bad_for_every_prompt_are_refused_before_anything_is_written(prompts, out, bad):
    decoder = FakeDecoder()
    with pytest.raises(ValueError, match=f"{'stop string' if 'stop' in bad else next(iter(bad))} must be"):
        run(decoder, prompts, out, **bad)
    assert not out.exists()
    assert decoder.decoded == []


def test_the_status_is_1_only_where_every_prompt_is_bad_now_or_before(prompts, out):
    assert run(FakeDecoder(), prompts, out).status == 0
    out.unlink()
    prompts.write_bytes(b'{\n{"prompt": ""}\n')
    assert run(FakeDecoder(), prompts, out).status == 1
    again = run(FakeDecoder(), prompts, out)
    assert (again.found, again.found_bad, again.bad, again.status) == (2, 2, 0, 1)
    prompts.write_bytes(prompts.read_bytes() + b'"good"')
    assert run(FakeDecoder(), prompts, out).status == 0
    out.unlink()
    prompts.write_bytes(b"\n")
    assert run(FakeDecoder(), prompts, out).status == 0, "no prompt is no bad one"


def test_a_mark_of_the_encoding_before_the_first_prompt_is_none_of_it(prompts, out):
    run(FakeDecoder(), prompts, out)
    plain = out.read_bytes()
    out.unlink()
    prompts.write_bytes(b"\xef\xbb\xbf" + prompts.read_bytes().replace(b"\n", b"\r\n"))
    run(FakeDecoder(), prompts, out)
    assert out.read_bytes() == plain


def test_another_prompt_in_an_answered_line_is_an_error(prompts, out):
    run(FakeDecoder(), prompts, out)
    prompts.write_text(prompts.read_text().replace("two", "2"))
    with pytest.raises(ValueError, match="line 2 of the prompts has changed since"):
        run(FakeDecoder(), prompts, out)
    prompts.write_text('"one"\n')
    with pytest.raises(ValueError, match="line 2 of the prompts has changed since"):
        run(FakeDecoder(), prompts, out)


HELD = {
    "some text": (b"hello", "is no file of answers"),
    "a line of JSON that does not end": (b'{"text": 1}', "is no file of answers"),
    "lines of text": (b"hello\nthere\n", "is no file of answers: give another --out$"),
    "lines of JSON": (b'{"text": 1}\n{"text": 2}\n', "is no file of answers: give another --out$"),
    "lines of numbers": (b"[1]\n2\n", "is no file of answers: give another --out$"),
    "another version": (b'{"pipedec_jax_answers": 0, "settings": {}}\n', "no file of answers"),
}


@pytest.mark.parametrize(("content", "message"), HELD.values(), ids=HELD.keys())
def test_another_file_is_refused_and_left_as_it_is(prompts, out, content, message):
    out.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(FakeDecoder(), prompts, out)
    assert out.read_bytes() == content


def test_a_damaged_or_doubled_answer_is_an_error(prompts, out):
    run(FakeDecoder(), prompts, out)
    header, first, *rest = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join([header, first[:9] + b"\n", *rest]))
    with pytest.raises(ValueError, match=r"line 2 of .* is damaged"):
        run(FakeDecoder(), prompts, out)
    out.write_bytes(b"".join([header, first, *rest, first]))
    with pytest.raises(ValueError, match="has two answers to line 1"):
        run(FakeDecoder(), prompts, out)


def test_one_process_at_a_time_writes(prompts, out):
    lines = batch.read_lines(prompts)
    with batch.open_answers(out, SETTINGS, lines), pytest.raises(BlockingIOError, match="another process is writing"):
        run(FakeDecoder(), prompts, out)
    assert run(FakeDecoder(), prompts, out).answered == 5


def test_answers_do_not_go_into_the_prompts(prompts):
    with pytest.raises(ValueError, match="must go to another file"):
        run(FakeDecoder(), prompts, prompts)


def test_answers_are_the_decoders_and_all_lengths_share_one_program(family, tmp_path, out):
    target, draft = (pipedec_jax.load(family[name]) for name in ("target", "draft"))
    decoder = pipedec_jax.Decoder(target, draft, stages=2, width=4, children=2)
    asked = ["x = 1", "for index, value in enumerate(values):\n", "", list(range(5, 45)), "def f(x):"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in asked), encoding="utf-8")
    done = run(decoder, prompts, out, max_new_tokens=20)
    assert (done.answered, done.bad) == (4, 1)
    assert len(decoder.engine._programs) == 1
    compiled = decoder.engine.compile_seconds
    for prompt, answer in zip(asked, answers(out), strict=True):
        if prompt:
            assert set(answer) == {"line", "digest", *FIGURES}
            assert answer["token_ids"] == decoder.generate(prompt, max_new_tokens=20).token_ids
        else:
            assert "the prompt is empty" in answer["error"]
    assert decoder.engine.compile_seconds == compiled == pytest.approx(done.compile_s)
    assert np.count_nonzero([answer.get("compile_s", 0) for answer in answers(out)]) == 1
