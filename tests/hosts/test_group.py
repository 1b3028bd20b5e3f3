"""What processes of a group share and compare, when they wait for each other, and how they come together."""

import contextlib
import signal
import threading
import types

import jax
import pytest

from pipedec_jax.command_line import running
from pipedec_jax.command_line.running import lost
from pipedec_jax.hosts import group, watch
from pipedec_jax.hosts.group import Group, join


class Store:
    """A key-value store in memory, in place of the coordinator's."""

    def __init__(self):
        self.held, self.barriers = {}, []

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.held, "as the coordinator refuses it"
        self.held[key] = value

    def blocking_key_value_get(self, key, timeout_in_ms):
        assert timeout_in_ms == 600_000
        return self.held[key]

    def wait_at_barrier(self, name, timeout_in_ms):
        self.barriers.append(name)


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def member(monkeypatch, store):
    """A function that makes a process of a group of 2, whose watch does nothing by itself."""
    for work in ("_talk", "_judge"):
        monkeypatch.setattr(watch.Watch, work, lambda _: None)

    def make(index):
        for module in (group, watch):
            monkeypatch.setattr(module, "store", lambda: store)
            monkeypatch.setattr(module, "process_index", lambda: index)
            monkeypatch.setattr(module, "process_count", lambda: 2)
        return Group(30, 600)

    return make


def test_all_have_the_first_process_s_value(member, store):
    first, second = member(0), member(1)
    assert (first.leads, second.leads) == (True, False)
    assert first.share("stages", (1, 2)) == [1, 2]
    assert second.share("stages", (7,)) == [1, 2]


def test_whatever_differs_is_named_and_what_is_alike_is_waited_for(member, store):
    first, second = member(0), member(1)
    first.check_same("settings", {"seed": 0, "stop": ("a",), "width": 4})
    second.check_same("settings", {"seed": 0, "stop": ("a",), "width": 4})
    assert store.barriers == ["pipedec_jax/meet/1"] * 2, "nobody goes on before all have compared"
    message = "process 1 was started with seed 5 and not 0, width None and not 4, top_k 3 and not None as process 0"
    with pytest.raises(ValueError, match=message):
        second.check_same("settings", {"seed": 5, "stop": ("a",), "top_k": 3})


def test_of_much_that_differs_the_first_is_told_and_of_long_values_the_ends(member):
    first, second = member(0), member(1)
    first.check_same("settings", {"prompt": "a" * 9999, **{f"line {n}": "x" for n in range(2000)}})
    with pytest.raises(ValueError, match="line 3 'y' and not 'x', 1996 more as process 0: all need the same") as error:
        second.check_same("settings", {"prompt": "b" * 9999, **{f"line {n}": "y" for n in range(2000)}})
    assert len(str(error.value)) < 1000
    assert "bbb' and not 'aaa" in str(error.value)
    first.check_same("five", dict.fromkeys("abcde", 1))
    with pytest.raises(ValueError, match="d 2 and not 1, e 2 and not 1 as process 0"):
        second.check_same("five", dict.fromkeys("abcde", 2))
    first.check_same("six", dict.fromkeys("abcdef", 1))
    with pytest.raises(ValueError, match="e 2 and not 1, 1 more as process 0"):
        second.check_same("six", dict.fromkeys("abcdef", 2))


def test_processes_wait_for_each_other_after_weights_are_read_and_whenever_one_compiles(member, store):
    one = member(1)
    decoder = types.SimpleNamespace(preparing=None)
    decoder.prepare = lambda: store.barriers.append("read") or decoder
    one.prepare(decoder)
    assert store.barriers == ["read", "pipedec_jax/meet/1"]
    with decoder.preparing():
        store.barriers.append("compiled")
    assert store.barriers[2:] == ["compiled", "pipedec_jax/meet/2"]


def test_none_leaves_before_all_have_done_their_part(member, store, monkeypatch):
    one = member(0)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: store.barriers.append("shut down"))
    one.leave()
    assert store.barriers == ["pipedec_jax/meet/1", "shut down"]
    assert one._watch._over.is_set(), "nobody is watched any more"


def test_each_patience_is_that_of_its_own_waits_and_a_step_of_an_answer_is_one(member):
    one = member(1)
    assert (one._watch.patience, one._watch.start_patience) == (30, 600)

    def pieces():
        assert one._watch._doing == watch.DECODING
        yield "a piece"
        raise RuntimeError("reset by peer")

    steps = one.steps(pieces())
    assert next(steps) == "a piece"
    assert one._watch._doing == watch.BETWEEN, "what is done with a piece may last"
    with pytest.raises(watch.LostProcessError, match="reset by peer"):
        next(steps)


def test_one_that_stops_tells_why_and_ends_at_once(member, store, monkeypatch):
    """An ordinary exit would wait for the others at JAX's own barrier."""
    one, ended = member(1), []
    monkeypatch.setattr(group.os, "_exit", ended.append)
    one.stop("interrupted", 130)
    assert (store.held["pipedec_jax/stop/1"], ended) == ("interrupted", [130])


def test_what_another_has_said_explains_a_fault(member, store):
    one = member(1)
    store.key_value_dir_get = lambda key: [item for item in store.held.items() if item[0].startswith(key)]
    assert one.explain(RuntimeError("reset")) == "decoding failed, perhaps because another process is gone: reset"
    store.held["pipedec_jax/stop/0"] = "no memory"
    assert one.explain(RuntimeError("reset")) == "process 0 has stopped: no memory"


