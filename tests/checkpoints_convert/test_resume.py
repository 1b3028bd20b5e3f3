"""A conversion that is stopped, however, goes on where it was and ends with the same bytes."""

import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from tqdm import tqdm

import pipedec_jax
from checkpoints_convert import __main__ as command
from checkpoints_convert import conversion, convert, is_converted, open_checkpoint, workplace
from checkpoints_convert.verify import damage
from tests.checkpoints_convert.sources import edit_json, stop_at, tiny_source
from tests.checkpoints_convert.stopping import Stopped, contents


@pytest.mark.parametrize("count", [1, 2, 12, 21])
@pytest.mark.parametrize("in_place", [False, True])
def test_goes_on_where_it_was(count, in_place, source, tmp_path, others, expected, monkeypatch):
    # In place is how object stores are written.
    monkeypatch.setattr(workplace, "is_cloud", lambda _: in_place)
    destination = tmp_path / "converted"
    with monkeypatch.context() as patch:
        stop_at(patch, count, Stopped)
        with pytest.raises(Stopped):
            convert(source, destination)
    assert not is_converted(destination)
    message = "is not complete: its conversion was interrupted or is still running"
    with pytest.raises(FileNotFoundError, match=message):
        open_checkpoint(destination)
    with pytest.raises(FileNotFoundError, match=message):
        pipedec_jax.load(destination)

    written, write = [], conversion.write_array

    def counting(*arguments):
        written.append(arguments[1])
        return write(*arguments)

    monkeypatch.setattr(conversion, "write_array", counting)
    convert(source, destination)
    assert len(written) == 21 - (count - 1)
    assert contents(destination) == expected
    assert others() == ["converted"]


def test_progress_counts_bytes_and_goes_on_where_it_was(source, tmp_path, monkeypatch):
    shown = []

    class Shown(tqdm):
        def __init__(self, **settings):
            super().__init__(**(settings | {"disable": False, "file": io.StringIO()}))
            shown.append(self)

    monkeypatch.setattr(conversion, "tqdm", Shown)
    with monkeypatch.context() as patch:
        stop_at(patch, 12, Stopped)
        with pytest.raises(Stopped):
            convert(source, tmp_path / "converted")
    # The disk has room for what is still to be written, and no more.
    free = shown[0].total - shown[0].n
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    total = open_checkpoint(convert(source, tmp_path / "converted")).nbytes
    first, second = shown
    assert (first.total, second.total, second.n) == (total, total, total)
    assert 0 < first.n == second.initial < total
    # Bytes done and in all, time gone and left, and the rate.
    line = r"convert: +\d+%\|.*\| [\d.]+k?/15\.7k \[\d\d:\d\d<[\d:?]+, .*B/s\]"
    assert re.search(line, second.fp.getvalue())


def test_a_lock_on_a_file_that_is_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """Whoever held it removes the workplace when done, while others wait for that very file."""
    fcntl = pytest.importorskip("fcntl")
    flock, seen = fcntl.flock, []

    def removed(file, operation):
        flock(file, operation)
        seen.append(os.fstat(file).st_ino)
        if len(seen) == 1:
            (root / "lock").unlink()
            root.rmdir()

    root = workplace.workplace_of(tmp_path / "converted")
    monkeypatch.setattr(fcntl, "flock", removed)
    with workplace.workplace(tmp_path / "converted", {}, wait=True):
        assert (root / "lock").stat().st_ino == seen[-1]
    assert len(seen) == 2


def test_the_disk_has_all_of_a_checkpoint_before_it_gets_its_name(source, tmp_path, monkeypatch):
    """Else after a power cut a checkpoint could be in its place, with files of zeros."""
    synced, missing = set(), []
    destination, fsync = tmp_path / "converted", os.fsync
    rename = type(destination).rename

    def sync(file):
        synced.add(os.fstat(file).st_ino)
        fsync(file)

    def named(path, target):
        if target == destination:
            missing.extend(one for one in (path, *path.rglob("*")) if one.stat().st_ino not in synced)
            synced.clear()
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(type(destination), "rename", named)
    convert(source, destination)
    assert missing == []
    assert tmp_path.stat().st_ino in synced, "and the name itself"


@pytest.mark.parametrize("change", ["source", "dtype", "boot", "files"])
def test_another_plan_starts_anew(change, source, tmp_path, others, monkeypatch):
    extra = source / "special_tokens_map.json"
    if change == "files":
        extra.write_text("{}")
    with monkeypatch.context() as patch:
        stop_at(patch, 9, Stopped)
        with pytest.raises(Stopped):
            convert(source, tmp_path / "converted")
    if change == "source":
        tiny_source(source, seed=1)
    if change == "files":
        extra.unlink()
    if change == "boot":
        # A power cut: what was recorded as finished never reached the disk.
        monkeypatch.setattr(conversion, "boot", lambda: "another")
        parameters = workplace.workplace_of(tmp_path / "converted") / "checkpoint" / "parameters"
        chunks = [path for path in parameters.glob("*/*") if path.name[0] != "."]
        assert chunks
        for path in chunks:
            path.write_bytes(bytes(path.stat().st_size))
    dtype = "bfloat16" if change == "dtype" else None
    convert(source, tmp_path / "converted", dtype)
    assert contents(tmp_path / "converted") == contents(convert(source, tmp_path / "again", dtype))
    assert others() == ["again", "converted"]


