"""What the public decoder of a hierarchy makes of measurements: passes, lookahead, models, stages, form, or none."""

from __future__ import annotations

import dataclasses
import os
import re

import jax
import pytest

import pipedec_jax
from pipedec_jax.decoding import hierarchy as decoding
from pipedec_jax.hierarchy.choice import choose, choose_in_turns, selections
from pipedec_jax.hierarchy.race import Entry, candidates
from pipedec_jax.modeled import cost
from pipedec_jax.tokenizer import Tokenizer
from tests.conftest import write_byte_level
from tests.hierarchy.test_choice import made_up

FLAT = {1: 1e-3, 16: 1e-3}
MEASURED = made_up(
    (0.8, 0.9), ({1: 5e-5, 16: 5e-5}, {1: 2e-4, 16: 2e-4}, FLAT), exchange=({2: 1e-6}, {2: 1e-5}, {2: 1e-5, 4: 1e-5})
)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Made-up measurements in place of real ones; the arguments that they were asked with."""
    asked: list[dict] = []

    def measure(sources, workload, **options):
        asked.append({"workload": workload, **options})
        kept = slice(3 - len(sources), 3)
        return made_up((0.8, 0.9)[-len(sources) + 1 :], MEASURED.seconds[kept], exchange=MEASURED.exchange[kept])

    monkeypatch.setattr(decoding, "measure", measure)
    return asked


def demo(*names: str) -> list[pipedec_jax.Model]:
    return [pipedec_jax.load_demo(name) for name in names]


def test_what_is_not_given_is_chosen_from_measurements(measured) -> None:
    models = demo("draft", "middle", "target")
    decoder = pipedec_jax.HierarchyDecoder(models)
    best = choose(MEASURED, all_models=True, dispatch=True)
    assert (decoder.settings.passes, decoder.settings.width) == (best.passes, best.width)
    assert decoder.models == models
    assert not decoder.plain
    assert not decoder.raced
    assert "chosen, the fastest predicted" in decoder.report()[-1]
    assert not pipedec_jax.HierarchyDecoder(models, passes=(2, 1)).report()
    assert len(measured) == 1


def test_passes_are_chosen_for_the_stages_that_are_given(measured) -> None:
    decoder = pipedec_jax.HierarchyDecoder(demo("draft", "middle", "target"), stages=(2, 2, 1))
    best = choose(MEASURED, all_models=True, stages=(2, 2, 1), dispatch=True)
    assert (decoder.settings.stages, decoder.settings.passes) == ((2, 2, 1), best.passes)
    assert "stages 2 2 1" in decoder.report()[-1]
    assert len(decoder.devices) == 5


def test_speculatives_lookahead_is_chosen_and_with_select_its_draft(measured) -> None:
    decoder = pipedec_jax.HierarchyDecoder(demo("middle", "target"), method="speculative")
    pair = made_up((0.9,), MEASURED.seconds[1:])
    assert decoder.settings.passes == choose_in_turns(pair, all_models=True).passes
    assert decoder.settings.passes[0] > 1
    models = demo("draft", "middle", "target")
    decoder = pipedec_jax.HierarchyDecoder(models, method="speculative", select=True)
    best = choose_in_turns(MEASURED)
    assert decoder.models == [models[index] for index in best.models]
    assert (decoder.settings.method, decoder.settings.passes) == ("speculative", best.passes)
    assert f"lookahead {best.passes[0]}" in decoder.report()[-1]
    with pytest.raises(ValueError, match="leave passes out"):
        pipedec_jax.HierarchyDecoder(models, select=True, passes=(1, 1))


def test_a_width_that_is_given_is_what_passes_are_chosen_for_and_what_is_told(measured, monkeypatch) -> None:
    models = demo("draft", "middle", "target")
    best = choose(MEASURED, all_models=True, dispatch=True)
    narrow = choose(MEASURED, all_models=True, dispatch=True, width=2)
    assert best.width > 2
    assert narrow.passes != best.passes
    decoder = pipedec_jax.HierarchyDecoder(models, width=2)
    assert (decoder.settings.passes, decoder.settings.widths) == (narrow.passes, (1, 2, 2))
    assert "width 2" in decoder.report()[-1]
    seen = []

    def race(choices, *_):
        seen.extend(choices)
        return [Entry(choices[0], "lockstep", None, 1e-3)]

    monkeypatch.setattr(decoding, "race", race)
    assert pipedec_jax.HierarchyDecoder(models, select=True, width=40).settings.width == 40
    assert {choice.width for choice in seen} == {40}
    for width in (1, 2, 40):
        decoder = pipedec_jax.HierarchyDecoder(models[1:], method="speculative", width=width)
        (lookahead,), verified = decoder.settings.passes, decoder.settings.widths[-1]
        assert verified == min(width, lookahead + 1)
        assert lookahead <= max(1, width - 1)


@pytest.mark.parametrize("stages", [(1, 1), (1, 2), (2, 1)])
def test_a_tick_is_charged_the_slowest_model_or_its_share_of_a_round(stages) -> None:
    draft, target = models = demo("draft", "target")

    def once(model: pipedec_jax.Model, stages: int) -> float:
        return cost.pass_cost(cost.byte_costs(model.config, None, 4), model.config.layers, stages)

    def tick_cost(method) -> float:
        options = {"stages": stages, "passes": (4,), "dtype": "float32"}
        return pipedec_jax.HierarchyDecoder(models, method=method, **options).settings.tick_cost

    drafted = once(draft, stages[0])
    assert tick_cost("pipespec") == pytest.approx(max(4 * drafted, once(target, stages[1])))
    # A round: a pass more than the lookahead, each of all the draft's stages, and a tick for each of the target's.
    assert tick_cost("speculative") == pytest.approx(
        (5 * stages[0] * drafted + stages[1] * once(target, stages[1])) / stages[1]
    )


def test_devices_are_those_of_the_models_in_use(measured, monkeypatch) -> None:
    models = demo("draft", "middle", "target")
    decoder = pipedec_jax.HierarchyDecoder(models, method="speculative", select=True)
    assert (len(decoder.models), len(decoder.devices)) == (2, 2)
    monkeypatch.setattr(decoding, "race", lambda choices, *_: [Entry(choices[1], "free", None, 1e-3)])
    decoder = pipedec_jax.HierarchyDecoder(models, select=True, stages=(1, 1, 2))
    assert len(decoder.models) == 2
    assert len(decoder.devices) == sum(decoder.settings.stages) == 3


def test_a_capacity_for_short_prompts_does_not_hinder_the_race(measured, monkeypatch) -> None:
    made = []

    def race(choices, forms, make, reform, prompt, new_tokens):
        engine = make(choices[0])
        made.append((engine.settings.capacity, engine.capacity_for(len(prompt) + new_tokens)))
        return [Entry(choices[0], "lockstep", None, 1e-3)]

    monkeypatch.setattr(decoding, "race", race)
    decoder = pipedec_jax.HierarchyDecoder(demo("draft", "target"), select=True, capacity=40)
    assert made == [(None, 256)]
    assert decoder.settings.capacity == 40


def test_what_does_not_go_together_is_refused_before_anything_is_measured(measured, tmp_path) -> None:
    models = demo("draft", "middle", "target")
    with pytest.raises(ValueError, match="form is for pipespec"):
        pipedec_jax.HierarchyDecoder(models[1:], method="speculative", form="free")
    for bad in (models[0], None, ["draft", "target"]):
        with pytest.raises(ValueError, match=r"models must be a list of such as pipedec_jax.load\(DIRECTORY\) gives"):
            pipedec_jax.HierarchyDecoder(bad)  # pyright: ignore[reportArgumentType]
    for name in ("stages", "passes"):
        with pytest.raises(ValueError, match=f"{name} must be a list, a number for each model, not 2"):
            pipedec_jax.HierarchyDecoder(models, **{name: 2})  # pyright: ignore[reportArgumentType]
    for stages in ((2,), (1, 1), (1, 1, 1, 1)):
        with pytest.raises(ValueError, match=f"stages must be one number for each model: 3, not {len(stages)}"):
            pipedec_jax.HierarchyDecoder(models, stages=stages)
    for name in ("select", "record"):
        with pytest.raises(ValueError, match=f"{name} must be True or False, not 1"):
            pipedec_jax.HierarchyDecoder(models, **{name: 1})  # pyright: ignore[reportArgumentType]
    models[1].tokenizer = Tokenizer.load(write_byte_level(tmp_path / "other"))
    with pytest.raises(ValueError, match=f"^{re.escape(models[1].name)}: draft and target must have the same tokens"):
        pipedec_jax.HierarchyDecoder(models)
    assert not measured


@pytest.mark.parametrize("form", ["lockstep", "free"])
def test_the_fastest_that_was_raced_is_used(measured, monkeypatch: pytest.MonkeyPatch, form) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5})
    seen = []

    def race(choices, forms, *_):
        seen.append((choices, forms))
        return [Entry(choices[1], form, None, 1e-3), Entry(None, "lockstep", None, 2e-3)]

    monkeypatch.setattr(decoding, "race", race)
    models = demo("draft", "middle", "target")
    decoder = pipedec_jax.HierarchyDecoder(models, select=True, devices=jax.devices()[:4])
    expected = candidates(MEASURED, selections(3), None, 4)
    assert seen == [(expected, ("lockstep", "free"))]
    assert measured[0]["stages"] == [[1, 2]] * 3
    used = expected[1]
    assert decoder.models == [models[index] for index in used.models]
    assert decoder.settings.stages == used.stages
    assert (decoder.settings.passes, decoder.settings.form, decoder.form) == (used.passes, form, form)
    assert len(decoder.devices) == used.devices
    assert "chosen, the fastest measured" in decoder.report()[-1]
    # What is given stays.
    pipedec_jax.HierarchyDecoder(models, select=True, form="free", stages=(1, 1, 2))
    assert seen[1][1] == ("free",)
    assert all(choice.stages[-1] == 2 for choice in seen[1][0])
    assert measured[1]["stages"] == [[1], [1], [2]]


def test_plain_decoding_is_used_where_it_is_the_fastest(measured, monkeypatch: pytest.MonkeyPatch) -> None:
    other = choose(made_up((0.9,), MEASURED.seconds[1:]))
    entries = [Entry(None, "lockstep", None, 1e-3), Entry(other, "free", None, 2e-3)]
    monkeypatch.setattr(decoding, "race", lambda *_: entries)
    decoder = pipedec_jax.HierarchyDecoder(demo("draft", "target"), select=True, stages=(1, 2))
    assert (decoder.plain, decoder.method, decoder.stages, len(decoder.devices)) == (True, "pp", 1, 1)
    assert decoder._requests.devices == decoder.devices, "the target's, where its weights may be already"
    assert "target alone, plain decoding" in decoder.report()[-1]
    assert decoder.modeled_speedup_vs_pp(1.0) > 0
    for act in (decoder.check_recorded, decoder.recording):
        with pytest.raises(ValueError, match="of it no passes are recorded"):
            act()


@pytest.mark.parametrize("options", [{"passes": (2,)}, {}, {"select": True}])
def test_too_few_devices_are_refused_before_anything_is_measured(measured, options) -> None:
    for devices in (jax.devices()[:1], []):
        with pytest.raises(ValueError, match=f"2 devices are needed .* but {len(devices)} are given"):
            pipedec_jax.HierarchyDecoder(demo("draft", "target"), devices=devices, **options)
    with pytest.raises(ValueError, match="devices must be a list of JAX devices"):
        pipedec_jax.HierarchyDecoder(demo("draft", "target"), devices=["cpu", "cpu"], **options)  # pyright: ignore[reportArgumentType]
    assert not measured


@pytest.mark.parametrize("context", [640, 64, 12])
def test_what_is_decoded_to_measure_fits_into_the_targets_context(measured, monkeypatch, context) -> None:
    raced = []

    def race(choices, forms, make, reform, prompt, new_tokens):
        raced.append(len(prompt) + new_tokens)
        return [Entry(choices[0], "lockstep", None, 1e-3)]

    monkeypatch.setattr(decoding, "race", race)
    models = demo("draft", "target")
    models[-1].config = dataclasses.replace(models[-1].config, context=context)
    pipedec_jax.HierarchyDecoder(models, select=True)
    (asked,) = measured
    workload = asked["workload"]
    prompt = len(workload.prompts[0])
    assert workload.new_tokens == min(96, context - prompt)
    assert raced == [prompt + min(64, context - prompt)]
    assert 0 < prompt <= context // 2


@pytest.mark.slow
def test_models_auto_gives_plain_decodings_text() -> None:
    """Everything real, with the demo family: measured, raced, decoded."""
    models = demo("draft", "target")
    plain = pipedec_jax.Decoder(models[-1], method="pp", stages=1)
    decoder = pipedec_jax.HierarchyDecoder(models, select=True)
    prompt = "def quicksort(items):\n"
    assert decoder.generate(prompt, max_new_tokens=48).text == plain.generate(prompt, max_new_tokens=48).text
    assert {entry.form for entry in decoder.raced if entry.choice} == {"lockstep", "free"}
    assert any(entry.choice is None for entry in decoder.raced)
    assert [entry.measured for entry in decoder.raced] == sorted(entry.measured for entry in decoder.raced)