@pytest.mark.parametrize(
    ("error", "own"), [(KeyError("a fault of ours"), True), (RuntimeError("reset by peer"), False)]
)
def test_a_fault_of_this_program_is_told_with_its_place(member, monkeypatch, capsys, error, own):
    one = member(1)
    monkeypatch.setattr(one, "explain", str)
    monkeypatch.setattr(one, "stop", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        lost(one, error)
    assert ended.value.code == watch.STATUS
    shown = capsys.readouterr().err
    assert f"error: process 1 of 2: {error}\n" in shown
    assert (type(error).__name__ in shown) == own


@pytest.mark.usefixtures("heard")
def test_a_second_interrupt_does_not_stop_one_from_telling_of_the_first(member, monkeypatch, capsys):
    one, ended = member(1), []
    monkeypatch.setattr(one, "stop", lambda *why: signal.raise_signal(signal.SIGINT) or ended.append(why))
    monkeypatch.setattr(running, "join_others", lambda _: one)
    monkeypatch.setattr(running, "lost", lambda *_: signal.raise_signal(signal.SIGINT))
    for error in (KeyboardInterrupt, RuntimeError):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(running, "run", fail)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(SystemExit) as stopped:
            running.main([])
        assert stopped.value.code == 130
    assert ended == [("interrupted", 130)] * 2
    assert capsys.readouterr().err == "\ninterrupted\n" * 2


@pytest.fixture
def heard():
    """Ctrl-C reaches Python, also where these tests run in the background of a shell that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("error", [None, RuntimeError("refused")])
def test_the_alarm_for_those_that_do_not_come_ends_with_the_joining(monkeypatch, error):
    alarm, said = threading.Event(), {}

    def initialize(*arguments, **limits):
        assert not alarm.is_set()
        assert said.pop("message") == "process 0: not all processes have come to there:1"
        assert said == {"kept": True, "jax_enable_preemption_service": False}, "SIGTERM is not kept by JAX"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL, "Ctrl-C is not left to Python, which is not asked"
        said.update(limits, arguments=arguments)
        if error is not None:
            raise error

    monkeypatch.setattr(group, "_alarm", lambda _, message: said.update(message=message) or alarm)
    monkeypatch.setattr(group, "_keep_standard_output", lambda: said.update(kept=True))
    monkeypatch.setattr(jax.config, "update", lambda name, value: said.update({name: value}))
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    if error is None:
        assert join("there:1", 1, 0).count == 1
    else:
        with pytest.raises(ValueError, match="the processes did not come together at there:1: refused"):
            join("there:1", 1, 0)
    assert alarm.is_set()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert said["arguments"] == ("there:1", 1, 0)
    # Ours end a process first, with a word.
    assert said["initialization_timeout"] > group.START_PATIENCE
    assert said["heartbeat_timeout_seconds"] > group.PATIENCE


def test_patience_without_end_is_refused():
    for value in (float("inf"), float("nan"), 0.5, 1e9):
        with pytest.raises(ValueError, match=r"--patience must be 1 to 1,000,000 seconds, not"):
            join(patience=value)
    with pytest.raises(ValueError, match=r"--start-patience must be 1 to 1,000,000 seconds, not"):
        join(start_patience=0)
    assert join(patience=1, start_patience=1_000_000).count == 1


@pytest.mark.parametrize("where", ["ignored", "in a thread"])
def test_who_must_not_or_cannot_change_what_an_interrupt_does_joins_all_the_same(monkeypatch, where):
    found = []
    monkeypatch.setattr(group, "_keep_standard_output", lambda: None)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: found.append(signal.getsignal(signal.SIGINT)))
    monkeypatch.setattr(group, "_alarm", lambda *_: threading.Event())
    monkeypatch.setattr(group, "process_count", lambda: 2)
    monkeypatch.setattr(group, "Group", lambda *patience: found.append(patience))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if where == "ignored" else signal.default_int_handler)
    try:
        joining = threading.Thread(target=join, args=("there:1", 2, 0), kwargs={"patience": 3, "start_patience": 9})
        if where == "ignored":
            joining.run()
        else:
            joining.start()
            joining.join()
        expected = signal.SIG_IGN if where == "ignored" else signal.default_int_handler
        assert found == [expected, (3, 9)]
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_alarm_ends_the_process_with_a_word(monkeypatch, capfd):
    ended = []

    class AtOnce(threading.Thread):
        start = threading.Thread.run

    monkeypatch.setattr(group.threading, "Thread", AtOnce)
    monkeypatch.setattr(group.os, "_exit", ended.append)
    group._alarm(0, "process 1: not all processes have come")
    assert ended == [watch.STATUS]
    assert "error: process 1: not all processes have come within 0 s (--start-patience)" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("coordinator", "processes", "index", "message"),
    [
        ("[::1]:65535", 2, 1, None),
        (None, None, None, None),  # with hosts
        ("there:1", 2, -1, "--process-id must be 0 to 1 for --num-processes 2, not -1"),
        ("there:0", 2, 1, "--coordinator must be HOST:PORT"),
        ("there:65536", 2, 1, "--coordinator must be HOST:PORT"),
        ("there:²", 2, 1, "--coordinator must be HOST:PORT"),
    ],
)
def test_what_is_given_to_find_the_others_by_is_looked_at_first(coordinator, processes, index, message):
    refused = pytest.raises(ValueError, match=message) if message else contextlib.nullcontext()
    with refused:
        group._check_given(coordinator, processes, index, None if coordinator else "auto")
