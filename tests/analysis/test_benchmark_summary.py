"""Medians, ratios and their baselines from figures made by hand; and that every column says what its figures are."""

import json
import re

import pytest

from pipedec_jax.analysis.benchmark_summary import FIGURES, TABLES, Contender, Spread, plot, summarize, tables

CONTENDERS = {
    "pp-1": Contender("pp", 1, 1, None),
    "pp-2": Contender("pp", 2, 2, None),
    "pipedec-2x4": Contender("pipedec", 2, 3, 4),
    "pipedec-4x4": Contender("pipedec", 4, 5, 4),
}


def turn(ticks, hits, tpot, tokens=5, guesses=8):
    misses = None if hits is None else tokens - 1 - hits
    return {
        "prompt_tokens": 7,
        "new_tokens": tokens,
        "ticks": ticks,
        "hits": hits,
        "misses": misses,
        "guesses": None if hits is None else guesses,
        "accept_lengths": [1] * tokens if hits is None else [*[1] * misses, tokens - misses],
        "modeled_speedup_vs_pp": 1.0 if hits is None else 1.5,
        "measured_ttft_s": 0.1,
        "measured_tpot_s": tpot,
        "measured_wall_s": 0.1 + (tpot or 0) * (tokens - 1),
    }


def rows(*turns, left_out=None):
    return [
        {"question_id": 1, "category": "qa", "left_out": None, "turns": list(turns[:2])},
        {"question_id": 2, "category": "rag", "left_out": left_out, "turns": list(turns[2:])},
    ]


FOUND = {
    "pp-1": rows(*(turn(5, None, tpot) for tpot in (0.3, 0.3, 0.3)), left_out="turn 2: too long"),
    "pp-2": rows(*(turn(10, None, tpot) for tpot in (0.1, 0.2, 0.4)), left_out="turn 2: too long"),
    "pipedec-2x4": rows(turn(7, 2, 0.1), turn(6, 4, 0.1), turn(9, 0, 0.1), left_out="turn 2: too long"),
    "pipedec-4x4": rows(turn(12, 2, None, tokens=3), turn(6, 4, 0.1), turn(9, 0, 0.1), left_out="turn 2: too long"),
}
WARM_UPS = [{"decoder": name, "measured_compile_s": seconds} for name in CONTENDERS for seconds in (3.0, 1.0)]


@pytest.fixture(scope="module")
def summary():
    return summarize(CONTENDERS, FOUND, WARM_UPS)


def test_medians_and_spread():
    assert Spread.of([4.0, None, 1.0, 2.0, 3.0, 5.0]) == Spread(5, 3.0, 2.0, 4.0, 1.0, 5.0)
    assert Spread.of([None]) is None


def test_figures_are_medians_over_answers_and_ratios_pair_the_same_answer(summary):
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["questions"], summary["answers"]) == (2, 3)
    assert summary["turns_left_out"] == {"2": "turn 2: too long"}
    plain, pp, two, four = summary["contenders"]
    assert (pp["method"], two["devices"], four["width"]) == ("pp", 3, 4)
    assert two["figures"]["ticks_per_token"]["median"] == 7 / 5
    assert two["totals"]["ticks_per_token"] == 22 / 15
    assert four["totals"]["ticks_per_token"] == 27 / 13, "of all answers together, however long each is"
    assert (two["totals"]["hits"], two["totals"]["misses"], two["totals"]["guesses"]) == (6, 6, 24)
    assert (pp["totals"]["hits"], pp["totals"]["misses"], pp["totals"]["guesses"]) == (None, None, None)
    assert (two["figures"]["hit_rate"]["median"], pp["figures"]["hit_rate"].get("median")) == (0.5, None)
    assert two["figures"]["tokens_per_refill"]["median"] == 5 / 3
    # The answer without a hit kept nothing.
    assert (two["figures"]["drafted_per_kept"]["median"], two["figures"]["drafted_per_kept"]["count"]) == (3.0, 2)
    ratio = two["figures"]["measured_speedup_vs_pp"]
    assert (ratio["median"], ratio["least"], ratio["most"]) == pytest.approx((2, 1, 4))
    assert ratio["baseline"] == "pp on as many stages"
    assert "median" not in four["figures"]["measured_speedup_vs_pp"], "PP was not run on four stages"
    assert four["figures"]["measured_speedup_vs_plain"]["median"] == pytest.approx(3)
    assert four["figures"]["measured_speedup_vs_plain"]["baseline"].startswith("pp on one stage")
    assert plain["figures"]["measured_speedup_vs_pp"]["median"] == 1
    assert four["figures"]["tpot_ms"]["count"] == 2
    assert two["figures"]["tokens_per_s"]["median"] == 5 / (0.1 + 4 * 0.1)
    assert two["figures"]["compile_s"]["median"] == 2
    assert {name: part["ticks"] for name, part in two["categories"].items()} == {"qa": 13, "rag": 9}


def test_every_figure_and_column_says_what_it_is(summary):
    words = {"measured", "ticks", "modeled", "emulated", "simulated", "predicted"}
    for row in summary["contenders"]:
        assert all(figure["kind"] in words for figure in (*row["figures"].values(), row["totals"]))
    shown = tables(summary)
    (ticks, times, categories), legend = shown.split("\n\n### ")[:3], shown.rsplit("\n\n", 1)[1]
    for table in (ticks, times):
        heading = table.split("\n\n")[1].splitlines()[0].strip("| ").split(" | ")
        assert heading[:4] == ["method", "stages", "devices", "width"]
        assert all(re.search(rf"\(({'|'.join(words)})\)$", name) for name in heading[4:])
    assert categories.startswith("Ticks per token by category (ticks)")
    assert all(f"*{word}*" in legend for word in ("ticks", "modeled", "measured"))
    assert {figure.kind for figure in FIGURES.values()} == {kind for kinds in TABLES.values() for kind in kinds}
    assert all(figure.baseline for figure in FIGURES.values() if " / this" in figure.heading)
    assert "| pipedec | 2 | 3 | 4 | 1.47 | 1.40 [1.30, 1.60] | 0.500 [0.250, 0.750] |" in ticks
    assert "| - | 3.00 [3.00, 3.00] | 2.0 [1.5, 2.5] |" in times


def test_plots_are_drawn_where_matplotlib_is(summary, tmp_path):
    pytest.importorskip("matplotlib")
    written = plot(summary, tmp_path)
    assert [path.name for path in written] == ["ticks_per_token.svg", "tpot_ms.svg"]
    assert all("<svg" in path.read_text() for path in written)
