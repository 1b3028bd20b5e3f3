"""One simulation of a static tree serves any number of stages, and a search that was killed goes on."""

import dataclasses
import functools

import pytest

import find_static_tree
import pipedec_jax
from pipedec_jax.analysis import static_trees
from pipedec_jax.analysis.method_table import MethodRow, simulate
from pipedec_jax.analysis.simulator import Simulator
from pipedec_jax.analysis.static_trees import TreeFile, on_stages, shape_of, shapes, strongest
from pipedec_jax.drafters.replay import ReplayDrafter, random_text
from pipedec_jax.pipeline.settings import EngineSettings
from tests.analysis.planning import TINY
from tests.listed_library import needs_listed_library

OPTIONS = {"max_new_tokens": 24}
PROMPTS = ["class Stack:"]
ANSWERS = [[7, 8, 9, 10] * 6]
"""No model's, but one that look-up guesses."""
(SHAPE,) = shapes([1], [2], ["both"])


@pytest.fixture(scope="module")
def make(family):
    target, draft = pipedec_jax.load(family["target"]), pipedec_jax.load(family["draft"])
    return functools.partial(pipedec_jax.Decoder, target, draft, prefill_width=16, capacity=128)


@pytest.fixture(scope="module")
def row(make):
    return static_trees.with_one_stage(make, PROMPTS, ANSWERS, SHAPE, **OPTIONS)


def test_a_tree_takes_on_any_stages_what_one_stage_says(make, row):
    assert row.hits > 0
    assert shape_of(row) == SHAPE
    decoder = make(method="stpp", stages=3, **SHAPE)
    found, expected = on_stages(row, decoder), simulate(decoder, PROMPTS, ANSWERS, **OPTIONS)
    assert found.modeled_speedup_vs_pp == pytest.approx(expected.modeled_speedup_vs_pp, rel=1e-5)
    assert dataclasses.replace(found, modeled_speedup_vs_pp=expected.modeled_speedup_vs_pp) == expected


def test_the_strongest_tree_depends_on_what_drafting_costs(make, row):
    """A deeper tree of a little fewer rounds pays only where its levels cost nothing."""
    deep = dataclasses.replace(row, draft_steps=30, ticks=row.ticks - 2)
    free = static_trees.with_free_drafting(make)
    assert [strongest([row, deep], how, 4).draft_steps for how in (make, free)] == [2, 30]
    assert strongest([deep], free, 4).ticks == 5 * (row.ticks // 2 - 1)


def test_a_row_of_another_tree_is_refused(make, row):
    with pytest.raises(ValueError, match="own static tree"):
        on_stages(row, make(method="stpp", stages=2, **SHAPE | {"depth": 3}))


def test_rounds_of_a_replayed_chain_are_the_simulators():
    rates = [0, 0.7, 0.9, 1]
    vocabulary = static_trees.REPLAYED_VOCABULARY
    text, at_rate = random_text(80, vocabulary, seed=3)
    settings = EngineSettings(method="stpp", stages=2, width=1, children=1, depth=2)
    drafter = ReplayDrafter(children=1, vocab_size=vocabulary)
    simulator = Simulator(TINY, None, settings, vocab_size=vocabulary, drafter=drafter)
    ticks = [simulator.run(text[:1], text[1:], drafter_params=at_rate(rate)).ticks[-1] for rate in rates]
    rounds = static_trees.replayed_rounds(2, rates, tokens=80, seed=3)
    assert ticks == [3 * count for count in rounds]
    assert (rounds[0], rounds[-1]) == (80, 27)
    # Two levels a tick: two ticks of drafting, and eight of the pipe.
    assert static_trees.ticks_with_drafting(20, stages=8, depth=3, levels=2) == 200


ROW = MethodRow("stpp", 1, 2, 2, 3, "both", 2, 48, 40, 20, 26, 0, 0, 1.5)


def test_rows_are_kept_and_found_again(tmp_path):
    path = tmp_path / "deep" / "trees.json"
    TreeFile(path, {"seed": 1}).add(ROW)
    again = TreeFile(path, {"seed": 1})
    assert again.find(shape_of(ROW)) == ROW
    assert again.find(shape_of(ROW) | {"depth": 4}) is None
    with pytest.raises(ValueError, match="choose another file"):
        TreeFile(path, {"seed": 2})
    path.write_text('{"trees": [1]}')
    with pytest.raises(ValueError, match="no file of static trees"):
        TreeFile(path, {"seed": 1})
    assert TreeFile(None, {}).rows == []


@needs_listed_library
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--target", "DIR"], "give --target DIR and --draft DIR, or neither"),
        (["--width", "0"], "width must be a whole number of at least 1, not 0"),
        (["--stages", "4", "99"], "stages (99) must not exceed the target's layers (16)"),
        (["--prompts", "0"], "held-out prompts must be at least 1, not 0"),
        (["--prompts", "nowhere"], "nowhere: No such file"),
        (["--max-new-tokens", "4000"], "exceed the target's context"),
    ],
)
def test_the_script_refuses_what_no_tree_can_have_before_any_is_simulated(given, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["find_static_tree.py", *given])
    monkeypatch.setattr("pipedec_jax.use_cpu_devices", lambda _: None)
    with pytest.raises(SystemExit) as stopped:
        find_static_tree.main()
    shown = capsys.readouterr()
    assert (stopped.value.code, shown.out, shown.err.count("\n")) == (2, "", 1)
    assert message in shown.err
