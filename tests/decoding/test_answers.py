"""The answers' file: cut off or damaged anywhere, held by another, of other settings or prompts, or no such file."""

import errno
import os

import pytest

from pipedec_jax.decoding import answers as answers_file
from pipedec_jax.decoding import batch
from tests.decoding.jobs import SETTINGS, FakeDecoder, answers, run


def test_cut_off_at_any_byte_it_ends_with_the_same_bytes_and_decodes_no_finished_prompt_again(
    prompts, out, monkeypatch
):
    monkeypatch.setattr(answers_file.os, "fsync", lambda _: None)
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


def test_reads_and_writes_that_the_system_cuts_short_lose_nothing(prompts, out, monkeypatch):
    run(FakeDecoder(), prompts, out)
    whole = out.read_bytes()
    out.unlink()
    read, write = answers_file.os.read, answers_file.os.write
    monkeypatch.setattr(answers_file.os, "read", lambda file, size: read(file, min(size, 50)))
    monkeypatch.setattr(answers_file.os, "write", lambda file, data: write(file, data[:7]))
    with pytest.raises(KeyboardInterrupt):
        run(FakeDecoder(interrupted="five"), prompts, out)
    assert run(FakeDecoder(), prompts, out).found == 4
    assert out.read_bytes() == whole


def test_what_the_disk_has_is_there_before_the_next_prompt_begins(prompts, out, monkeypatch):
    synced = []
    monkeypatch.setattr(answers_file.os, "fsync", lambda _: synced.append(out.read_bytes().count(b"\n")))
    run(FakeDecoder(), prompts, out)
    assert synced == [1, 1, 2, 3, 4, 5, 6, 7], "the header, the file's name, each answer"


def test_other_settings_are_an_error_that_names_them(prompts, out):
    run(FakeDecoder(), prompts, out)
    before = out.read_bytes()
    with pytest.raises(
        ValueError, match=r'with seed 0 and not 7, method null and not "pp": give the same settings, or'
    ):
        run(FakeDecoder(), prompts, out, {**SETTINGS, "seed": 7, "method": "pp"})
    with pytest.raises(ValueError, match='with target "fake" and not null: give'):
        run(FakeDecoder(), prompts, out, {"seed": 0, "stop": ()})
    assert out.read_bytes() == before


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
    "another version": (b'{"pipedec_jax_answers": 0, "settings": {}}\n', "no file of answers of this version"),
    "settings alone": (b'{"settings": {}}\n', "is no file of answers: give another --out$"),
    "settings that are none": (b'{"pipedec_jax_answers": 1, "settings": 7}\n', "no file of answers of this version"),
    "a line without end": (b"[" * 100000 + b"\n", "is no file of answers: give another --out$"),
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
    for damaged in (first[:9], b"[1]", b"7", b"{}", b'{"line": [1]}', b"[" * 100000):
        out.write_bytes(b"".join([header, damaged + b"\n", *rest]))
        with pytest.raises(ValueError, match=r"line 2 of .* is damaged"):
            run(FakeDecoder(), prompts, out)
    out.write_bytes(b"".join([header, first, *rest, first]))
    with pytest.raises(ValueError, match="has two answers to line 1"):
        run(FakeDecoder(), prompts, out)


def test_one_process_at_a_time_writes(prompts, out):
    lines = batch.read_lines(prompts)
    with (
        answers_file.open_answers(out, SETTINGS, lines),
        pytest.raises(BlockingIOError, match="another process is writing"),
    ):
        run(FakeDecoder(), prompts, out)
    assert run(FakeDecoder(), prompts, out).answered == 5


def test_what_cannot_be_read_again_is_refused_and_not_waited_for(prompts, tmp_path):
    """A pipe would never end, and a device may never."""
    os.mkfifo(tmp_path / "pipe")
    for out in (tmp_path / "pipe", os.devnull):
        with pytest.raises(ValueError, match="is no file that answers can be kept in and read again"):
            run(FakeDecoder(), prompts, out)


def test_a_full_disk_is_named_and_loses_no_answer(prompts, out, monkeypatch):
    run(FakeDecoder(), prompts, out)
    whole = out.read_bytes()
    out.unlink()
    write = os.write
    room = 3 * len(whole) // 4

    def full(file, data):
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(file, data[:room])
        room -= written
        return written

    with monkeypatch.context() as patched:
        patched.setattr(answers_file.os, "write", full)
        with pytest.raises(OSError, match="No space left") as failed:
            run(FakeDecoder(), prompts, out)
    assert (failed.value.errno, failed.value.filename) == (errno.ENOSPC, str(out))
    assert 0 < run(FakeDecoder(), prompts, out).found < 6
    assert out.read_bytes() == whole
