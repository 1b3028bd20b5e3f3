"""Virtual CPU devices, each case in a process of its own because JAX counts its devices once."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from pipedec_jax.decoding import devices
from tests.conftest import DEVICES


def python(program: str, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    environment = {**clean, "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run(
        [sys.executable, "-c", f"import jax\nfrom pipedec_jax.decoding.devices import *\n{program}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_cpu_shows_as_many_devices_as_are_needed():
    assert python("print(len(pick_devices(5)), jax.device_count())") == "5 5"


def test_what_the_user_asked_for_is_not_made_smaller():
    flags = "--xla_force_host_platform_device_count=6"
    assert python("print(len(pick_devices(3)), jax.device_count())", XLA_FLAGS=flags) == "3 6"
    assert python("use_cpu_devices(7); print(len(pick_devices(3)), jax.device_count())") == "3 7"


@pytest.mark.parametrize("count", [0, -1, 2.5, "3", True, None])
def test_a_number_of_devices_that_is_none_is_refused(count):
    with pytest.raises(ValueError, match="count must be a whole number of at least 1, not"):
        devices.use_cpu_devices(count)


def test_when_jax_has_started_the_error_says_what_to_do():
    program = """
jax.devices()
try:
    pick_devices(4)
except ValueError as error:
    print(error)
try:
    use_cpu_devices(4)
except RuntimeError as error:
    print(error)
