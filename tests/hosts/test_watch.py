"""The watchdog's judgement, by a clock that the test moves, and what processes tell each other."""

import json
import time

import pytest

from pipedec_jax.hosts import watch
from pipedec_jax.hosts.watch import LostProcessError, Watch

TALK, JUDGE = Watch._talk, Watch._judge
"""What the threads do, to be done here beat by beat."""


class Store:
    """A key-value store in memory, in place of the coordinator's."""

    def __init__(self):
        self.held, self.barriers = {}, []

    def key_value_set(self, key, value, allow_overwrite=False):
        self.held[key] = value

    def key_value_dir_get(self, key):
        return [(name, value) for name, value in self.held.items() if name.startswith(key)]

    def wait_at_barrier(self, name, timeout_in_ms):
        assert timeout_in_ms == 600_000
        self.barriers.append(name)


class Beats:
    """An event that lets so many waits pass before it is set; they take their time by a clock, if one is given."""

    def __init__(self, count, clock=None):
        self.left, self.clock = count, clock

    def wait(self, seconds):
        self.left -= 1
        if self.clock is not None:
            self.clock.now += seconds
        return self.left < 0

    def is_set(self):
        return self.left < 0

    def set(self):
        self.left = 0


class Clock:
    """Time that passes in naps, and by as much as is said with every look at it; calls at some naps."""

    def __init__(self, step=0.0, at=()):
        self.now, self.naps, self.step, self.at = 0.0, 0, step, dict(at)

    def monotonic(self):
        self.now += self.step
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.naps += 1
        self.at.get(self.naps, lambda: None)()


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def watched(monkeypatch, store):
    """A watch of process 1 of 3 whose own threads do nothing; what it ended with."""
    monkeypatch.setattr(watch, "store", lambda: store)
    monkeypatch.setattr(watch, "process_index", lambda: 1)
    monkeypatch.setattr(watch, "process_count", lambda: 3)
    for work in ("_talk", "_judge"):
        monkeypatch.setattr(Watch, work, lambda _: None)
    ended = []
    return Watch(30, 600, say=ended.append, end=ended.append), ended


def hear(one, now, *, peers=(0, 2), answered=True):
    """As if the coordinator had answered, and some peers had told something, at that time."""
    if answered:
        one._answered = now
    for peer in peers:
        one._peers[peer].heard = now


def test_silence_is_a_fault_after_the_patience_and_names_who_is_silent(watched):
    one, _ = watched
    now = time.monotonic()
    hear(one, now)
    assert one.fault(now + 29) is None
    hear(one, now + 40, peers=(0,))
    assert "nothing was heard of process 2 for 40 s" in one.fault(now + 40)
    hear(one, now + 40)
    assert one.fault(now + 40) is None
    hear(one, now + 75, answered=False)
    assert "the coordinator (process 0) has not answered for 35 s" in one.fault(now + 75)
    assert "(--patience is 30 s)" in one.fault(now + 75)


def test_a_step_has_the_patience_and_preparing_more_of_it(watched, store):
    one, _ = watched
    for peer in (0, 2):
        one._hear(peer, 6, watch.DECODING)
    with one.step():
        now = time.monotonic()
        hear(one, now + 31)
        assert (
            "a step of decoding has not ended after 31 s: another process, the devices or the network hangs"
            in one.fault(now + 31)
        )
        one._hear(2, 7, "between two steps")
        hear(one, now + 31)
        assert "process 2 is between two steps" in one.fault(now + 31)
        with one.preparing():
            hear(one, now + 400)
            assert one.fault(now + 400) is None
            hear(one, now + 650)
            assert "--start-patience is 600 s" in one.fault(now + 650)
        assert store.barriers == ["pipedec_jax/meet/1"]
        hear(one, now + 700)
        assert "a step of decoding has not ended" in one.fault(now + 700), "prepared, it is in the step again"
        one.meet()
        assert store.barriers[1:] == ["pipedec_jax/meet/2"], "a barrier serves once"
    hear(one, now + 900)
    assert one.fault(now + 900) is None, "what is between two steps is bounded by the others' steps"


def test_a_pause_of_the_process_itself_is_nobody_else_s_fault(watched):
    one, _ = watched
    with one.step():
        later = time.monotonic() + 100
        assert one.fault(later) is not None
        one._overslept(later)
        assert one.fault(later) is None


def test_a_sign_of_life_counts_once(watched):
    one, _ = watched
    one._hear(0, 3, "between two steps")
    heard = one._peers[0].heard
    one._hear(0, 3, "between two steps")
    assert one._peers[0].heard == heard
    one._hear(1, 9, "its own")


def test_what_another_process_says_ends_this_one_with_its_reason(watched, store):
    one, ended = watched
    assert one.reason() is None
    store.held["pipedec_jax/stop/2"] = "interrupted"
    assert one.reason() == "process 2 has stopped: interrupted"
    one._stop(one.reason())
    one._stop("a second reason")
    assert ended == ["process 1 of 3: process 2 has stopped: interrupted", watch.STATUS]
    assert "pipedec_jax/gone/1" in store.held


def test_every_beat_tells_that_one_lives_and_hears_the_others(watched, store):
    one, ended = watched
    store.held["pipedec_jax/alive/2"] = json.dumps([4, watch.DECODING])
    one._answered, one._over = 0.0, Beats(2)
    TALK(one)
    assert json.loads(store.held["pipedec_jax/alive/1"]) == [2, watch.PREPARING]
    assert (one._peers[2].count, one._peers[2].doing) == (4, watch.DECODING)
    assert one._answered > 0
    assert not ended
    store.held["pipedec_jax/stop/0"] = "interrupted"
    one._over = Beats(5)
    TALK(one)
    assert ended == ["process 1 of 3: process 0 has stopped: interrupted", watch.STATUS]