def test_in_place_a_conversion_with_other_options_is_left_alone(source, tmp_path, others, expected, monkeypatch):
    """An object store has no locks: it may still be running."""
    monkeypatch.setattr(workplace, "is_cloud", lambda _: True)
    destination = tmp_path / "converted"
    with monkeypatch.context() as patch:
        stop_at(patch, 9, Stopped)
        with pytest.raises(Stopped):
            convert(source, destination)
    for overwrite in (False, True):
        with pytest.raises(
            FileExistsError, match=r"holds part of a conversion with other .* remove it and .*\.partial"
        ):
            convert(source, destination, "bfloat16", overwrite=overwrite)
    assert contents(convert(source, destination)) == expected
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        convert(source, destination, "bfloat16")
    assert others() == ["converted"], "a refusal leaves nothing"


def test_records_that_were_cut_short_are_done_again(source, tmp_path, expected, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 9, Stopped)
        with pytest.raises(Stopped):
            convert(source, tmp_path / "converted")
    records = sorted((workplace.workplace_of(tmp_path / "converted") / "done").iterdir())
    records[0].write_bytes(records[0].read_bytes()[:20])
    records[1].write_bytes(b"")
    convert(source, tmp_path / "converted")
    assert contents(tmp_path / "converted") == expected


def test_a_source_that_changes_meanwhile_is_an_error(source, tmp_path, others, monkeypatch):
    write = conversion.write_tree_metadata

    def changing(*arguments):
        write(*arguments)
        os.utime(source / "model.safetensors", ns=(0, 0))

    monkeypatch.setattr(conversion, "write_tree_metadata", changing)
    with pytest.raises(ValueError, match="changed while it was converted"):
        convert(source, tmp_path / "converted")
    assert others() == []


def test_two_processes_do_not_convert_to_one_place(source, tmp_path, others):
    with (
        workplace.workplace(tmp_path / "converted", {}),
        pytest.raises(FileExistsError, match="another process is converting to 'converted'"),
    ):
        convert(source, tmp_path / "converted")
    assert others() == []


def test_a_full_disk_is_told_before_and_while_writing(source, tmp_path, others, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(conversion.shutil, "disk_usage", lambda _: SimpleNamespace(free=99))
        with pytest.raises(OSError, match=r"needs 15\.33 KiB more in .*, which has 99 B free; make room"):
            convert(source, tmp_path / "converted")
    assert others() == []
    # The disk is full in the middle: as the system says it when a file would grow beyond a limit.
    code = (
        "import resource, signal, sys\n"
        "from checkpoints_convert.__main__ import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"sys.exit(main(['convert', {str(source)!r}, {str(tmp_path / 'converted')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: cannot write array" in done.stderr
    assert others() == []


@pytest.mark.parametrize("when", ["before", "while writing", "in place"])
def test_an_interrupt_says_what_is_kept_where(when, source, tmp_path, capsys, monkeypatch):
    destination = tmp_path / "converted"
    if when == "before":
        monkeypatch.setattr(conversion, "check_tokenizer", raiser(KeyboardInterrupt))
        expected = "interrupted before anything was written\n"
    else:
        kept = tmp_path / ".converted.partial"
        if when == "in place":
            for module in (workplace, command):
                monkeypatch.setattr(module, "is_cloud", lambda _: True)
            kept = destination
        stop_at(monkeypatch, 3, KeyboardInterrupt)
        expected = f"interrupted; what is done is kept in {kept}: the same command again goes on where it was"
    assert command.main(["convert", str(source), str(destination)]) == 130
    assert capsys.readouterr().err.startswith(expected)


def raiser(error):
    def act(*_):
        raise error

    return act


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_killed_at_random_moments(end, source, tmp_path, others, expected):
    """As `scripts/kill_conversions.py` does a hundred times."""
    command = [sys.executable, "-m", "checkpoints_convert", "convert", str(source), str(tmp_path / "converted")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    # Not before there is something to go on with.
    while process.poll() is None and not (tmp_path / ".converted.partial" / "plan.json").exists():
        time.sleep(0.001)
    time.sleep(random.Random(0).random() / 20)
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(end)
    _, messages = process.communicate(timeout=60)
    assert process.returncode in (0, -end, 143)
    if process.returncode:
        assert not is_converted(tmp_path / "converted")
        kept = f"interrupted; what is done is kept in {tmp_path / '.converted.partial'}: the same command again goes on"
        assert end == signal.SIGKILL or messages.decode().startswith(kept)
        convert(source, tmp_path / "converted")
    assert contents(tmp_path / "converted") == expected
    assert others() == ["converted"]


def test_the_manifest_holds_what_it_should(source, tmp_path):
    converted = convert(source, tmp_path / "converted")
    values = json.loads((converted / "pipedec_jax.json").read_text())
    assert values["tool"].startswith("pipedec_jax ")
    assert values["source"]["files"]["model.safetensors"]["bytes"] == (source / "model.safetensors").stat().st_size
    assert set(values["files"]) == {"tokenizer.json", "generation_config.json"}
    assert values["arrays"]["layers/0/query"]["shape"] == [12, 4, 6]
    assert list(damage(converted)) == []
    edit_json(converted / "pipedec_jax.json", source=..., tool=1)
    with pytest.raises(ValueError, match=r"'source' must be of type dict"):
        open_checkpoint(converted)
