"""What the engine promises beside its tokens: where it stops, what it compiles, holds and refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipedec_jax.model.exit_head import ExitHeadConfig
from pipedec_jax.model.parameters import parameter_shapes
from pipedec_jax.pipeline import placement
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.progress import NOTHING
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.sampling import Sampling
from pipedec_jax.vocabulary import shard_size
from tests import oracle
from tests.exactness import LONGEST, Bench, Shape, bench, hit_rate
from tests.grids import SMALL_GRID
from tests.oracle import GREEDY, Draw
from tests.random_pairs import (
    CONTEXT,
    FIVE,
    ODD,
    PAIRS,
    SIXTEEN,
    VOCAB,
    Pair,
    as_source,
    draft_weights,
    exit_head,
    plain_steps,
    prompt_of,
    target_weights,
)

SHAPE = Shape("pipedec", 4, 8, 4, FIVE)
"""Compiled for the grid as well, with filters; the other modes of it are not."""
FILTERED = Draw(0.9, top_k=30, top_p=0.95, seed=11)
PAIR = PAIRS[FIVE][1]


def tokens_of(pair: Pair, prompt: tuple[int, ...], draw: Draw, new_tokens: int) -> list[int]:
    return [step.token for step in plain_steps(dataclasses.replace(pair, noise=0.0), prompt, draw, new_tokens)]


@pytest.mark.parametrize("method", ["pp", "ppsd", "pipedec"])
def test_rows_that_a_device_is_given_beyond_the_batch_change_nothing(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_of(9, 1)
    found = []
    for least in (1, 3):
        monkeypatch.setattr(placement, "least_rows", lambda _, least=least: least)
        with jax.enable_x64(True):
            exit_layer = 2 if method == "ppsd" else None
            settings = EngineSettings(
                method=method, stages=2, width=1, children=1, exit_layer=exit_layer, dtype=jnp.float64
            )
            source = as_source(PAIR.target_config, target_weights(PAIR))
            draft = as_source(PAIR.draft_config, draft_weights(PAIR)) if method == "pipedec" else None
            head = exit_head(PAIR, ExitHeadConfig(2, "block", 24, 12)) if exit_layer else None
            engine = Engine(source, draft, settings, vocab_size=VOCAB, drafter="model", exit_head=head)
            engine.start(prompt, max_new_tokens=12, sampling=Sampling(temperature=0.9, seed=11))
            assert engine.target.least_rows == least
            found.append(engine.run(12))
    assert found[1].tokens == tokens_of(PAIR, prompt, Draw(0.9, seed=11), 12)
    assert found[0].ticks == found[1].ticks


COMPILED = [(shape, kind) for shape, kind, _ in SMALL_GRID if shape.stages == 4 and shape.geometry != SIXTEEN]


@hypothesis.settings(max_examples=8)
@hypothesis.given(data=st.data())
def test_any_request_in_any_pieces_gives_the_text_of_plain_decoding(data: st.DataObject) -> None:
    shape, kind = data.draw(st.sampled_from(COMPILED))
    pair = data.draw(st.sampled_from(PAIRS[shape.geometry]))
    prompt = tuple(data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40)))
    new_tokens = data.draw(st.integers(1, 40))
    draw = GREEDY
    if kind != "greedy":
        draw = Draw(data.draw(st.floats(0.25, 2)), seed=data.draw(st.integers(0, 2**32 - 1)))
    if kind == "filtered":
        # At least one filter, or the mode is another one.
        draw = dataclasses.replace(draw, top_k=data.draw(st.integers(1, 50)), top_p=data.draw(st.floats(0.1, 1)))
    ends = data.draw(st.lists(st.integers(0, VOCAB - 1), max_size=4))
    pieces = data.draw(st.lists(st.integers(0, 9), max_size=4))
    expected = tokens_of(pair, prompt, draw, new_tokens)
    stop = next((i + 1 for i, token in enumerate(expected) if token in ends), len(expected))
    progress = bench(shape, "float64").decode(pair, prompt, new_tokens, draw, ends, pieces)
    assert progress.tokens == expected[:stop]
    assert progress.done


@pytest.mark.parametrize("position", [0, 1, 7])
def test_decoding_stops_with_the_end_token(position: int) -> None:
    prompt = prompt_of(9, 1)
    expected = tokens_of(PAIR, prompt, FILTERED, 32)
    end = expected[position]
    stop = expected.index(end) + 1
    progress = bench(SHAPE, "float64").decode(PAIR, prompt, 32, FILTERED, end_tokens=(VOCAB - 1 - end, end))
    assert progress.tokens == expected[:stop]
    assert progress.done


def test_pieces_give_the_same_tokens_in_the_same_ticks_as_one_run() -> None:
    prompt = prompt_of(9, 1)
    whole = bench(SHAPE, "float64").decode(PAIR, prompt, 40, FILTERED)
    pieces = bench(SHAPE, "float64").decode(PAIR, prompt, 40, FILTERED, pieces=[1, 1, 2, 3, 5, 8])
    assert pieces == whole


def test_a_run_ends_with_the_tick_that_commits_the_token_asked_for() -> None:
    engine = bench(SHAPE, "float64").load(PAIR)
    with bench(SHAPE, "float64").x64():
        sampling = Sampling(FILTERED.temperature, FILTERED.top_k, FILTERED.top_p, FILTERED.seed)
        engine.start(prompt_of(9, 1), max_new_tokens=40, sampling=sampling)
        for count in range(1, 12):
            progress = engine.run(1)
            assert len(progress.tokens) == count
            assert not progress.done
        assert engine.run(0) == progress


def test_a_cache_that_is_just_large_enough_loses_no_slot() -> None:
    """`check_state` finds a slot for every node after every piece, to the last of the cache."""
    prompt = prompt_of(60, 2)
    progress = bench(SHAPE, "float64").decode(PAIR, prompt, LONGEST - 60, FILTERED, pieces=[1] * (LONGEST - 61))
    assert progress.tokens == tokens_of(PAIR, prompt, FILTERED, LONGEST - 60)
    with pytest.raises(ValueError, match="capacity"):
        bench(SHAPE, "float64").decode(PAIR, prompt, LONGEST - 59, FILTERED)


def test_the_last_chunk_of_a_prompt_may_reach_beyond_the_cache() -> None:
    shape, _, _ = next(program for program in SMALL_GRID if program[0].method == "pp" and program[0].stages == 4)
    prompt, one = prompt_of(LONGEST - 2, 2), bench(shape, "float64")
    settings = one.load(PAIR).settings
    start = (len(prompt) - 2) // settings.prefill_width * settings.prefill_width
    assert start + settings.prefill_width > (settings.capacity or 0)
    assert one.decode(PAIR, prompt, 2, FILTERED).tokens == tokens_of(PAIR, prompt, FILTERED, 2)


def test_nothing_is_read_from_a_slot_that_this_prompt_has_not_written() -> None:
    """Neither by the target (tokens) nor by the draft (hits): caches full of large numbers change nothing."""
    prompt = prompt_of(20, 3)
    before = bench(SHAPE, "float64").decode(PAIR, prompt, 60, FILTERED)
    engine = bench(SHAPE, "float64").engine
    assert engine is not None
    assert engine._local is not None
    with bench(SHAPE, "float64").x64():
        capacity, local = engine._local
        engine._local = capacity, jax.tree.map(lambda array: array + 1e3, local)
    after = bench(SHAPE, "float64").decode(PAIR, prompt, 60, FILTERED)
    assert after == before


DRAFTED = [
    (shape, kind)
    for shape, kind, _ in SMALL_GRID
    if (shape.method, shape.stages, kind)
    in {("stpp", 3, "sampled"), ("best-first", 4, "sampled"), ("best-first", 8, "greedy"), ("pipedec", 4, "filtered")}
]


@pytest.mark.parametrize(("shape", "kind"), DRAFTED, ids=[f"{shape}, {kind}" for shape, kind in DRAFTED])
def test_the_draft_has_all_of_the_text_in_its_context(shape: Shape, kind: str) -> None:
    """A committed token that the draft never saw would cost hits and nothing else, so tokens cannot show it."""
    pair = PAIRS[shape.geometry][1]
    prompt, draw = prompt_of(9, 1), {"greedy": GREEDY, "sampled": Draw(0.8, seed=2), "filtered": FILTERED}[kind]
    progress = bench(shape, "float64").decode(pair, prompt, 60, draw)
    engine = bench(shape, "float64").load(pair)
    assert engine._shared is not None
    assert engine._local is not None
    committed = np.flatnonzero(engine._shared.committed)
    assert len(committed) == len(prompt) + 59
    draft = oracle.Llama(pair.draft_config, draft_weights(pair), np.float64, CONTEXT)
    for token in (*prompt, *progress.tokens[:-1]):
        draft.feed(token)
    for layer, cache in enumerate(engine._local[1].drafter):
        held = np.asarray(cache.key.addressable_shards[-1].data)[:, :, committed]
        expected = np.moveaxis(draft.keys[layer, : len(committed)], 0, 2)
        # Slots are in no order: every key must be in one.
        apart = np.abs(expected[:, :, :, None] - held[:, :, None, :]).max(axis=(0, 1))
        assert apart.min(axis=1).max() < 1e-8
        assert len(set(apart.argmin(axis=1).tolist())) == len(committed)


@contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """The compilations that happen inside."""
    events: list[str] = []

    def listen(event: str, _: float, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_prompts_of_all_lengths_seeds_and_filters_compile_nothing_new() -> None:
    decoder = bench(SHAPE, "float64")
    decoder.decode(PAIR, prompt_of(3, 0), 10, FILTERED, pieces=[1])
    engine = decoder.load(PAIR)
    seconds, programs = engine.compile_seconds, len(engine._programs)
    with counted_compilations() as events:
        jax.jit(lambda x: x * 3 + len(events))(np.float32(1)).block_until_ready()
        assert len(events) == 1, "compilations are not counted"
        for length in (1, 2, 16, 17, 50, 80):
            draw = Draw(0.5 + length / 100, top_k=length, top_p=0.9, seed=length)
            decoder.decode(PAIR, prompt_of(length, 4), 20, draw, end_tokens=(length,), pieces=[3])
        assert len(events) == 1
    assert engine.compile_seconds == seconds > 0
    assert len(engine._programs) == programs


EQUAL = {
    # Layers that pass everything through make the two-layer draft equal to the target.
    "width 8": (Bench(Shape("pipedec", 4, 8, 1, ODD), "float64", 520), Pair(ODD, 7, 0.0)),
    # Scoring a level by probability can drop a chain that is not clearly the best; a sharp head makes it so.
    "children 3": (Bench(Shape("pipedec", 8, 8, 3, SIXTEEN), "float64", 520), Pair(SIXTEEN, 7, 0.0, sharpness=60.0)),
    "best-first": (
        Bench(Shape("best-first", 4, 6, 3, FIVE, steps=2), "float64", 520),
        Pair(FIVE, 7, 0.0, sharpness=60.0),
    ),
}


@pytest.mark.parametrize("name", EQUAL)
def test_a_draft_equal_to_the_target_hits_always_over_500_tokens(name: str) -> None:
    decoder, pair = EQUAL[name]
    prompt, new_tokens = prompt_of(11, 5), 500
    progress = decoder.decode(pair, prompt, new_tokens)
    assert hit_rate(progress) == 1
    assert progress.ticks[-1] <= decoder.shape.stages + new_tokens - 1
    assert decoder.shape.steps > 1 or progress.ticks[-1] == decoder.shape.stages + new_tokens - 1
    assert progress.tokens == tokens_of(pair, prompt, GREEDY, new_tokens)
    assert len(set(progress.tokens[-100:])) > 5, "a text that repeats itself shows little"


@pytest.mark.parametrize("name", ["width 8", "best-first"])
def test_a_draft_equal_to_the_target_hits_always_when_tokens_are_drawn(name: str) -> None:
    """The draft guesses under the target's own noise, so the same weights draw the same tokens."""
    decoder, pair = EQUAL[name]
    prompt, draw = prompt_of(11, 5), Draw(0.9, seed=4)
    progress = decoder.decode(pair, prompt, 200, draw)
    assert progress.tokens == tokens_of(pair, prompt, draw, 200)
    assert hit_rate(progress) == 1


