"""What plans are made of: geometries, links, hit curves, and memory against the engine's own bytes."""

import dataclasses
import re

import jax.numpy as jnp
import pytest

from pipedec_jax.analysis import device_memory
from pipedec_jax.analysis.hit_curve import HitCurve, Setting, lines_at, read_hit_curve, ticks_at
from pipedec_jax.analysis.links import Link, all_reduce_seconds, exchange_seconds, hop_seconds
from pipedec_jax.command_line.geometries import read_geometry
from pipedec_jax.model.exit_head import ExitHeadConfig
from pipedec_jax.model.parameters import parameter_count
from pipedec_jax.model.tensor_parallel import tensor_share
from pipedec_jax.modeled.cost import layer_bytes
from pipedec_jax.pipeline import placement
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.settings import EngineSettings
from tests.analysis.planning import (
    CONFIGS,
    LEVELS,
    TREE,
    curve,
    geometry,
    results,
)
from tests.random_pairs import FIVE, ODD, VOCAB, Pair, as_source, draft_weights, exit_head, target_weights

PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
}
"""Parameters that the hub states for the checkpoints' files (LLaMA 2's without their stored rotary frequencies)."""


# Geometries.


def test_there_is_a_file_for_every_published_model():
    assert {path.stem for path in CONFIGS.glob("llama-*.json")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_geometry_has_as_many_parameters_as_are_published(name):
    config = geometry(name)
    assert parameter_count(config) == PUBLISHED[name]
    assert config.tied_embeddings == name.startswith("llama-3.2")
    assert (config.rope_scaling is None) == name.startswith(("llama-2", "llama-3-"))
    assert config.head_size * config.heads == config.width
    assert read_geometry(str(CONFIGS / f"{name}.json"), "target") == config


# Links.


def test_a_sum_over_devices_takes_the_quickest_way():
    link = Link(bandwidth=100, latency=1)
    assert hop_seconds(link, 50) == 1.5
    assert all_reduce_seconds(link, 50, 1) == 0
    assert all_reduce_seconds(link, 10, 8) == 1 + 7 * 10 / 100  # little: all at once
    assert all_reduce_seconds(link, 100, 8) == 3 * (1 + 1)  # log2 of 8
    assert all_reduce_seconds(link, 8000, 8) == pytest.approx(14 * (1 + 10))  # much: a ring
    with pytest.raises(ValueError, match="bandwidth must be a finite number over 0"):
        Link(bandwidth=0, latency=1)
    with pytest.raises(ValueError, match="latency"):
        Link(bandwidth=1, latency=-1)


def test_a_ticks_exchange_is_three_sums_and_a_hop():
    latency = Link(bandwidth=1e30, latency=1)
    assert exchange_seconds(latency, ranks=9, rows=4, width=8, item_bytes=2) == pytest.approx(4)
    assert exchange_seconds(latency, ranks=1, rows=4, width=8, item_bytes=2) == 0
    bytes_alone = Link(bandwidth=1, latency=0)
    # Two ranks, 4 rows of 8: embeddings 64 bytes, rows as words 128 and 3 guesses of 8, the hop 64, choices 2 x 4 x 16.
    assert exchange_seconds(bytes_alone, 2, 4, 8, 2, guesses=3) == 64 + 128 + 24 + 64 + 128


# Hit curves.


def test_ticks_lie_on_straight_lines_between_points():
    points = {4: 1.6, 8: 2.4}
    assert [ticks_at(LEVELS, points, n) for n in (1, 2, 4, 6, 8)] == pytest.approx([1, 1.2, 1.6, 2.0, 2.4])
    assert ticks_at(LEVELS, points, 16) == pytest.approx(4.0)
    assert ticks_at(LEVELS, {4: 1.6}, 16) is None
    assert ticks_at(LEVELS, {4: 1.6, 8: 1.0}, 16) == 1.0  # never down
    # 4 tokens a round of n + 1 ticks, whatever the stages.
    assert [ticks_at(TREE, {4: 1.25, 8: 2.25}, n) for n in (1, 4, 6, 16)] == pytest.approx([0.5, 1.25, 1.75, 4.25])


def test_lines_that_end_before_are_left_out_where_another_does_not():
    long = dataclasses.replace(LEVELS, width=8)
    lines = HitCurve({LEVELS: {4: 1.6, 8: 2.4}, long: {4: 1.5, 16: 4.0}}, {})
    assert lines_at(lines, 8) == [(LEVELS, 2.4, False), (long, pytest.approx(1.5 + 2.5 / 3), False)]
    assert lines_at(lines, 16) == [(long, 4.0, False)]
    assert [setting for setting, _, over in lines_at(lines, 32) if over] == [LEVELS, long]


def test_the_shipped_curve_is_what_the_results_say():
    tables = [results("schedules").split("## Drawn tokens")[0], results("exits")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for text in tables for line in text.splitlines()]
    found = curve()
    numbers = [row for row in rows if len(row) == 12 and row[0].isdigit() and not row[2].endswith("free")]
    assert sum(map(len, found.lines.values())) == len(numbers) == 132
    for stages, width, method, drafter, children, steps, ticks, *_ in numbers:
        setting = Setting(method, drafter, int(width), int(children), int(steps))
        assert found.lines[setting][int(stages)] == float(ticks)
    chains = {int(row[1]) / 16: float(row[7]) for row in rows if len(row) == 11 and row[5:7] == ["ppsd", "1"]}
    assert found.exits == dict(sorted(chains.items()))
    assert "simulated" in found.about


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "row 1 of the hit curve: method must be one of pp, stpp"),
        ({"hit_rate": 1.5}, "hit rate from 0 to 1"),
        ({"ticks_per_token": 0}, "ticks per token over 0"),
        ({"ticks_per_token": "1"}, "ticks_per_token must be a number"),
        ({"stages": 2.5}, "stages must be a whole number"),
        ({"width": None}, "width must be a whole number"),
        ({"method": "ppsd", "width": 1}, "it lacks 'layers_by_stage'"),
        ({"method": "ppsd", "width": 1, "layers_by_stage": [2, 2], "exit_layer": 4}, "inside the 4 layers"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused(changes, message):
    row = {"method": "pipedec", "stages": 4, "width": 8, "children": 8, "draft_steps": 1}
    row |= {"ticks_per_token": 1.3, "hit_rate": 0.9}
    assert len(read_hit_curve({"rows": [row]}).lines) == 1
    with pytest.raises(ValueError, match=re.escape(message)):
        read_hit_curve({"rows": [row | changes]})


# Memory.


@pytest.mark.parametrize(
    ("pair", "settings"),
    [
        (Pair(FIVE), EngineSettings("pipedec", stages=3, width=4, children=2)),
        (Pair(ODD), EngineSettings("best-first", stages=2, width=2, children=2, draft_steps=2, dtype=jnp.bfloat16)),
        (Pair(FIVE), EngineSettings("stpp", stages=4, width=3, children=2, depth=2)),
        (Pair(FIVE), EngineSettings("pp", stages=2)),
        (Pair(FIVE), EngineSettings("pipedec", stages=2, tensor_parallel=2, width=4, children=2)),
        (Pair(FIVE), EngineSettings("ppsd", stages=2, width=1, children=1, exit_layer=2)),
    ],
    ids=lambda value: value.method if isinstance(value, EngineSettings) else "",
)
def test_bytes_are_those_of_the_engine(pair, settings):
    target, draft, head = as_source(pair.target_config, target_weights(pair)), None, None
    if settings.method == "ppsd":
        head = exit_head(pair, ExitHeadConfig(exit_layer=2, variant="block"))
    elif settings.method != "pp":
        draft = as_source(pair.draft_config, draft_weights(pair))
    engine = Engine(target, draft, settings, vocab_size=VOCAB, exit_head=head)
    local = engine.new_local(engine.capacity_for(200))
    caches = {"target cache": placement.bytes_per_device(local.cache)}
    caches["draft cache"] = placement.bytes_per_device(local.drafter)
    expected = device_memory.engine_bytes(
        settings, target.config, draft.config if draft else None, 200, head.config if head else None
    )
    for device, row in zip(engine.mesh.devices.flat, engine.bytes_per_device(), strict=True):
        found = row | {name: sizes.get(device, 0) for name, sizes in caches.items()}
        assert {name: found[name] for name in expected} == expected


def test_a_layer_split_over_devices_leaves_its_norms_and_few_kv_heads_whole():
    config = geometry("llama-3.1-70b")
    assert tensor_share(config, 1) == 1
    assert tensor_share(config, 8) == pytest.approx(1 / 8, rel=1e-3)
    # 16 devices for 8 KV heads: keys and values (2 % of a layer) are no more than split in 8.
    split = 2 * 8192 * 8 * 128
    whole = layer_bytes(config, 1)
    assert tensor_share(config, 16) == pytest.approx((whole - split) / whole / 16 + split / whole / 8, 1e-3)
    with pytest.raises(ValueError, match=r"64 heads, 8 KV heads .* over 7 devices"):
        tensor_share(config, 7)
    held = device_memory.tensor_bytes(config, stages=2, tensor=8, slots=4096, item_bytes=2)
    assert sum(held.values()) == pytest.approx((2 * parameter_count(config) + 80 * 2 * 4096 * 1024 * 2) / 16, rel=1e-3)
