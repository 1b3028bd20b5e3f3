"""Many prompts from a file: each is decoded once, and bad ones are reported in their lines."""

import contextlib
import json

import numpy as np
import pytest
from tqdm import tqdm

import pipedec_jax
from pipedec_jax.decoding import batch
from pipedec_jax.decoding.answers import open_answers
from pipedec_jax.decoding.result import FIGURES
from pipedec_jax.hosts.group import Alone
from tests.decoding.jobs import SETTINGS, FakeDecoder, FakeStream, answers, run
from tests.progress_bars import Bars


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


def test_an_interrupt_loses_the_prompt_under_way_alone(prompts, out):
    with pytest.raises(KeyboardInterrupt):
        run(FakeDecoder(interrupted="five"), prompts, out)
    assert [answer["line"] for answer in answers(out)] == [1, 2, 3, 4]
    decoder = FakeDecoder()
    assert run(decoder, prompts, out).found == 4
    assert decoder.decoded == ["five", "six"]
    assert run(FakeDecoder(), prompts, out).answered == 0


def test_prompts_may_be_added_behind(prompts, out):
    run(FakeDecoder(), prompts, out)
    with prompts.open("a") as file:
        file.write('\n \t\n"nine"')
    decoder = FakeDecoder()
    run(decoder, prompts, out)
    assert decoder.decoded == ["nine"]
    assert answers(out)[-1]["line"] == 9


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
    prompts.write_text('{"prompt": "", "id": ["a", 1]}\n{"prompt": "a", "id": 7, "max_tokens": 5}')
    run(FakeDecoder(), prompts, out)
    assert [answer["id"] for answer in answers(out)] == [["a", 1], 7]


def test_an_id_that_is_repeated_can_be_read_again(prompts, out):
    """However deep it is, as long as its line is not refused."""
    for depth in (batch.DEEPEST - 1, batch.DEEPEST, 989, 990):
        out.unlink(missing_ok=True)
        deep = "[" * (depth - 1) + '{"b": 1}' + "]" * (depth - 1)
        prompts.write_text(f'{{"prompt": "a", "id": {deep}}}\n"two"')
        assert run(FakeDecoder(), prompts, out).bad == (depth >= batch.DEEPEST)
        assert run(FakeDecoder(), prompts, out).found == 2


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
    with open_answers(out, SETTINGS, lines) as held:  # as the first process holds it
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
    b"[1, 2]": "a JSON string or object, not a list",
    b"[" * 100000: "nested too deeply",
    b'{"prompt": "a", "id": ' + b"[" * 100 + b"]" * 100 + b"}": "nested too deeply",
    b"{}": "either prompt or messages",
    b'{"prompt": "a", "messages": []}': "either prompt or messages",
    b'{"prompt": 5}': "prompt must be text or a list of token ids, not a number",
    b'{"prompt": ""}': "the prompt is empty",
    b'{"prompt": "a", "max_tokens": 5}': "unknown key 'max_tokens', perhaps max_new_tokens; allowed: prompt, messages",
    b'{"prompt": "a", "max_new_tokens": 0}': "max_new_tokens must be",
    b'{"prompt": "a", "temperature": NaN}': "NaN is not JSON",
    b'{"prompt": "a", "id": 1e999}': "1e999 is too large a number",
    b'{"prompt": "a", "id": -1e999}': "-1e999 is too large a number",
    b'{"messages": 5}': "messages must be a list of objects with role and content",
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


def test_lines_that_were_read_before_are_those_that_are_decoded(prompts, out):
    """As several processes have compared them, also where the file has grown since."""
    lines = batch.read_lines(prompts)
    with prompts.open("a") as file:
        file.write('"seven"')
    assert run(FakeDecoder(), prompts, out, lines=lines).prompts == 6
    assert run(FakeDecoder(), prompts, out).answered == 1


def test_a_mark_of_the_encoding_before_the_first_prompt_is_none_of_it(prompts, out):
    run(FakeDecoder(), prompts, out)
    plain = out.read_bytes()
    out.unlink()
    prompts.write_bytes(b"\xef\xbb\xbf" + prompts.read_bytes().replace(b"\n", b"\r\n"))
    run(FakeDecoder(), prompts, out)
    assert out.read_bytes() == plain


def test_answers_do_not_go_into_the_prompts(prompts, tmp_path):
    (tmp_path / "link").symlink_to(prompts)
    for out in (prompts, tmp_path / "link"):
        with pytest.raises(ValueError, match="must go to another file"):
            run(FakeDecoder(), prompts, out)


def test_the_bar_goes_on_where_it_was_and_is_the_first_processs(prompts, out, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(FakeDecoder(interrupted="five"), prompts, out)
    bars = Bars()
    with monkeypatch.context() as patched:
        patched.setattr(batch, "tqdm", bars)
        run(FakeDecoder(), prompts, out)
    bars.check([""])
    asked = []
    monkeypatch.setattr(batch, "tqdm", lambda **options: asked.append(options["disable"]) or tqdm(**options))
    run(FakeDecoder(), prompts, out, group=Waiting(1, []))
    assert asked == [True]


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
