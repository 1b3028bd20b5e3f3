"""A recording: the answer and its ticks as without, a program without it as if it were not there, and what it tells."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipedec_jax.model.exit_head import ExitHeadConfig
from pipedec_jax.pipeline import tick
from pipedec_jax.pipeline.engine import Engine, make_request
from pipedec_jax.pipeline.placement import OWN, SAME
from pipedec_jax.pipeline.prefill import prefill
from pipedec_jax.pipeline.progress import Progress
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.pipeline.state import System
from pipedec_jax.recording.history import Answer, Commit, Layout, Recording, read_history
from pipedec_jax.recording.tape import record_ticks
from pipedec_jax.sampling import GREEDY
from tests.exactness import Shape
from tests.oracle import GREEDY as GREEDY_DRAW
from tests.random_pairs import (
    FIVE,
    PAIRS,
    VOCAB,
    as_source,
    draft_weights,
    exit_head,
    plain_steps,
    prompt_of,
    target_weights,
)

PAIR = PAIRS[FIVE][1]
PROMPT = prompt_of(9, 1)
NEW_TOKENS = 40
HEAD = ExitHeadConfig(2, "norm-linear", tied=True)
SHAPES = {
    "pp": Shape("pp", 3, 1, 1, FIVE),
    "stpp": Shape("stpp", 2, 3, 2, FIVE, steps=2),
    "pipedec": Shape("pipedec", 3, 4, 2, FIVE),
    "best-first": Shape("best-first", 3, 4, 2, FIVE, steps=2),
    "ppsd": Shape("ppsd", 4, 3, 2, FIVE, head=HEAD),
    "eesd": Shape("eesd", 4, 1, 1, FIVE, head=HEAD),
}
CHEAP = ("best-first",)
"""The others tell as much and take their compiling; here nodes come and go also where nothing is sent."""
PLAIN = "pp"
"""The cheapest to decode once more without recording."""
METHODS = [pytest.param(name, marks=() if name in CHEAP else pytest.mark.slow) for name in SHAPES]


@functools.cache
def engine_of(name: str, record: bool) -> Engine:
    shape = SHAPES[name]
    settings = dataclasses.replace(shape.settings(120, jnp.float32), record=record)
    return Engine(
        as_source(PAIR.target_config, target_weights(PAIR)),
        as_source(PAIR.draft_config, draft_weights(PAIR)) if shape.drafts else None,
        settings,
        vocab_size=VOCAB,
        exit_head=exit_head(PAIR, HEAD) if shape.head else None,
    )


def decoded(engine: Engine, pieces: tuple[int, ...] = ()) -> Progress:
    engine.start(PROMPT, max_new_tokens=NEW_TOKENS)
    for piece in pieces:
        engine.run(piece)
    return engine.run(NEW_TOKENS)


@functools.cache
def recorded(name: str) -> tuple[Progress, Recording]:
    engine = engine_of(name, record=True)
    return decoded(engine), engine.recording()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == PLAIN else pytest.mark.slow) for name in SHAPES]
)
def test_recorded_answers_have_the_same_tokens_in_the_same_ticks(name: str) -> None:
    assert recorded(name)[0] == decoded(engine_of(name, record=False))


@pytest.mark.parametrize("name", METHODS)
def test_recorded_tokens_are_those_of_plain_decoding(name: str) -> None:
    progress, recording = recorded(name)
    steps = plain_steps(dataclasses.replace(PAIR, noise=0.0), PROMPT, GREEDY_DRAW, NEW_TOKENS, "float32")
    assert progress.tokens == recording.tokens == [step.token for step in steps]


@pytest.mark.parametrize("name", METHODS)
def test_every_tick_is_told_once_with_what_it_committed(name: str) -> None:
    progress, recording = recorded(name)
    assert [one.number for one in recording.ticks] == list(range(1, progress.ticks[-1] + 1))
    commits = [(one.number, commit) for one in recording.ticks for commit in one.committed]
    assert [number for number, _ in commits] == progress.ticks
    assert [commit.index for _, commit in commits] == list(range(NEW_TOKENS))
    assert [commit.delay is not None for _, commit in commits] == progress.hits
    assert sum(one.cost for one in recording.ticks) == pytest.approx(progress.costs[-1], rel=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_a_node_is_at_the_stage_that_its_sending_says_until_it_is_pruned(name: str) -> None:
    progress, recording = recorded(name)
    stages = recording.layout.stages
    places: dict[int, list[tuple[int, int]]] = {}
    for one in recording.ticks:
        for stage, batch in enumerate(one.stages):
            if batch is None:
                continue
            assert batch.sent == one.number - stage
            assert 0 <= batch.dead < batch.size or (batch.dead == batch.size and not batch.live)
            for number in batch.live:
                places.setdefault(number, []).append((one.number, stage))
    assert sum(len(one.stages[0].live) for one in recording.ticks if one.stages[0]) == progress.nodes
    last = recording.ticks[-1].number
    for node in recording.nodes:
        if node.sent is None:
            assert node.number not in places
            continue
        end = min(node.sent + stages - 1, last if node.pruned is None else node.pruned)
        if node.committed and node.chosen is None:
            end = last
        assert places[node.number] == [(node.sent + k, k) for k in range(end - node.sent + 1)]
        assert node.chosen in (None, node.sent + stages - 1)
        assert node.born <= node.sent + 1


@pytest.mark.parametrize("name", METHODS)
def test_the_text_is_a_path_of_nodes_and_a_miss_begins_a_new_tree(name: str) -> None:
    _, recording = recorded(name)
    commits = [commit for one in recording.ticks for commit in one.committed]
    before = recording.ticks[0].root
    assert recording.nodes[before].token == PROMPT[-1]
    for commit in commits:
        node = recording.nodes[commit.node]
        if commit.delay is not None:
            assert node.parent == before
            assert node.sent is not None
            assert commit.delay == node.sent - recording.nodes[before].sent
        assert node.position == recording.nodes[before].position + 1
        assert recording.nodes[before].choice == node.token
        before = commit.node
    assert {node.number for node in recording.nodes if node.fate == "text"} == {commit.node for commit in commits} | {
        recording.ticks[0].root
    }


@pytest.mark.parametrize("name", [name for name in METHODS if name.values != (PLAIN,)])
def test_guesses_become_the_children_of_what_was_extended(name: str) -> None:
    _, recording = recorded(name)
    guessed: dict[int, dict[int, float]] = {}
    for one in recording.ticks:
        for draft in one.drafts:
            for number, guesses in zip(draft.extended, draft.guesses, strict=True):
                if number is not None:
                    assert recording.nodes[number].number in one.tree
                    guessed.setdefault(number, dict(guesses))
    children = [node for node in recording.nodes if node.parent is not None]
    assert children
    for node in children:
        assert node.token in guessed[node.parent]


def test_pieces_tell_the_same_as_one_run() -> None:
    _, recording = recorded("best-first")
    engine = engine_of("best-first", record=True)
    decoded(engine, pieces=(1, 0, 3, 7))
    assert engine.recording() == recording


def test_without_a_recorder_the_program_is_as_if_there_were_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its jaxpr is compared: with what a tick shows to those who look, and with nothing shown."""
    engine = engine_of("ppsd", record=False)
    capacity = engine.capacity_for(len(PROMPT) + NEW_TOKENS)
    system = System(
        target=engine.target,
        drafter=engine._drafter,
        schedule=engine._schedule,
        sampling=GREEDY.mode,
        draft_steps=engine.settings.steps,
    )
    own = jax.tree.map(lambda leaf: leaf.sharding.spec, engine.weights)
    request = make_request(PROMPT, NEW_TOKENS, capacity, GREEDY)

    def spread(function: Any, *specs: Any) -> Any:
        function = functools.partial(function, system)
        return jax.shard_map(function, mesh=engine.mesh, in_specs=(own, *specs), out_specs=(SAME, OWN))

    local = engine.new_local(capacity)
    begin = spread(lambda system, *arguments: prefill(system, 8, *arguments), SAME, OWN)
    shared, _ = jax.eval_shape(begin, engine.weights, request, local)
    arguments = (engine.weights, shared, local, np.int32(0), np.int32(0))

    def program(loop: Any) -> str:
        return str(jax.make_jaxpr(spread(loop, SAME, OWN, SAME, SAME))(*arguments))

    plain = program(tick.run_ticks)
    monkeypatch.setattr(tick, "Moment", lambda **_: None)
    assert program(lambda *given: tick.run_ticks(*given)) == plain
    monkeypatch.undo()
    assert len(program(record_ticks)) > len(plain)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_record_must_be_true_or_false(value: object) -> None:
    with pytest.raises(ValueError, match="record must be True or False"):
        EngineSettings(record=value)  # pyright: ignore[reportArgumentType]


def test_a_decoder_that_does_not_record_says_how_to() -> None:
    engine = engine_of(PLAIN, record=False)
    with pytest.raises(ValueError, match="record=True"):
        engine.recording()


def test_the_stage_that_drafts_too_says_so() -> None:
    at_exit = Layout("ppsd", stages=3, width=1, drafter=False, exit=2)
    assert at_exit.ranks == ["stage 1", "stage 2, exit", "stage 3"]
    assert Layout("pipedec", stages=2, width=1, drafter=True).ranks == ["stage 1", "stage 2", "draft"]


@pytest.mark.parametrize(("exit_stage", "lag"), [(0, 1), (1, 1), (3, 3)])
def test_a_hit_is_late_beyond_the_stages_of_the_exit(exit_stage: int, lag: int) -> None:
    layout = Layout("ppsd", stages=4, width=1, drafter=False, exit=exit_stage)
    recording = read_history([], layout, Answer([], [], []))
    kinds = [recording.kind(Commit(0, 0, delay)) for delay in (None, 0, lag, lag + 1)]
    assert kinds == ["miss", "hit", "hit", "late hit"]
