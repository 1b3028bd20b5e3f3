"""A watchdog: ends this process, with the reason, when another one or the devices no longer move.

Every process tells the coordinator's key-value store about once a second that it is alive, what it is doing, and, when
it stops for a reason of its own, why. One thread does that and reads what the others tell; the calls may hang with the
coordinator, so a second thread judges, by this process's own clock alone. A collective that waits for a process that is
gone never returns, and Python cannot interrupt it: so the process is ended, not an exception raised.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Iterator

from pipedec_jax.hosts.processes import process_count, process_index, store

STATUS = 75
"""Exit status after a fault of another process: a failure that may not come again (EX_TEMPFAIL)."""
ROOT = "pipedec_jax"
"""Before every key in the store."""
PREPARING, DECODING, BETWEEN = "reading weights or compiling", "in a step of decoding", "between two steps"


class LostProcessError(RuntimeError):
    """The devices of several processes have failed in a step, most likely because one of the processes is gone."""


@dataclasses.dataclass
class _Peer:
    """What is known of another process."""

    count: int = -1
    """Of its last sign of life."""
    heard: float = 0.0
    """When that came, by this process's clock."""
    doing: str = PREPARING


class Watch:
    """Watches until `leave`.

    Args:
        patience: seconds of silence, or of a step on the devices, after which this process ends.
        start_patience: the same for reading weights and compiling.
        say: prints why this process ends.
        end: ends it with a status, at once: its main thread may never come back from the devices.
    """

    def __init__(
        self,
        patience: float,
        start_patience: float,
        *,
        say: Callable[[str], None] | None = None,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self.patience, self.start_patience = patience, start_patience
        self._store, self._index, self._count = store(), process_index(), process_count()
        self._say, self._end = say or _say, end
        self._every = min(1.0, patience / 10)
        now = time.monotonic()
        self._peers = {i: _Peer(heard=now) for i in range(self._count) if i != self._index}
        self._answered = now
        self._doing, self._since = PREPARING, now
        self._meetings = 0
        self._over = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._judge)]
        for thread in self._threads:
            thread.start()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """While this process waits for devices, and with them for all others: no longer than `patience`."""
        self._move(DECODING)
        try:
            yield
        except (ValueError, RuntimeError) as error:  # as a collective fails whose other end is gone
            raise LostProcessError(str(error)) from error
        finally:
            self._move(BETWEEN)

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """While this process reads or compiles, which may take long; at the end all wait for each other."""
        before = self._doing
        self._move(PREPARING)
        yield
        self.meet()
        self._move(before)

    def meet(self) -> None:
        """Wait until all processes are here."""
        self._meetings += 1  # every process meets the others as often
        self._store.wait_at_barrier(f"{ROOT}/meet/{self._meetings}", int(self.start_patience * 1000))

    def tell_stop(self, reason: str) -> None:
        """Tell the others that this process ends, and why, for no longer than a few seconds."""
        self._over.set()
        telling = threading.Thread(target=self._tell, args=(reason,), daemon=True)
        telling.start()  # the coordinator may be what hangs
        telling.join(3 * self._every)

    def _tell(self, reason: str) -> None:
        with contextlib.suppress(Exception):
            for kind in ("stop", "gone"):
                self._store.key_value_set(f"{ROOT}/{kind}/{self._index}", reason, allow_overwrite=True)
        if self._index == 0:  # the others' connection ends with this process, and with it their way to read the reason
            until = time.monotonic() + 3 * self._every
            while time.monotonic() < until and len(self._read("gone")) <= len(self._peers):
                time.sleep(self._every / 10)

    def reason(self) -> str | None:
        """Why another process has stopped, if one has said so."""
        for name, reason in self._read("stop"):
            if name != str(self._index):
                return f"process {name} has stopped: {reason}"
        return None

    def leave(self) -> None:
        """Watch no more."""
        self._over.set()

    def _move(self, doing: str) -> None:
        self._doing, self._since = doing, time.monotonic()

    def _read(self, kind: str) -> list[tuple[str, str]]:
        with contextlib.suppress(Exception):
            return [(key.rsplit("/", 1)[1], value) for key, value in self._store.key_value_dir_get(f"{ROOT}/{kind}/")]
        return []

    def _talk(self) -> None:
        """Tell and read until it is over. An error here is the coordinator's silence, for `_judge` to see."""
        beat = 0
        while not self._over.wait(self._every):
            beat += 1
            said = json.dumps([beat, self._doing])
            with contextlib.suppress(Exception):
                self._store.key_value_set(f"{ROOT}/alive/{self._index}", said, allow_overwrite=True)
                told = self._store.key_value_dir_get(f"{ROOT}/alive/")
                self._answered = time.monotonic()
                for key, value in told:
                    self._hear(int(key.rsplit("/", 1)[1]), *json.loads(value))
            reason = self.reason()
            # The first process prints: after Ctrl-C everywhere its main thread may come back, with what was committed.
            if reason is not None and not (self._index == 0 and self._over.wait(5 * self._every)):
                self._stop(reason)

    def _hear(self, index: int, count: int, doing: str) -> None:
        peer = self._peers.get(index)
        if peer is not None and count != peer.count:
            self._peers[index] = _Peer(count, time.monotonic(), doing)

    def _judge(self) -> None:
        woke = time.monotonic()
        while not self._over.wait(self._every):
            before, woke = woke, time.monotonic()
            if woke - before > self.patience / 2:
                self._overslept(woke)
            fault = self.fault(woke)
            if fault is not None:
                self._stop(fault)

    def _overslept(self, now: float) -> None:
        """This process itself was paused: how long it heard nothing says nothing of the others."""
        self._answered = self._since = now
        for peer in self._peers.values():
            peer.heard = now

    def fault(self, now: float) -> str | None:
        """What has lasted too long, if anything has."""
        if now - self._answered > self.patience:
            return (
                f"the coordinator (process 0) has not answered for {now - self._answered:.0f} s: it has died or hangs, "
                f"or the network is down {self._limit('--patience')}"
            )
        for index, peer in self._peers.items():
            if now - peer.heard > self.patience:
                return (
                    f"nothing was heard of process {index} for {now - peer.heard:.0f} s, it was {peer.doing}: it has "
                    f"died or hangs {self._limit('--patience')}"
                )
        still = now - self._since
        if self._doing == DECODING and still > self.patience:
            others = [index for index, peer in self._peers.items() if peer.doing != DECODING]
            who = (
                f"process {others[0]} is {self._peers[others[0]].doing}"
                if others
                else "another process, the devices or the network hangs"
            )
            return f"a step of decoding has not ended after {still:.0f} s: {who} {self._limit('--patience')}"
        if self._doing == PREPARING and still > self.start_patience:
            return f"{PREPARING} has taken {still:.0f} s {self._limit('--start-patience')}"
        return None

    def _limit(self, flag: str) -> str:
        value = self.patience if flag == "--patience" else self.start_patience
        return f"({flag} is {value:g} s)"

    def _stop(self, reason: str) -> None:
        if self._over.is_set():
            return
        self._over.set()
        self._say(f"process {self._index} of {self._count}: {reason}")
        self.tell_stop(reason)
        self._end(STATUS)


def _say(message: str) -> None:
    """Print an error; the main thread may hold what `print` takes."""
    with contextlib.suppress(OSError):
        os.write(2, f"\nerror: {message}\n".encode())
