"""NaN in a hierarchy: the target's are named, whatever the form; the smaller models' are only bad guesses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

from pipedec_jax.soundness import NotFiniteError
from tests.hierarchy.families import SmallPair, decode, engine, load, plain, settings, sources, x64
from tests.oracle import GREEDY
from tests.random_pairs import VOCAB, as_source, prompt_of, target_weights

NEW = 30
TWO = settings(stages=(1, 1), passes=(4,))
"""Compiled by `test_exactness` as well."""
PROMPT = prompt_of(9, 0)


@pytest.fixture(autouse=True)
def wide() -> Iterator[None]:
    with x64():
        yield


def spoil(model: int, name: str, row: int | list[int]) -> None:
    """Put NaN into one or more rows of one model, and the sound weights into the others."""
    load(engine(TWO), 0)
    pair = SmallPair(seed=0)
    weights = {name: array.copy() for name, array in target_weights(pair).items()}
    if model:
        weights[name][row, ..., 0] = np.nan
        source = as_source(pair.target_config, weights)
    else:
        source = sources(0, 2)[0]
        source._arrays["embedding"] = np.array(source._arrays["embedding"])
        source._arrays["embedding"][row] = np.nan
    engine(TWO).models[model].place_weights(source, VOCAB)


def run(form: str):
    shared = engine(TWO)
    kept, shared.settings = shared.settings, dataclasses.replace(shared.settings, form=form)
    try:
        return decode(shared, PROMPT, NEW, GREEDY)
    finally:
        shared.settings = kept


@pytest.mark.parametrize("form", ["lockstep", "free"])
def test_the_answer_stops_where_its_own_token_is_unsound(form: str) -> None:
    expected = plain(0, PROMPT, NEW)
    token = next(token for token in expected[5:] if token not in PROMPT)
    spoil(1, "model.embed_tokens.weight", token)
    with pytest.raises(NotFiniteError, match=r"stage 1 of 1 \(layers 1 to 3\)") as error:
        run(form)
    place = expected.index(token)
    assert error.value.progress.tokens == expected[: place + 1]
    assert (error.value.stage, error.value.tick > 0) == (1, True)
    # Piece by piece, all that was chosen before comes without an error.
    engine(TWO).start(PROMPT, max_new_tokens=NEW)
    given = [engine(TWO).run(1).tokens]
    with pytest.raises(NotFiniteError):
        given.extend(engine(TWO).run(1).tokens for _ in range(NEW))
    assert given[-1] == expected[: place + 1]


def test_prefill_and_logits_are_named() -> None:
    spoil(1, "model.embed_tokens.weight", PROMPT[2])
    with pytest.raises(NotFiniteError, match="in prefill, after 0 tokens"):
        run("lockstep")
    spoil(1, "lm_head.weight", 5)
    with pytest.raises(NotFiniteError, match=r"the target's logits are not finite .* in tick 1, after 0 t"):
        run("lockstep")


@pytest.mark.parametrize("form", ["lockstep", "free"])
def test_a_smaller_model_that_gives_nan_changes_no_token(form: str) -> None:
    expected = plain(0, PROMPT, NEW)
    spoil(0, "", expected[4])
    found = run(form)
    assert found.tokens == expected
    if form == "lockstep":
        assert any(found.hits[5:]), "past that token it goes on"
    load(engine(TWO), 0)


def test_rows_that_were_dropped_are_not_held_against_later_ones() -> None:
    expected = plain(0, PROMPT, NEW)
    spoil(1, "model.embed_tokens.weight", sorted(set(range(VOCAB)) - {*PROMPT, *expected}))
    found = run("lockstep")
    assert found.tokens == expected
    assert not all(found.hits[:-1]), "what was wrongly guessed was read, and was not finite"
    load(engine(TWO), 0)