def test_one_stage_keeps_nothing_in_flight_and_never_hits() -> None:
    shape = next(shape for shape, _, _ in SMALL_GRID if shape.stages == 1 and shape.method == "pipedec")
    progress = bench(shape, "float64").decode(PAIR, prompt_of(9, 1), 20)
    assert hit_rate(progress) == 0
    assert progress.ticks == list(range(1, 21))


def test_plain_pipeline_parallelism_sends_one_node_a_token() -> None:
    shape, _, _ = next(program for program in SMALL_GRID if program[0].method == "pp" and program[0].stages == 4)
    progress = bench(shape, "float64").decode(PAIR, prompt_of(9, 1), 20, FILTERED)
    assert progress.ticks == list(range(4, 84, 4))
    assert progress.nodes == 20
    assert not any(progress.hits)


def test_embedding_and_head_are_sharded_and_stages_hold_their_own_layers_alone() -> None:
    decoder = bench(SHAPE, "float64")
    decoder.decode(PAIR, prompt_of(3, 0), 1, FILTERED)
    engine = decoder.load(PAIR)
    sizes = engine.bytes_per_device()
    assert len(sizes) == engine.devices == SHAPE.stages + 1
    config = as_source(PAIR.target_config, target_weights(PAIR)).config
    item, rows = 8, shard_size(config.vocab_size, engine.devices)
    layer = sum(int(np.prod(shape)) for path, shape in parameter_shapes(config).items() if path.startswith("layers/0/"))
    for size in sizes:
        assert size["embedding and head"] == 2 * rows * config.width * item
        assert size["draft embedding and head"] == 2 * PAIR.draft_config["vocab_size"] * config.width * item
        assert size["target layers"] == engine.target.split.longest * layer * item
    assert rows < config.vocab_size / (engine.devices - 1)
    assert engine.target.split.longest * SHAPE.stages < config.layers + SHAPE.stages
    slots = LONGEST + (SHAPE.stages + 1) * SHAPE.width + 1
    pair = 2 * slots * config.kv_heads * config.head_size * item
    assert {size["target cache"] for size in sizes} == {engine.target.split.longest * pair}
    assert {size["draft cache"] for size in sizes} == {PAIR.draft_layers * pair}


