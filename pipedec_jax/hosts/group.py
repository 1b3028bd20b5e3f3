"""The processes that decode together, as one of them sees them; a process on its own is a group too."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from pipedec_jax.hosts.processes import process_count, process_index, store
from pipedec_jax.hosts.watch import ROOT, STATUS, Watch

PATIENCE = 30.0
"""Seconds of silence, or of a step on the devices, after which a process takes another for gone."""
START_PATIENCE = 600.0
"""Seconds that the processes wait for each other at start, and to read weights and compile."""
LONGEST = 1_000_000
"""Most seconds of either: JAX counts them, and milliseconds, in 32 bits."""
TOLD = 5
"""Most facts that are told of those that differ: of two files of prompts all may."""


class Alone:
    """A process on its own: nobody to wait for."""

    index, count = 0, 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.index == 0

    def preparing(self) -> contextlib.AbstractContextManager[None]:
        """Around reading weights and compiling: at its end, the processes wait for each other."""
        return contextlib.nullcontext()

    def step(self) -> contextlib.AbstractContextManager[None]:
        """Around what waits for the devices."""
        return contextlib.nullcontext()

    def prepare(self, decoder: Any) -> None:
        """Read a decoder's weights; from then on whatever it compiles, all processes wait for before they go on."""
        decoder.prepare()

    def steps(self, pieces: Iterable[Any]) -> Iterator[Any]:
        """The items of an iterator whose every step waits for the devices."""
        iterator = iter(pieces)
        while True:
            with self.step():
                piece = next(iterator, None)
            if piece is None:
                return
            yield piece

    def share(self, name: str, value: Any) -> Any:  # noqa: ARG002
        """The first process's value of this name, which is JSON-ready; a name is used once."""
        return value

    def check_same(self, name: str, facts: dict[str, Any]) -> None:
        """Compare what all processes must have alike, with the first process's; a name is used once.

        Raises:
            ValueError: where this one has something else.
        """

    def stop(self, reason: str, status: int) -> None:
        """This process ends early: the others are told why, and end too."""

    def leave(self) -> None:
        """This process has done all, as have the others."""