def test_the_first_process_may_end_in_its_own_way_when_another_has_stopped(watched, store):
    one, ended = watched
    one._index, clock = 0, Clock()
    store.held["pipedec_jax/stop/2"] = "interrupted"
    one._over = Beats(1, clock)  # set while it waits
    TALK(one)
    assert not ended
    one._over, before = Beats(2, clock), clock.now
    TALK(one)
    assert 1 < clock.now - before < one.patience / 2
    assert ended == ["process 0 of 3: process 2 has stopped: interrupted", watch.STATUS]


def test_an_error_of_the_coordinator_is_its_silence(watched, store):
    one, ended = watched

    def fail(*_):
        raise RuntimeError("unavailable")

    one._answered, one._over, store.key_value_dir_get = 0.0, Beats(2), fail
    TALK(one)
    assert one._answered == 0.0
    assert not ended


def test_what_lasts_too_long_ends_the_process(watched, monkeypatch):
    one, ended = watched
    one._over = Beats(3)
    JUDGE(one)
    assert not ended
    one._answered -= 31
    one._over = Beats(3)
    JUDGE(one)
    assert len(ended) == 2
    assert "the coordinator (process 0) has not answered for 31 s" in ended[0]
    assert ended[1] == watch.STATUS


@pytest.mark.parametrize("nap", [16, 40])
def test_a_process_that_wakes_late_judges_nobody_by_that(watched, monkeypatch, nap):
    """Nor one that was away for less than its patience: what it heard before may be old already."""
    one, ended = watched
    clock = Clock(step=nap)
    monkeypatch.setattr(watch, "time", clock)
    hear(one, 0.0)
    one._over = Beats(1)
    JUDGE(one)
    assert clock.now == 2 * nap > one.patience
    assert not ended


@pytest.mark.parametrize("patience", [1, 30])
def test_both_threads_work_often_enough_for_the_patience_and_not_all_the_time(watched, monkeypatch, patience):
    started, ended, clock = [], [], Clock()
    for work in ("_talk", "_judge"):
        monkeypatch.setattr(Watch, work, lambda _, work=work: started.append(work))
    monkeypatch.setattr(watch, "time", clock)
    one = Watch(patience, 600, say=ended.append, end=ended.append)
    for thread in one._threads:
        thread.join()
    assert sorted(started) == ["_judge", "_talk"]
    for work in (TALK, JUDGE):
        before, one._over = clock.now, Beats(3, clock)
        work(one)
        assert 0 < (clock.now - before) / 4 <= min(1, patience / 10)
    assert not ended
    one._answered, one._over = clock.now, Beats(40, clock)
    JUDGE(one)
    assert "nothing was heard of process 0" in ended[0], "no beat is so long that it seems to be a pause"


def test_the_coordinator_stays_until_the_others_know_why_it_stops(watched, store, monkeypatch):
    one, _ = watched
    know = {
        nap: lambda peer=peer: store.held.update({f"pipedec_jax/gone/{peer}": ""}) for nap, peer in ((2, 1), (4, 2))
    }
    for index, at, naps in ((0, know, 4), (0, {}, 30), (1, {}, 0)):
        store.held.clear()
        one._index, clock = index, Clock(at=at)
        monkeypatch.setattr(watch, "time", clock)
        one._tell("no memory")
        assert naps <= clock.naps <= naps + 1, "no longer than three beats"
        assert store.held[f"pipedec_jax/stop/{index}"] == "no memory"


def test_one_that_stops_says_why(watched, store):
    one, ended = watched
    one.tell_stop("no memory")
    assert store.held["pipedec_jax/stop/1"] == "no memory"
    assert one.reason() is None, "its own reason is not another's"
    one._stop("too late")
    assert not ended


def test_telling_why_one_stops_is_waited_for_but_not_for_long(watched, store, monkeypatch):
    one, _ = watched
    waited = []

    class Telling:
        def __init__(self, target, args, daemon):
            assert daemon, "a coordinator that hangs keeps no process"
            self.tell = lambda: target(*args)

        def start(self):
            pass

        def join(self, timeout=float("inf")):
            waited.append(timeout)
            self.tell()

    monkeypatch.setattr(watch.threading, "Thread", Telling)
    one.tell_stop("no memory")
    assert store.held["pipedec_jax/stop/1"] == "no memory"
    assert len(waited) == 1
    assert waited[0] <= 5


def test_a_fault_is_said_once_on_standard_error_and_ends_the_process_where_nobody_reads_that(
    watched, monkeypatch, capfd
):
    one, ended = watched

    def said(message):
        watch._say(message)
        one._stop("what the other thread finds meanwhile")

    one._say = said
    one._stop("no memory")
    assert capfd.readouterr() == ("", "\nerror: process 1 of 3: no memory\n")
    assert ended == [watch.STATUS]

    def closed(*_):
        raise OSError

    monkeypatch.setattr(watch.os, "write", closed)
    watch._say("no memory")


def test_errors_of_the_devices_in_a_step_are_those_of_a_lost_process(watched):
    one, _ = watched
    for kind in (ValueError, RuntimeError):
        with pytest.raises(LostProcessError, match="Gloo"), one.step():
            raise kind("Gloo all-reduce failed")
    with pytest.raises(FloatingPointError), one.step():
        raise FloatingPointError("not finite")
    assert json.dumps(one._doing) == '"between two steps"'