"""
    first, second = python(program).splitlines()
    assert first.startswith("4 devices are needed (see stages) but there are 1 (cpu): use fewer stages, or call")
    assert "JAX has already started" in second
    for line in (first, second):
        assert "pipedec_jax.use_cpu_devices(4)" in line
        assert "XLA_FLAGS=--xla_force_host_platform_device_count=4" in line


@pytest.mark.parametrize(
    ("error", "words"), [(AssertionError(), r"as cpu$"), (RuntimeError("no bogus"), r"\(no bogus\)$")]
)
def test_platforms_that_are_not_there_are_named(monkeypatch, error, words):
    def start():
        raise error

    monkeypatch.setattr(jax, "devices", start)
    with pytest.raises(ValueError, match=r"JAX cannot start .* \(JAX_PLATFORMS=.*\): leave it unset, .*" + words):
        devices.pick_devices(1)


def test_enough_accelerators_are_used_and_too_few_are_not(monkeypatch):
    class Accelerator:
        platform = "gpu"

    cpus, accelerators = jax.devices("cpu"), [Accelerator(), Accelerator()]
    monkeypatch.setattr(jax, "devices", lambda platform=None: cpus if platform == "cpu" else accelerators)
    assert devices.pick_devices(2) == accelerators
    with pytest.warns(UserWarning, match="decoding on virtual CPU devices: 3 are needed and there are 2 of gpu"):
        assert devices.pick_devices(3) == cpus[:3]
    with pytest.raises(ValueError, match=r"3 devices are needed .* there are 2 \(gpu\): .* set JAX_PLATFORMS=cpu"):
        devices.pick_devices(3, weights=devices.MOST_ON_CPU + 1)
    assert devices.pick_devices(2, weights=devices.MOST_ON_CPU + 1) == accelerators
    with pytest.raises(ValueError, match=rf"{DEVICES + 1} devices are needed .* there are 2 \(gpu\)"):
        devices.pick_devices(DEVICES + 1)

    def without_cpus(platform=None):
        if platform == "cpu":
            raise RuntimeError("Unknown backend cpu")
        return accelerators

    monkeypatch.setattr(jax, "devices", without_cpus)
    with pytest.raises(ValueError, match=r"3 devices are needed .* there are 2 \(gpu\)"):
        devices.pick_devices(3)


class Device:
    platform = "gpu"

    def __init__(self, process_index, number):
        self.process_index, self.number = process_index, number


def spread(monkeypatch, processes, each, ranks, parts=1):
    """Ranks of each process, in order; without a number of devices each shows as many as it is asked for."""
    shown = [each]

    def held():
        return [Device(process, number) for process in range(processes) for number in range(shown[-1])]

    monkeypatch.setattr(jax, "devices", held)
    monkeypatch.setattr(devices, "process_count", lambda: processes)
    monkeypatch.setattr(devices, "use_cpu_devices", lambda count: shown.append(each or count))
    chosen = devices.pick_devices(ranks, parts)
    assert chosen == sorted(chosen, key=lambda device: (device.process_index, device.number))
    return [sum(device.process_index == process for device in chosen) for process in range(processes)]


def test_ranks_are_spread_evenly_over_processes(monkeypatch):
    assert spread(monkeypatch, 2, 2, 3) == [2, 1]
    assert spread(monkeypatch, 4, 4, 5) == [2, 1, 1, 1]
    assert spread(monkeypatch, 2, 4, 3, parts=2) == [4, 2]
    with pytest.raises(ValueError, match=r"there are 4 processes for 3 ranks .* each needs a device at least"):
        spread(monkeypatch, 4, 4, 3)
    # A process for each device, or devices that are no whole number of ranks: ranks lie across processes.
    assert spread(monkeypatch, 4, 1, 2, parts=2) == [1, 1, 1, 1]
    assert spread(monkeypatch, 2, 1, 1, parts=2) == [1, 1]
    assert spread(monkeypatch, 2, 3, 3, parts=2) == [3, 3]
    assert spread(monkeypatch, 4, 4, 3, parts=2) == [2, 2, 1, 1]


def test_no_process_is_given_more_than_it_has_or_nothing(monkeypatch):
    """Processes whose machines have different numbers of devices."""
    monkeypatch.setattr(devices, "use_cpu_devices", lambda _: None)
    monkeypatch.setattr(devices, "process_count", lambda: 2)
    for held, ranks, parts, expected in (((1, 3), 4, 1, [1, 3]), ((4, 1), 2, 2, [3, 1])):
        shown = [Device(process, number) for process, count in enumerate(held) for number in range(count)]
        monkeypatch.setattr(jax, "devices", lambda shown=shown: shown)
        chosen = devices.pick_devices(ranks, parts)
        assert [sum(device.process_index == process for device in chosen) for process in range(2)] == expected


def test_every_process_shows_cpu_devices_for_its_share_of_whole_ranks(monkeypatch):
    assert spread(monkeypatch, 2, None, 3, parts=2) == [4, 2]
    assert spread(monkeypatch, 4, None, 5) == [2, 1, 1, 1]
    assert spread(monkeypatch, 4, None, 2, parts=2) == [1, 1, 1, 1], "fewer ranks than processes"
    assert spread(monkeypatch, 2, None, 1, parts=3) == [2, 1], "nor a whole number of devices for each"


def test_several_processes_that_look_for_room_take_all_devices_and_at_least_one_of_each(monkeypatch):
    held = [Device(process, number) for number in range(2) for process in range(3)]
    monkeypatch.setattr(jax, "devices", lambda: held)
    monkeypatch.setattr(devices, "process_count", lambda: 3)
    monkeypatch.setattr(devices, "use_cpu_devices", lambda _: None)
    found = [(device.process_index, device.number) for device in devices.pick_room(2)]
    assert found == [(process, number) for process in range(3) for number in range(2)]


def test_one_process_that_looks_for_room_takes_all_accelerators_or_as_many_cpu_devices_as_cores(monkeypatch):
    cpus, accelerators, asked = jax.devices("cpu"), [Device(0, number) for number in range(4)], []
    monkeypatch.setattr(devices, "use_cpu_devices", asked.append)
    monkeypatch.setattr(jax, "devices", lambda: cpus)
    for cores, ranks, count in ((3, 2, 3), (3, 5, 5), (99, 2, DEVICES)):
        monkeypatch.setattr(devices, "usable_cores", lambda cores=cores: cores)
        asked.clear()
        assert devices.pick_room(ranks) == cpus[:count]
        assert asked[0] == max(cores, ranks)
    monkeypatch.setattr(jax, "devices", lambda platform=None: cpus if platform == "cpu" else accelerators)
    assert devices.pick_room(2) == accelerators
    with pytest.warns(UserWarning, match="5 are needed and there are 4 of gpu"):
        assert devices.pick_room(5) == cpus[:5]


def test_cpu_devices_work_at_the_same_time_where_there_are_cores(monkeypatch):
    for cores, count, expected in ((64, 3, 3), (2, 3, 2)):
        monkeypatch.setattr(devices, "usable_cores", lambda cores=cores: cores)
        assert devices.room(jax.devices("cpu")[:count]) == expected
        assert devices.room([Device(0, number) for number in range(count)]) == count, "accelerators all"
    monkeypatch.setattr(devices, "process_count", lambda: 2)
    monkeypatch.setattr(devices, "cores_in_all", len)
    assert devices.room(jax.devices("cpu")[:5]) == 5, "of all processes"


def test_of_devices_that_are_given_the_first_are_taken_in_a_list_or_an_array():
    given = jax.devices("cpu")[:3]
    assert devices.check_devices([*given, given[0]], 3) == given, "what is given twice beyond them does not matter"
    assert devices.check_devices(np.asarray(given), 2) == given[:2]


def test_of_several_flags_the_last_counts(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"{devices._FLAG}=2 --other=9 {devices._FLAG}=6")
    assert devices._flag_count() == 6
    monkeypatch.delenv("XLA_FLAGS")
    assert devices._flag_count() == 1


def test_by_default_cpus_decode_in_float32_and_others_in_the_stored_dtype():
    cpu, accelerator = jax.devices("cpu")[0], Device(0, 0)
    for stored in ("bfloat16", "float16", "float32"):
        assert devices.decoding_dtype(None, stored, cpu) == "float32"
        assert devices.decoding_dtype(None, stored, accelerator).name == stored
        assert devices.decoding_dtype("bfloat16", stored, cpu).name == "bfloat16"