class Group(Alone):
    """One of several processes. `join` makes it.

    Args:
        patience: see `PATIENCE`.
        start_patience: see `START_PATIENCE`.
    """

    def __init__(self, patience: float, start_patience: float) -> None:
        self.index, self.count = process_index(), process_count()
        self._wait_ms = int(start_patience * 1000)
        self._watch = Watch(patience, start_patience)

    def preparing(self) -> contextlib.AbstractContextManager[None]:
        """As for `Alone`."""
        return self._watch.preparing()

    def step(self) -> contextlib.AbstractContextManager[None]:
        """As for `Alone`."""
        return self._watch.step()

    def prepare(self, decoder: Any) -> None:
        """As for `Alone`."""
        with self.preparing():
            decoder.prepare().preparing = self.preparing

    def share(self, name: str, value: Any) -> Any:
        """As for `Alone`."""
        key = f"{ROOT}/share/{name}"
        if self.leads:
            text = json.dumps(value)
            store().key_value_set(key, text)
            return json.loads(text)  # as the others get it: tuples become lists
        return json.loads(store().blocking_key_value_get(key, self._wait_ms))

    def check_same(self, name: str, facts: dict[str, Any]) -> None:
        """As for `Alone`."""
        # As the first process's come.
        first, mine = self.share(name, facts), json.loads(json.dumps(facts))
        differing = [key for key in {**first, **mine} if first.get(key) != mine.get(key)]
        if differing:
            told = [f"{key} {_brief(mine.get(key))} and not {_brief(first.get(key))}" for key in differing[:TOLD]]
            what = ", ".join([*told, *([f"{len(differing) - TOLD} more"] if len(differing) > TOLD else [])])
            raise ValueError(f"process {self.index} was started with {what} as process 0: all need the same")
        self._watch.meet()

    def stop(self, reason: str, status: int) -> None:
        """As for `Alone`; does not return."""
        self._watch.tell_stop(reason)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # an ordinary exit would wait for the others at JAX's own barrier

    def leave(self) -> None:
        """As for `Alone`."""
        self._watch.meet()
        self._watch.leave()
        jax.distributed.shutdown()

    def explain(self, error: BaseException) -> str:
        """Why decoding has failed here, as far as the others have said or the error tells."""
        return self._watch.reason() or f"decoding failed, perhaps because another process is gone: {error}"


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    index: int | None = None,
    *,
    hosts: str | None = None,
    patience: float = PATIENCE,
    start_patience: float = START_PATIENCE,
) -> Alone:
    """Join the other processes of this program, if there are to be any. Before JAX has looked at its devices.

    Args:
        coordinator: address and port at which the first process listens.
        processes: how many there are (P).
        index: this one's number, from 0.
        hosts: in place of these three, how JAX finds them: `auto`, or one of its methods, such as `slurm`.
        patience: seconds of silence, or of a step on the devices, after which this process ends.
        start_patience: seconds to wait for the others, and for reading weights and compiling.

    Raises:
        ValueError: when what is given does not suffice, or no cluster is found.
    """
    for name, value in (("--patience", patience), ("--start-patience", start_patience)):
        if not 1 <= value <= LONGEST:
            raise ValueError(f"{name} must be 1 to {LONGEST:,} seconds, not {value}")
    if all(value is None for value in (coordinator, processes, index, hosts)):
        return Alone()
    _check_given(coordinator, processes, index, hosts)
    # JAX would keep SIGTERM to itself, as news that this machine is taken away; here it ends the process.
    jax.config.update("jax_enable_preemption_service", False)
    _keep_standard_output()
    place = "" if coordinator is None else f" to {coordinator}"  # which may be what is wrong
    late = _alarm(start_patience, f"process {'?' if index is None else index}: not all processes have come{place}")
    try:
        with _interrupts_at_once():
            jax.distributed.initialize(
                coordinator,
                processes,
                index,
                cluster_detection_method=None if hosts in (None, "auto") else hosts,
                # JAX's own limits end a process without a word of ours: they stand behind `Watch`'s and `_alarm`'s.
                initialization_timeout=int(start_patience + 60),
                heartbeat_timeout_seconds=int(patience + 25),
                shutdown_timeout_seconds=int(patience),
            )
    except (ValueError, TypeError, RuntimeError) as error:
        if coordinator is not None:
            raise ValueError(f"the processes did not come together at {coordinator}: {error}") from error
        raise ValueError(
            f"--hosts {hosts} found no cluster ({error}): give --coordinator, --num-processes and --process-id"
        ) from error
    finally:
        late.set()
    return Group(patience, start_patience) if process_count() > 1 else Alone()


def _check_given(coordinator: str | None, processes: int | None, index: int | None, hosts: str | None) -> None:
    """Raise `ValueError` unless what `join` is given suffices to find the others."""
    given = {"--coordinator": coordinator, "--num-processes": processes, "--process-id": index}
    missing = [name for name, value in given.items() if value is None]
    if hosts is not None and len(missing) < len(given):
        raise ValueError("--hosts finds the processes by itself: leave --coordinator and the numbers out")
    if hosts is None and missing:
        raise ValueError(f"{' and '.join(missing)} must be given too, or --hosts auto alone")
    if processes is not None and processes < 1:
        raise ValueError(f"--num-processes must be at least 1, not {processes}")
    if processes is not None and not 0 <= (index or 0) < processes:
        raise ValueError(f"--process-id must be 0 to {processes - 1} for --num-processes {processes}, not {index}")
    if coordinator is not None:
        port = coordinator.rpartition(":")[2]
        if not (port.isdecimal() and 1 <= int(port) < 2**16):
            raise ValueError(f"--coordinator must be HOST:PORT, with a port from 1 to 65535, not {coordinator!r}")


def _brief(value: Any) -> str:
    """A value as text, without the middle where it is long, as prompts may be."""
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:140]} ... {text[-140:]}"


def _alarm(seconds: float, message: str) -> threading.Event:
    """End this process after so many seconds, unless the event is set before."""
    done = threading.Event()

    def wait() -> None:
        if not done.wait(seconds):
            os.write(2, f"error: {message} within {seconds:g} s (--start-patience); start all of them\n".encode())
            os._exit(STATUS)

    threading.Thread(target=wait, daemon=True).start()
    return done


@contextlib.contextmanager
def _interrupts_at_once() -> Iterator[None]:
    """Ctrl-C ends this process: while JAX waits for the others, Python would see it only when they have come."""
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, None) or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _keep_standard_output() -> None:
    """Leave standard output to Python: the collectives' library writes to file 1 how it connects, which goes to 2."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, closefd=True)
