"""Parts are measured for every number of rows, and the costs that follow are such as a decoder takes; no time is."""

from pipedec_jax.analysis import calibration
from pipedec_jax.analysis.cost import at_rows, calibrated_costs
from pipedec_jax.model.exit_head import ExitHeadConfig
from tests.analysis.test_tick_cost import CONFIG


def test_every_part_is_measured_and_more_rows_never_cost_less(monkeypatch):
    monkeypatch.setattr(calibration, "SHORTEST", 0.0)
    head = ExitHeadConfig(1, "block", width=8, feed_forward=8)
    times = calibration.calibrate(
        CONFIG, CONFIG, exit_head=head, exchange=0.5, rows=(1, 3), layers=1, slots=32, ranks=2, repeats=1
    )
    costs = calibrated_costs(times)
    for part in ("layer", "head", "draft", "exit_head"):
        assert set(times[part]) == {1, 3}
        assert 0 < at_rows(getattr(costs, part), 1) <= at_rows(getattr(costs, part), 3)
    assert costs.exchange == 0.5
