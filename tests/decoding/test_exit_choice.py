"""Which stored exit head is chosen where the exit is left open, and what is said where none can be."""

from pathlib import Path

import pytest

import pipedec_jax
from pipedec_jax.decoding.decoder import Decoder
from pipedec_jax.exit_store import load_exit_head
from pipedec_jax.hosts.facts import exit_facts
from pipedec_jax.model.exit_head import ExitHeadConfig
from pipedec_jax.pipeline.split import LIKELY_RATE
from tests.conftest import copy_target, store_head

RESULTS = Path(__file__).parents[2] / "scripts" / "results" / "exits.md"
HEADS = {1: 0.5, 2: 0.75, 3: 0.98}
"""Recorded agreement of the heads stored after so many of the 4 layers."""


@pytest.fixture(scope="module")
def directory(family, tmp_path_factory) -> Path:
    found = copy_target(family, tmp_path_factory.mktemp("choice"))
    for layer, agreement in HEADS.items():
        store_head(found, ExitHeadConfig(layer, "norm-linear", width=8), {"1": agreement, "4": 0.99})
    return found


@pytest.fixture
def target(directory) -> pipedec_jax.Model:
    """Whose weights must not be read."""
    found = pipedec_jax.load(directory)
    return pipedec_jax.Model(found.config, found.tokenizer, lambda: pytest.fail("read weights"), name=str(directory))


def simulated() -> list[tuple[int, int, str, int, float]]:
    """Stages, exit, method, width and modeled speedup of the trained heads' rows that are published."""
    found = []
    for line in RESULTS.read_text(encoding="utf-8").split("## Untrained")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) == 11 and cells[0].isdigit():
            found.append((int(cells[0]), int(cells[1]), cells[5].split(",")[0], int(cells[6]), float(cells[10])))
    return found


@pytest.mark.parametrize("stages", [4, 8, 16])
@pytest.mark.parametrize(("method", "width"), [("ppsd", 1), ("ppsd", 16), ("eesd", 1)])
def test_of_the_demo_targets_heads_the_one_is_chosen_that_is_quickest_when_simulated(stages, method, width):
    rows = {exit_: speedup for n, exit_, name, w, speedup in simulated() if (n, name, w) == (stages, method, width)}
    assert set(rows) == {2, 4, 8}
    tree = {"width": width, "children": 8} if width > 1 else {}
    decoder = Decoder(pipedec_jax.load_demo("target"), method=method, stages=stages, **tree)
    assert decoder.settings.exit_layer == max(rows, key=rows.__getitem__)
    assert len(decoder.exit_forecasts) == 4, "every head was looked at"


@pytest.mark.parametrize(("stages", "parts"), [(2, 1), (3, 1), (4, 1), (2, 2)])
def test_a_forecast_is_the_closed_form_times_the_longest_stage_with_the_head(target, stages, parts):
    decoder = Decoder(target, method="ppsd", stages=stages, tensor_parallel=parts)
    # Keys and values have one head, and norms are small: all parts have them whole, and the exit head.
    split, whole = 2 * 32 * 32 + 3 * 32 * 48, 2 * 32 * 16 + 2 * 32
    layer, share = split + whole, (split / parts + whole) / (split + whole)
    path, vocabulary = 32 + 32 * 8 + 8, 8 * 416
    assert {one.head.exit_layer for one in decoder.exit_forecasts} == set(HEADS)
    for one in decoder.exit_forecasts:
        agreement, e = HEADS[one.head.exit_layer], one.split.exit
        assert sum(one.split.count[:e]) == one.head.exit_layer
        ticks = agreement * e + (1 - agreement) * stages
        longest = max(share * max(one.split.count), share * one.split.count[e - 1] + path / layer)
        assert one.ticks == pytest.approx(ticks)
        assert one.layers == pytest.approx(ticks * (longest + (32 * 416 + vocabulary) / (stages * parts) / layer))
    work = [one.layers for one in decoder.exit_forecasts]
    assert work == sorted(work)
    assert decoder.settings.exit_layer == decoder.exit_forecasts[0].head.exit_layer
    assert decoder.split == decoder.exit_forecasts[0].split


def test_what_was_chosen_is_reported_and_what_was_given_is_not(target, directory):
    decoder = Decoder(target, method="ppsd", stages=2)
    first, *rest = decoder.report()
    assert first.startswith(f"chosen: exit after layer {decoder.settings.exit_layer}, head ")
    assert "predicted quickest for 2 stages" in first
    assert [line.split(":")[0].strip() for line in rest] == [one.head.name for one in decoder.exit_forecasts]
    assert Decoder(target, method="ppsd", stages=2, exit_layer=3).report() == []
    head = load_exit_head(pipedec_jax.load(directory), 3)
    given = Decoder(target, method="eesd", stages=2, exit_head=head)
    assert (given.settings.exit_layer, given.exit_head.config, given.report()) == (3, head.config, [])


