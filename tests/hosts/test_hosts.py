"""Real processes over the loopback address: the tokens of one process, settings that differ, and a fault."""

import json
import signal
import time
from pathlib import Path

import pytest

from pipedec_jax.command_line.running import main
from pipedec_jax.hosts.faults import FAULTS, answers, job, read_answers, strike, write_prompts
from pipedec_jax.hosts.grid import cases, check, decode
from pipedec_jax.hosts.launch import finish, launch
from pipedec_jax.loading import demo_directory

SCRIPT = Path(__file__).parents[2] / "scripts" / "generate.py"


@pytest.fixture(scope="module")
def models(family):
    return ["--target", str(family["target"]), "--method", "pp", "--stages", "2", "--max-new-tokens", "12"]


def test_two_processes_go_on_with_the_answers_of_one(models, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('"for x in"\n{"prompt": ""}\n{"prompt": "x = 1", "temperature": 0.7}\n', encoding="utf-8")
    arguments = [*models, "--prompts", str(prompts), "--out", str(out)]
    main(arguments)
    header, *lines = out.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if '"error"' not in line]
    out.write_text(header + lines[0], encoding="utf-8")
    found = finish(launch(2, 1, arguments, script=SCRIPT), 600)
    assert [status for status, _, _ in found] == [0, 0], found
    assert found[0][1].startswith("3 prompts: 1 finished before, 1 answered, 1 bad; ")
    assert found[1][1] == "", "one process prints"
    again = [line for line in out.read_text(encoding="utf-8").splitlines(keepends=True)[1:] if '"error"' not in line]
    assert [tokens(line) for line in again] == [tokens(line) for line in kept]


def tokens(line):
    return json.loads(line)["line"], json.loads(line)["token_ids"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [*cases([(3, 1)]), *cases([(2, 2), (4, 1)], ["pp, tensor 2", "best-first, tensor 2"])],
    ids=lambda case: case.name,
)
def test_every_method_gives_one_process_s_tokens_on_several(case, tmp_path):
    expected = decode(case, 1, tmp_path / "one", SCRIPT, 24, 600)
    assert check(case, expected, tmp_path / "several", SCRIPT, 600).differing == 0


@pytest.mark.slow
def test_processes_find_each_other_as_slurm_starts_them(models, capsys):
    arguments = [*models, "--prompt", "for x in", "--json"]
    main(arguments)
    expected = json.loads(capsys.readouterr().out)
    found = finish(launch(2, 1, arguments, script=SCRIPT, slurm=True), 600)
    assert [status for status, _, _ in found] == [0, 0], found
    assert json.loads(found[0][1])["token_ids"] == expected["token_ids"]
    assert found[1][1] == "", "one process prints"


@pytest.mark.slow
def test_the_free_running_form_is_refused_on_several_processes():
    (case,) = cases([(2, 1)], ["pipespec"])
    arguments = [*(case.arguments or ()), "--form", "free", "--max-new-tokens", "4"]
    for status, output, errors in finish(launch(2, 1, arguments, script=SCRIPT), 600):
        assert status != 0
        assert output == ""
        assert "form free is for one process: several take the same steps, so use form lockstep" in errors


FREE_STAGES = """
import dataclasses, os, sys

import numpy as np

os.sched_getaffinity = lambda _: set(range(8))
from pipedec_jax.command_line.running import main
from pipedec_jax.decoding.hierarchy import HierarchyDecoder

measure = HierarchyDecoder._measure


def measured(decoder, models, stages):
    found = measure(decoder, models, stages)
    if found is None:
        return None
    print("measured", [sorted(times) for times in found.exchange], found.shared > 0, file=sys.stderr)
    return dataclasses.replace(
        found,
        seconds=({1: 0.01, 16: 0.01}, {1: 1.0, 16: 1.0}),
        plain=1.0,
        words=np.broadcast_to(found.words[-1], found.words.shape),
        exchange=tuple(dict.fromkeys(times, 0.0) for times in found.exchange),
        shared=0.0,
        dispatch=0.0,
    )


HierarchyDecoder._measure = measured
main()
"""
"""`generate.py` on a machine where stages cost nothing but their part of the passes, with a draft that is right."""


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (3, 1)])
def test_several_processes_choose_stages_over_all_devices_and_agree(processes, devices, family, tmp_path, capsys):
    asked = ["--prompt", "for x in", "--max-new-tokens", "24", "--json"]
    main([*asked, "--method", "pp", "--stages", "1", "--target", str(family["target"])])
    expected = json.loads(capsys.readouterr().out)["token_ids"]
    script = SCRIPT
    if devices > 1:
        (script := tmp_path / "free_stages.py").write_text(FREE_STAGES, encoding="utf-8")
    auto = ["--method", "pipespec", "--models", "auto", str(family["draft"]), str(family["target"])]
    found = finish(launch(processes, devices, [*asked, *auto, "--patience", "300"], script=script), 600)
    assert [status for status, _, _ in found] == [0] * processes, found
    answer = json.loads(found[0][1])
    assert answer["token_ids"] == expected
    # Of two models the target is in several parts: because it pays, or because each process has to have a device.
    draft, target = answer["stages_by_model"]
    assert target > 1
    assert processes <= draft + target <= processes * devices
    assert "exchange of target, ms a tick: of 2 stages" in "".join(answer["chosen"])
    if devices > 1:
        assert "measured [[], [2]] True" in found[0][2], "collectively: the draft has one layer"
    else:
        assert "bringing buffers to all processes: " in "".join(answer["chosen"])


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_after_a_fault_of_one_the_other_ends_and_the_job_goes_on(fault, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    write_prompts(prompts, 20)
    arguments = job(prompts, out, 24)
    seen = strike(fault, arguments, out, tmp_path, SCRIPT, 10, 180)
    assert seen.status != 0
    assert seen.message
    before = answers(out)
    assert [status for status, _, _ in finish(launch(2, 1, arguments, script=SCRIPT), 600)] == [0, 0]
    assert [line for line, _ in read_answers(out)] == list(range(1, 21))
    assert before < 20


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 3])
def test_an_interrupt_of_all_ends_all_with_what_was_committed(times):
    arguments = ["--target", str(demo_directory("draft")), "--method", "pp", "--stages", "2", "--max-new-tokens", "400"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started inherits it
    try:
        started = launch(2, 1, [*arguments, "--prompt", "for x in"], script=SCRIPT)
    finally:
        signal.signal(signal.SIGINT, before)
    shown = started[0].stdout.read(len("for x in") + 8)
    for _ in range(times):
        for process in started:
            process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    found = finish(started, 120)
    assert [status for status, _, _ in found] == [130, 130], found
    assert all("Traceback" not in errors and "interrupted" in errors for _, _, errors in found), found
    if times == 1:
        assert "ended by interrupted" in shown + found[0][1]