# What is refused.


def make_engine(**changes: Any) -> Engine:
    draft = changes.pop("draft", as_source(PAIR.draft_config, draft_weights(PAIR)))
    vocab_size, devices = changes.pop("vocab_size", VOCAB), changes.pop("devices", None)
    drafter = changes.pop("drafter", "model")
    target = as_source(PAIR.target_config, target_weights(PAIR))
    settings = EngineSettings(**({"stages": 2, "width": 2, "children": 2} | changes))
    return Engine(target, draft, settings, vocab_size=vocab_size, devices=devices, drafter=drafter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": 6}, r"stages \(6\).*layers \(5\)"),
        ({"stages": 0}, "stages must be a whole number of at least 1"),
        ({"width": 0}, "width must be a whole number of at least 1"),
        ({"children": 0}, "children must be a whole number of at least 1"),
        ({"children": VOCAB + 1}, "children"),
        ({"prefill_width": 0}, "prefill_width must be a whole number of at least 1"),
        ({"method": "pipdec"}, "pp, stpp, pipedec.*pipdec"),
        ({"draft_steps": 0}, "draft_steps must be a whole number of at least 1"),
        ({"draft_steps": 2}, "draft_steps is not for pipedec"),
        ({"pool": 0}, "pool must be a whole number of at least 1"),
        ({"pool": 3, "width": 4, "method": "best-first"}, "must hold at least a batch: width is 4"),
        ({"pool": 64}, "pool is for best-first, not for pipedec"),
        ({"method": "stpp", "depth": 65}, "depth must be at most 64"),
        ({"sharpness": 0}, "sharpness must be"),
        ({"noise": "pink"}, "noise must be one of shared, independent, none, not 'pink'"),
        ({"drafter": "oracle"}, "drafter must be one of model, ngram, both"),
        ({"drafter": "ngram"}, "a draft model or a drafter that does without"),
        ({"draft": None}, "needs a draft"),
        ({"vocab_size": VOCAB + 1}, "embedding rows"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine(**changes)


def test_too_few_devices_are_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"needs 3 devices.*there are 2.*device_count=3"):
        make_engine(devices=jax.devices()[:2])


@pytest.mark.parametrize(
    ("prompt", "request_", "message"),
    [
        ([], {}, "empty"),
        ([VOCAB], {}, f"token {VOCAB}.*0 to {VOCAB - 1}"),
        ([-1], {}, "token -1"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1"),
        ([1] * 10, {"max_new_tokens": CONTEXT - 9}, f"context of {CONTEXT}"),
    ],
)
def test_a_request_that_does_not_fit_is_refused(prompt: list[int], request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine().start(prompt, **({"max_new_tokens": 4} | request_))


def test_running_before_a_start_is_refused() -> None:
    with pytest.raises(RuntimeError, match="start"):
        make_engine().run(1)


def test_a_pipe_that_loses_a_row_is_reported_instead_of_ticking_on() -> None:
    decoder = bench(SHAPE, "float64")
    engine = decoder.load(PAIR)
    with decoder.x64():
        sampling = Sampling(FILTERED.temperature, FILTERED.top_k, FILTERED.top_p, FILTERED.seed)
        engine.start(prompt_of(9, 1), max_new_tokens=40, sampling=sampling)
        engine.run(2)
        shared = engine._shared
        assert shared is not None
        # Everything in flight disappears.
        engine._shared = shared.replace(pipe=jnp.full_like(shared.pipe, shared.tree.capacity))
        with pytest.raises(RuntimeError, match="progress"):
            engine.run(2)


def test_the_default_capacity_holds_prompt_answer_and_everything_in_flight() -> None:
    engine = make_engine(stages=4, width=16)
    for length in (1, 100, 160, 161, 600):
        capacity = engine.capacity_for(length)
        assert capacity > length + 4 * 16 + 16
        assert capacity & (capacity - 1) == 0, "a power of two, so that few programs serve all lengths"


def test_what_came_in_its_parents_batch_or_late_is_a_hit_as_well() -> None:
    assert dataclasses.replace(NOTHING, delays=[0, 1, 5, -1]).hits == [True, True, True, False]