def test_a_trees_rate_is_the_agreement_of_as_many_guesses(target):
    decoder = Decoder(target, method="ppsd", stages=2, width=5, children=4)
    assert {one.rate for one in decoder.exit_forecasts} == {0.99}
    # As many as are made and sent.
    for tree in ({"width": 5, "children": 3}, {"width": 3, "children": 5}):
        decoder = Decoder(target, method="ppsd", stages=2, **tree)
        assert {one.head.exit_layer: one.rate for one in decoder.exit_forecasts} == HEADS


@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_predicted_and_the_longest_stage_are_told_in_the_same_layers(target, parts):
    decoder = Decoder(target, method="ppsd", stages=2, tensor_parallel=parts)
    best, cycle = decoder.exit_forecasts[0], decoder.cycle
    vocabulary = 32 * 416 / (2 * 32 * 32 + 3 * 32 * 48 + 2 * 32 * 16 + 2 * 32)  # the target's own, in layers
    slices = (vocabulary + cycle.vocabulary) / (2 * parts)
    assert best.layers == pytest.approx(best.ticks * (cycle.layers + slices))


def test_exits_that_do_not_fit_the_stages_are_left_out(target):
    decoder = Decoder(target, method="ppsd", stages=4, exit_stages=2)
    assert [one.head.exit_layer for one in decoder.exit_forecasts] == [2]
    every = "1-norm-linear-8, 2-norm-linear-8, 3-norm-linear-8"
    # What is wrong with all of them is said once.
    with pytest.raises(
        ValueError, match=rf"no stored exit head fits: {every}: an exit needs from 2 stages [^:]*: [^:]*$"
    ):
        Decoder(target, method="ppsd", stages=1)


def test_a_draft_without_end_is_refused_before_anything_is_forecast(target):
    """The forecast adds up a term for each of the drafts."""
    with pytest.raises(ValueError, match=r"the tree would need 1[0-9]+ places, .* the most; lower draft_length$"):
        Decoder(target, method="eesd", stages=2, draft_length=10**20)


def test_heads_are_chosen_by_name_and_the_unmeasured_come_last(family, tmp_path):
    directory = copy_target(family, tmp_path)
    store_head(directory, ExitHeadConfig(2, "block", width=8), {})
    store_head(directory, ExitHeadConfig(3, "norm-linear", width=8), {"1": 0.01})
    target = pipedec_jax.load(directory)
    decoder = Decoder(target, method="ppsd", stages=2)
    assert [one.rate for one in decoder.exit_forecasts] == [0.01, LIKELY_RATE]
    assert decoder.exit_forecasts[1].layers < decoder.exit_forecasts[0].layers
    assert "agreement not recorded, taken for 80.0%" in decoder.report()[2]
    for name in ("block", "2-block", "block-8"):
        assert Decoder(target, method="ppsd", stages=2, exit_head=name).exit_head_config.name == "2-block-8"
    with pytest.raises(FileNotFoundError, match=r"no exit head mlp \(stored: 2-block-8, 3-norm-linear-8\); train one"):
        Decoder(target, method="ppsd", stages=2, exit_head="mlp")
    store_head(directory, ExitHeadConfig(2, "norm-linear", width=8), {"1": 0.9})
    decoder = Decoder(target, method="ppsd", stages=2, exit_layer=2, exit_head="block")
    assert decoder.exit_head.config.name == "2-block-8", "what was named is read, though another one agrees more"


def test_where_no_head_is_stored_the_error_says_what_to_do(family):
    target = pipedec_jax.load(family["target"])
    for method in ("ppsd", "eesd"):
        with pytest.raises(FileNotFoundError) as error:
            Decoder(target, method=method, stages=2)
        for part in (
            f"method '{method}' drafts at an exit of the target: give exit_layer (--exit-layer)",
            f"of which {family['target']} has none",
            f"scripts/train_exit_head.py --target {family['target']} --exit-layer E",
            "--exit-head target --exit-layer E",
        ):
            assert part in str(error.value)
    with pytest.raises(ValueError, match="the untrained head fits every exit: give exit_layer"):
        Decoder(target, method="ppsd", stages=2, exit_head="target")


def test_processes_compare_the_head_that_they_have_chosen(target, directory):
    head = Decoder(target, method="ppsd", stages=2).exit_head_config
    before = exit_facts(target, head)
    assert before["exit head"] == head.name
    described = directory / "exits" / head.name / "head.json"
    text = described.read_text()
    described.write_text(text.replace('"training": {}', '"training": {"steps": 9}'))
    assert exit_facts(target, head) != before
    described.write_text(text)
    assert exit_facts(target, head) == before
    assert exit_facts(target, None) == {"exit head": None}
    assert exit_facts(target, ExitHeadConfig(2, "target")) == {"exit head": "2-target"}
