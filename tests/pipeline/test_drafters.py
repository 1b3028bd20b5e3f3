"""Drafters: a user's own under every schedule, n-gram look-up against plain Python, and two drafters in one tree."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipedec_jax import transcript, tree
from pipedec_jax.drafters.base import Drafter, Proposals, View, check_proposals, new_state_of, proposed
from pipedec_jax.drafters.combined import CombinedDrafter
from pipedec_jax.drafters.ngram import NGramDrafter
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.settings import EXIT_ONLY, METHODS, EngineSettings
from pipedec_jax.sampling import Sampling, SamplingMode
from tests.oracle import GREEDY, Draw
from tests.random_pairs import FIVE, VOCAB, Pair, as_source, plain_steps, prompt_of, target_weights

PAIR = Pair(FIVE, 2, 0.3)
DRAWN = Draw(0.8, seed=3)
PROMPT = prompt_of(9, 1)


@dataclasses.dataclass(frozen=True)
class Bigrams(Drafter):
    """A drafter as a user would write one: a table of which tokens follow which."""

    children: int

    def propose(self, params: jax.Array, state: Any, view: View) -> tuple[Any, Proposals]:
        last = view.tree.token.at[view.frontier].get(mode="fill", fill_value=0)
        log_prob, token = jax.lax.top_k(params[last], self.children)
        return state, Proposals(token=token.astype(int), log_prob=log_prob)  # int64, as argmax gives there


def bigram_chances(text: list[int]) -> np.ndarray:
    """Chances `[V, V]` counted in a text."""
    counts = np.full((VOCAB, VOCAB), 0.01, np.float32)
    np.add.at(counts, (text[:-1], text[1:]), 1)
    return counts / counts.sum(axis=1, keepdims=True)


def sure(chances: np.ndarray) -> np.ndarray:
    """Log-probabilities over 0 of the likely ones, none of the others."""
    return np.where(chances > 0.1, chances, -np.inf).astype(np.float32)


def with_bigrams(method: str, width: int, children: int, stages: int = 3) -> Engine:
    """An engine that takes a table at every start."""
    choice = EngineSettings(
        method=method,
        stages=stages,
        width=width,
        children=children,
        draft_steps=3 if method == "best-first" else 1,
        depth=2,
        dtype=jnp.float64,
    )
    return Engine(
        as_source(PAIR.target_config, target_weights(PAIR)),
        None,
        choice,
        vocab_size=VOCAB,
        drafter=Bigrams(children=children),
        drafter_params=np.zeros((VOCAB, VOCAB), np.float32),
    )


GUESSING = [method for method in METHODS if method not in ("pp", *EXIT_ONLY)]


@pytest.mark.parametrize(("method", "draw"), list(zip(GUESSING, [DRAWN, GREEDY, DRAWN], strict=True)))
def test_a_drafter_of_ones_own_works_with_every_schedule(method: str, draw: Draw) -> None:
    with jax.enable_x64(True):
        engine = with_bigrams(method, width=4, children=3)
        assert engine.devices == 3
        expected = [step.token for step in plain_steps(PAIR, PROMPT, draw, 40)]
        for table in (np.log, sure):
            table = table(bigram_chances([*PROMPT, *expected]))
            engine.start(
                PROMPT, max_new_tokens=40, sampling=Sampling(draw.temperature, seed=draw.seed), drafter_params=table
            )
            progress = engine.run(40)
            assert progress.tokens == expected
            assert sum(progress.hits[:-1]) / 39 > 0.2, "the table was made from this text"


def test_guesses_of_another_shape_or_kind_are_named() -> None:
    drafter = Bigrams(children=3)
    numbers = {"token": jnp.zeros((4, 3), jnp.int32), "log_prob": jnp.zeros((4, 3), jnp.float32)}
    for right in (numbers, jax.tree.map(np.asarray, numbers), jax.tree.map(lambda array: array[:1], numbers)):
        check_proposals(drafter, Proposals(**right), 4)
    for name, wrong in (
        ("token", numbers["log_prob"]),
        ("log_prob", numbers["log_prob"][:, :2]),
        ("token", cast(Any, [[1, 2, 3]] * 4)),
    ):
        with pytest.raises(ValueError, match=rf"Bigrams.propose\(\) must give {name} as .*\[4, 3\]"):
            check_proposals(drafter, Proposals(**numbers | {name: wrong}), 4)

    class Shared(Bigrams):
        def settle(self, offer: Any, shares: Any, view: View) -> Proposals:
            return shares

    with pytest.raises(ValueError, match=r"Shared\.settle\(\) must give Proposals, not tuple"):
        check_proposals(Shared(children=3), cast(Any, ()), 4)
    with pytest.raises(ValueError, match=r"Shared\.settle\(\) must give token as integer"):
        check_proposals(Shared(children=3), Proposals(**numbers | {"token": numbers["log_prob"]}), 4)


def test_what_propose_gives_beside_proposals_is_named() -> None:
    numbers = Proposals(token=jnp.zeros((4, 3), jnp.int32), log_prob=jnp.zeros((4, 3), jnp.float32))
    state = {"count": jnp.zeros(1, jnp.int32)}

    class Giving(Bigrams):
        def propose(self, params: Any, state: Any, view: View) -> tuple[Any, Proposals]:
            return params

    view = cast(Any, None)
    good = ({"count": jnp.ones(1, jnp.int32)}, numbers)
    assert proposed(Giving(children=3), good, state, view) is good
    for result, message in (
        (numbers, r"must give two things, the new state and Proposals, not Proposals"),
        ((state, numbers, 3), r"must give two things, the new state and Proposals, not 3 things"),
        (((), numbers), r"must give a state of such arrays as it took, {'count': 'int32 \[1\]'}, not \(\)"),
        (({"count": jnp.ones(2, jnp.int32)}, numbers), r"not {'count': 'int32 \[2\]'}"),
        (({"count": jnp.ones(1)}, numbers), r"not {'count': 'float32 \[1\]'}"),
    ):
        for act in (functools.partial(proposed, Giving(children=3)), Giving(children=3).offer):
            with pytest.raises(ValueError, match=r"Giving\.propose\(\) .*" + message):
                act(result, state, view)


def test_a_state_without_an_axis_is_named() -> None:
    class Counting(Bigrams):
        def new_state(self, slots: int, dtype: Any) -> Any:
            return {"slots": jnp.zeros(slots), "count": jnp.zeros((), jnp.int32)}

    with pytest.raises(
        ValueError, match=r"Counting\.new_state\(\) must give arrays of at least one axis, not a single int32"
    ):
        new_state_of(Counting(children=3), 8, jnp.float32)
    assert new_state_of(Bigrams(children=3), 8, jnp.float32) == ()


@pytest.mark.parametrize("method", ["stpp", "pipedec", "best-first"])
def test_sure_guesses_never_take_the_roots_place(method: str) -> None:
    """With room for one node a tick, a guess sent before its parent would stop the pipe for ever."""
    with jax.enable_x64(True):
        engine = with_bigrams(method, width=1, children=4, stages=1)
        wrong = [step.token for step in plain_steps(PAIR, PROMPT, DRAWN, 40)]
        expected = [step.token for step in plain_steps(PAIR, PROMPT, GREEDY, 40)]
        table = sure(bigram_chances([*wrong, *expected, *wrong]))
        engine.start(PROMPT, max_new_tokens=40, drafter_params=table)
        assert engine.run(40).tokens == expected


CAPACITY, PLACES, WIDTH = 8, 24, 4


def view_of(text: list[int], path: list[int]) -> View:
    """A text whose last token is the root, and below it a chain of guesses; every node is in the frontier."""
    padded = np.zeros(PLACES, np.int32)
    padded[: len(text)] = text
    nodes = tree.plant(CAPACITY, 1, jnp.int32(text[-1]), jnp.int32(len(text) - 1))
    last = 0
    for token in path:
        parent = np.asarray([last], np.int32)
        nodes = tree.guess(nodes, parent, np.asarray([[token]], np.int32), np.zeros((1, 1), np.float32))
        nodes, index = tree.add(nodes, parent, np.zeros(1, np.int32))
        last = int(index[0])
    alive = np.flatnonzero(nodes.alive)
    frontier = np.asarray([*alive, *[CAPACITY] * (WIDTH - len(alive))], np.int32)
    return View(
        tree=nodes,
        text=transcript.begin(jnp.asarray(padded), jnp.int32(len(text)), jnp.int32(PLACES), jnp.asarray([-1])),
        committed=jnp.zeros(PLACES, bool),
        frontier=jnp.asarray(frontier),
        sampling=Sampling().arrays(),
        mode=SamplingMode(),
        sizes=(WIDTH,),
    )


def looked_up(text: list[int], context: list[int], drafter: NGramDrafter) -> dict[int, float]:
    """Chances of the tokens that followed the longest, then latest, places like the end of `context`."""
    chances = drafter.chances
    found = []
    for place in range(1, len(text)):
        length = 0
        while (
            length < len(chances)
            and length < min(place, len(context))
            and (text[place - 1 - length] == context[-1 - length])
        ):
            length += 1
        if length and chances[length - 1] > 0:
            found.append((length, place))
    result: dict[int, float] = {}
    left = 1.0
    for length, place in sorted(found, reverse=True)[: 4 * drafter.children]:
        if text[place] not in result and len(result) < drafter.children:
            result[text[place]] = left * chances[length - 1]
            left *= 1 - chances[length - 1]
    return result


def test_a_guess_that_is_sure_leaves_no_chance_to_others() -> None:
    drafter = NGramDrafter(children=3, chances=(0.5, 1.0))
    found = jax.device_get(drafter.propose(None, (), view_of([1, 2, 3, 1, 2, 5, 3, 2, 4, 1, 2], []))[1])
    guessed = dict(zip(found.token[0].tolist(), np.exp(found.log_prob[0]).tolist(), strict=True))
    assert guessed == {5: 1.0, **{token: 0.0 for token in guessed if token != 5}}


@pytest.mark.parametrize("chances", [(), (0.5, 1.5), (-0.1,), (float("nan"),)])
def test_chances_of_looked_up_guesses_must_be_chances(chances: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="chances must be numbers from 0 to 1"):
        NGramDrafter(children=2, chances=chances)


look_up = jax.jit(lambda view: NGramDrafter(children=3).propose(None, (), view)[1])


@settings(max_examples=80)
@given(
    text=st.lists(st.integers(1, 3), min_size=1, max_size=PLACES),
    path=st.lists(st.integers(1, 3), max_size=WIDTH - 1),
)
def test_n_grams_are_those_a_search_of_the_text_finds(text: list[int], path: list[int]) -> None:
    found = jax.device_get(look_up(view_of(text, path)))
    for row in range(WIDTH):
        guessed = {
            int(token): float(np.exp(log_prob))
            for token, log_prob in zip(found.token[row], found.log_prob[row], strict=True)
            if log_prob > -np.inf
        }
        context = [*text, *path[:row]]
        expected = looked_up(text, context, NGramDrafter(children=3)) if row <= len(path) else {}
        assert guessed == pytest.approx(expected, abs=1e-5)


def test_more_n_grams_than_a_text_has_places_are_asked_for() -> None:
    view, few, many = view_of([1, 2, 3, 1, 2], []), NGramDrafter(children=3), NGramDrafter(children=PLACES + 5)
    (_, some), (_, found) = (jax.jit(drafter.propose)(None, (), view) for drafter in (few, many))
    assert found.token.shape == found.log_prob.shape == (WIDTH, PLACES + 5)
    assert np.array_equal(found.token[0, :1], some.token[0, :1])
    assert np.array_equal(np.isfinite(found.log_prob), np.pad(np.isfinite(some.log_prob), ((0, 0), (0, PLACES + 2))))


@dataclasses.dataclass(frozen=True)
class Fixed(Drafter):
    """Proposes the same for every node."""

    token: tuple[int, ...]
    chance: tuple[float, ...]

    @property
    def children(self) -> int:
        return len(self.token)

    def propose(self, params: Any, state: Any, view: View) -> tuple[Any, Proposals]:
        W, K = view.frontier.shape[0], len(self.token)
        token = jnp.broadcast_to(jnp.asarray(self.token, jnp.int32), (W, K))
        log_prob = jnp.broadcast_to(jnp.log(jnp.asarray(self.chance, jnp.float32)), (W, K))
        return state, Proposals(token=token, log_prob=log_prob)


def test_two_drafters_join_their_guesses_without_doubles() -> None:
    joined = CombinedDrafter(Fixed((5, 6, 7), (0.5, 0.2, 0.0)), Fixed((6, 8, 7), (0.8, 0.1, 0.4)), trust=0.5)
    _, found = jax.jit(lambda view: joined.propose(None, (), view))(view_of([1, 2], []))
    guesses = [
        (int(token), round(float(np.exp(log_prob)), 4))
        for token, log_prob in zip(found.token[0], found.log_prob[0], strict=True)
        if log_prob > -np.inf
    ]
    assert guesses == [(5, 0.5), (6, 0.8), (8, 0.05), (7, 0.2)]
