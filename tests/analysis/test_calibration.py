"""Parts are measured for every number of rows, and the costs that follow are such as a decoder takes; no time is."""

import argparse
import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from calibrate import geometries, show
from pipedec_jax.analysis import calibration
from pipedec_jax.model.exit_head import ExitHeadConfig
from pipedec_jax.modeled.cost import at_rows, calibrated_costs
from tests.analysis.test_tick_cost import CONFIG
from tests.progress_bars import Bars


def test_every_part_is_measured_and_more_rows_never_cost_less(monkeypatch, capsys):
    monkeypatch.setattr(calibration, "SHORTEST", 0.0)
    monkeypatch.setattr(calibration, "tqdm", bars := Bars())
    head = ExitHeadConfig(1, "block", width=8, feed_forward=8)
    times = calibration.calibrate(
        CONFIG, CONFIG, exit_head=head, exchange=0.5, rows=(1, 3), layers=1, slots=32, ranks=2, repeats=1
    )
    bars.check(["measuring the target's parts", "measuring the draft's parts"])
    costs = calibrated_costs(times)
    for part in ("layer", "head", "draft", "exit_head"):
        assert set(times[part]) == {1, 3}
        assert 0 < at_rows(getattr(costs, part), 1) <= at_rows(getattr(costs, part), 3)
    assert costs.exchange == 0.5
    # The head that was measured, wherever it stands; no other.
    assert calibrated_costs(times, CONFIG, None, "float32", dataclasses.replace(head, exit_layer=2)) == costs
    with pytest.raises(ValueError, match=r"of exit head block-8-ff8, not of 1-block-8: .*--exit-head 1-block-8\)"):
        calibrated_costs(times, CONFIG, None, "float32", ExitHeadConfig(1, "block", width=8))
    times["measured"] |= {"copy_bytes_per_s": 1e9, "read_bytes_per_s": 1e9}
    show(times, CONFIG, CONFIG, head, argparse.Namespace(rows=[1, 3], ranks=2, dtype="float32", slots=32, layers=1))
    printed = capsys.readouterr().out
    assert "exit head 1-block-8-ff8 | GB/s" in printed
    assert "nan" not in printed


def test_a_model_of_int8_layers_is_measured_as_such(monkeypatch):
    monkeypatch.setattr(calibration, "SHORTEST", 0.0)
    int8 = dataclasses.replace(CONFIG, int8=True)
    times = calibration.calibrate(int8, None, exchange=0.0, rows=(1,), layers=1, slots=32, repeats=1)
    assert calibrated_costs(times, int8).layer == times["layer"]
    with pytest.raises(ValueError, match="int8 was True, this one's is False"):
        calibrated_costs(times, CONFIG)


def test_a_calibration_says_what_it_is_of_and_is_refused_for_others():
    times = {"layer": 1.0, "head": 1.0, "measured": {"dtype": "float32", "target": CONFIG.to_dict(), "draft": None}}
    deeper = dataclasses.replace(CONFIG, layers=9, context=7)  # a layer takes as long
    assert calibrated_costs(times, deeper, None, "float32").layer == 1.0
    with pytest.raises(ValueError, match=r"lacks draft, .*\(calibrate.py --draft\)"):  # it would be free
        calibrated_costs(times, deeper, CONFIG, "float32")
    assert calibrated_costs({**times, "draft": 0.0}, deeper, CONFIG, "float32").draft == 0.0
    with pytest.raises(ValueError, match="of another target: width was 16, this one's is 32"):
        calibrated_costs(times, dataclasses.replace(CONFIG, width=32))
    with pytest.raises(ValueError, match="measured in float32, not in bfloat16"):
        calibrated_costs(times, CONFIG, None, jnp.bfloat16)
    draft = {**times, "draft": 1.0, "measured": {"draft": CONFIG.to_dict()}}
    with pytest.raises(ValueError, match="of another draft: layers was 2, this one's is 9"):
        calibrated_costs(draft, CONFIG, deeper)


@pytest.mark.slow
def test_what_a_tick_adds_is_measured():
    assert calibration.measure_exchange(dataclasses.replace(CONFIG, context=256), 2, jnp.float32, width=2) >= 0


def test_the_demos_draft_is_measured_with_the_demos_target_only(tmp_path):
    own = tmp_path / "own.json"
    own.write_text(json.dumps(CONFIG.to_dict()))
    assert geometries(str(own), None) == (CONFIG, None)
    assert geometries(str(own), str(own)) == (CONFIG, CONFIG)
    target, draft = geometries(None, None)
    assert draft is not None
    assert draft.layers < target.layers
    assert geometries(None, str(own)) == (target, CONFIG)


def test_what_a_link_takes_is_measured():
    link = calibration.measure_link(jax.devices()[:2], array_bytes=4096, repeats=1)
    assert link.latency > 0
    with pytest.raises(ValueError, match="two devices"):
        calibration.measure_link(jax.devices()[:1])
