"""scripts/plan.py: what it says, and what it refuses."""

import dataclasses
import json
import math
import shutil

import pytest

import plan as script
from tests.analysis.planning import CONFIGS, TINY
from tests.conftest import write_byte_level

BASIC = [
    "--target",
    str(CONFIGS / "llama-3.1-8b.json"),
    "--draft",
    str(CONFIGS / "llama-3.2-1b.json"),
    "--devices",
    "5",
]
ROOFLINE = ["--bandwidth", "900", "--peak", "150"]


def test_the_script_says_what_it_predicts_and_from_what(capsys):
    assert script.main([*BASIC, *ROOFLINE, "--memory", "12", "--link-bandwidth", "1", "--link-latency", "50"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("PREDICTED, nothing here was measured as a whole. 5 devices, bfloat16, 4096 tokens.")
    assert "a roofline of 900 GB/s and 150 TFLOP/s" in said
    assert "links: 1 GB/s and 50 us" in said
    assert "demo_hit_curve.json: simulated, the demo family" in said
    assert "does not fit: one device needs at least 16.6 GB a device, of 12" in said
    assert "would choose: best-first, drafter both, 4 stages, width" in said
    assert "it wins: " in said


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "JSON"])
def test_the_status_is_1_where_nothing_fits(capsys, form):
    assert script.main([*BASIC, *ROOFLINE, "--memory", "0.001", *form]) == 1
    assert "nothing fits" in capsys.readouterr().out


def test_a_pair_of_models_may_differ_in_padded_rows_but_not_in_tokens(family, tmp_path):
    target, draft = str(family["target"]), shutil.copytree(family["draft"], tmp_path / "draft")
    found, other = script.pair(target, str(draft))
    assert other.vocab_size > found.vocab_size
    write_byte_level(draft, extra=("<|extra|>",))
    with pytest.raises(ValueError, match="must have the same tokens"):
        script.pair(target, str(draft))


TIMES = {"layer": {"1": 0.001, "8": 0.002}, "head": 0.002, "draft": 0.001}


def test_a_calibration_that_names_no_models_is_refused(capsys, tmp_path):
    (tmp_path / "times.json").write_text(json.dumps(TIMES))
    with pytest.raises(SystemExit):
        script.main([*BASIC, "--calibration", str(tmp_path / "times.json")])
    assert "does not say of which models it was measured" in capsys.readouterr().err


def test_json_holds_the_same(capsys, tmp_path):
    (tmp_path / "times.json").write_text(json.dumps(TIMES | {"measured": {"dtype": "bfloat16"}}))
    script.main([*BASIC, "--calibration", str(tmp_path / "times.json"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "predicted"
    assert any("times: measured by parts on one machine" in line for line in found["from"])
    assert found["chosen"]["seconds"] == min(x["seconds"] for x in found["methods"])
    assert found["methods"][0]["method"] == "pp"
    assert all(math.isfinite(x["seconds"]) for x in found["methods"] + found["alternatives"])
    assert all(x["bytes"] == sum(x["memory"].values()) for x in found["methods"])
    # PP by hand: 32 layers, the head's fifth, five hops with three sums over 25 GB/s links of 10 us.
    assert found["methods"][0]["seconds"] == pytest.approx(0.0324 + 5 * 4e-5, rel=0.001)
    assert found["verdict"][0].startswith(("would choose", "does not fit"))


def test_without_a_context_it_plans_for_what_the_models_have_and_small_times_keep_their_digits(capsys, tmp_path):
    for name, context in (("target", 64), ("draft", 48)):
        config = dataclasses.replace(TINY, context=context).to_dict()
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    models = ["--target", str(tmp_path / "target.json"), "--devices", "2", *ROOFLINE]
    script.main(models)
    shown = capsys.readouterr().out
    assert ", 64 tokens." in shown
    assert " 0.00 ms" not in shown
    script.main([*models, "--draft", str(tmp_path / "draft.json")])
    assert ", 48 tokens." in capsys.readouterr().out
    script.main([*BASIC, *ROOFLINE])
    assert ", 4096 tokens." in capsys.readouterr().out
    assert [script.milliseconds(seconds) for seconds in (0.04906, 1e-3, 4.36e-5)] == ["49.06", "1.00", "0.0436"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (BASIC, "give --calibration FILE, or a device's --bandwidth (GB/s) and --peak (TFLOP/s)"),
        ([*BASIC, "--bandwidth", "900"], "give --calibration FILE"),
        ([*BASIC, *ROOFLINE, "--calibration", "x.json"], "not both"),
        ([*BASIC, "--calibration", "missing.json"], "there is no calibration missing.json"),
        ([*BASIC, "--calibration", str(CONFIGS / "llama-2-7b.json")], "unknown key 'model' in calibration"),
        ([*BASIC, *ROOFLINE, "--hit-curve", str(CONFIGS / "llama-2-7b.json")], 'a hit curve needs a list of "rows"'),
        ([*BASIC, *ROOFLINE, "--target", "missing.json"], "there is no target missing.json"),
        ([*BASIC, *ROOFLINE, "--target", str(CONFIGS / "demo_hit_curve.json")], "is no geometry: unknown key 'about'"),
        ([*BASIC, *ROOFLINE, "--target", str(CONFIGS / "demo_records.json")], "must hold a JSON object"),
        ([*BASIC, "--devices", "0"], "--devices must be at least 1, not 0"),
        ([*BASIC, "--context", "0"], "--context must be at least 1, not 0"),
        (
            [*BASIC, *ROOFLINE, "--link-bandwidth", "-1"],
            "--link-bandwidth must be a finite number over 0 (GB/s), not -1",
        ),
        ([*BASIC, *ROOFLINE, "--link-latency", "-5"], "--link-latency must be a finite number of at least 0 (micro"),
        ([*BASIC, *ROOFLINE, "--link-latency", "-5"], "(microseconds), not -5\n"),
        ([*BASIC, *ROOFLINE, "--memory", "-1"], "--memory must be a finite number over 0 (GB), not -1\n"),
        ([*BASIC, "--bandwidth", "nan", "--peak", "1"], "--bandwidth must be a finite number over 0 (GB/s), not nan"),
        (
            [*BASIC, *ROOFLINE, "--draft", str(CONFIGS / "llama-2-7b.json")],
            "has a vocabulary of 32000 and --target",
        ),
        ([*BASIC, *ROOFLINE, "--context", "200000"], "context must be 1 to the target's 131072 tokens"),
        ([*BASIC, *ROOFLINE, "--dtype", "int4"], "invalid choice"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1
