"""Virtual CPU devices, each case in a process of its own because JAX counts its devices once."""

import os
import subprocess
import sys

import jax
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
    with pytest.raises(ValueError, match=rf"{DEVICES + 1} devices are needed .* there are 2 \(gpu\)"):
        devices.pick_devices(DEVICES + 1)


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


def test_every_process_shows_cpu_devices_for_its_share_of_whole_ranks(monkeypatch):
    assert spread(monkeypatch, 2, None, 3, parts=2) == [4, 2]
    assert spread(monkeypatch, 4, None, 5) == [2, 1, 1, 1]
    assert spread(monkeypatch, 4, None, 2, parts=2) == [1, 1, 1, 1], "fewer ranks than processes"


def test_several_processes_that_look_for_room_take_all_devices_and_at_least_one_of_each(monkeypatch):
    held = [Device(process, number) for number in range(2) for process in range(3)]
    monkeypatch.setattr(jax, "devices", lambda: held)
    monkeypatch.setattr(devices, "process_count", lambda: 3)
    monkeypatch.setattr(devices, "use_cpu_devices", lambda _: None)
    found = [(device.process_index, device.number) for device in devices.pick_room(2)]
    assert found == [(process, number) for process in range(3) for number in range(2)]


def test_cpu_devices_work_at_the_same_time_where_there_are_cores(monkeypatch):
    for cores, count, expected in ((64, 3, 3), (2, 3, 2)):
        monkeypatch.setattr(devices, "usable_cores", lambda cores=cores: cores)
        assert devices.room(jax.devices("cpu")[:count]) == expected
        assert devices.room([Device(0, number) for number in range(count)]) == count, "accelerators all"


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
