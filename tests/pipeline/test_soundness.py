"""NaN and infinity in the target: named by stage and tick where they would be drawn from, and harmless in guesses."""

from __future__ import annotations

import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipedec_jax import soundness
from pipedec_jax.pipeline import placement
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.progress import NOTHING, Progress, not_finite_error
from pipedec_jax.pipeline.split import StageSplit
from pipedec_jax.sampling import Sampling
from pipedec_jax.soundness import NotFiniteError
from tests.exactness import Shape, bench
from tests.oracle import Draw
from tests.random_pairs import FIVE, PAIRS, VOCAB, as_source, plain_steps, prompt_of, target_weights

SHAPE = Shape("pipedec", 4, 8, 4, FIVE)
"""Compiled for the grid as well."""
DRAW = Draw(0.9, top_k=30, top_p=0.95, seed=11)
PAIR = PAIRS[FIVE][1]
PROMPT = prompt_of(9, 1)
NEW = 30


def broken(**values: float) -> Engine:
    """The shared engine with some numbers of the target replaced: of `name/row`, the first one of that row."""
    shared = bench(SHAPE, "float64")
    engine = shared.load(PAIR)
    weights = {name: array.copy() for name, array in target_weights(PAIR).items()}
    for place, value in values.items():
        name, row = place.rsplit("/", 1)
        weights[name][int(row)].flat[0] = value
    with shared.x64():
        source = as_source(PAIR.target_config, weights)
        target = placement.place_target(engine.mesh, source, engine.target.split, jnp.dtype("float64"))
        engine.weights = engine.weights.replace(target=target)
    shared.pair = None  # the next to use it gets its own weights
    return engine


def start(engine: Engine, prompt: tuple[int, ...] = PROMPT) -> None:
    engine.start(prompt, max_new_tokens=NEW, sampling=Sampling(DRAW.temperature, DRAW.top_k, DRAW.top_p, DRAW.seed))


def caught(engine: Engine, pieces: tuple[int, ...] = (NEW,)) -> NotFiniteError:
    def run() -> None:
        for piece in pieces:
            engine.run(piece)

    with pytest.raises(NotFiniteError, match="not finite") as error:
        run()
    return error.value


@pytest.fixture(scope="module")
def plain() -> list[int]:
    return [step.token for step in plain_steps(PAIR, PROMPT, DRAW, NEW)]


@pytest.fixture(autouse=True)
def wide():
    with bench(SHAPE, "float64").x64():
        yield


def test_infinity_is_found_as_nan_is_in_living_rows_alone() -> None:
    rows = jnp.array([[1.0, jnp.inf], [-jnp.inf, 0.0], [0.0, jnp.nan], [1.0, 2.0], [jnp.nan, jnp.inf]])
    found = soundness.not_finite(rows, jnp.array([True, True, True, True, False]))
    assert found.tolist() == [True, True, True, False, False]


def test_bits_of_all_stages_add_up_to_what_each_found() -> None:
    bad = np.random.default_rng(0).random((40, 5)) < 0.3
    words = sum(np.asarray(soundness.to_bits(jnp.asarray(row), jnp.int32(k), 40)) for k, row in enumerate(bad))
    assert words.shape == (2, 5)
    log_prob = jnp.array([0.0, jnp.nan, -jnp.inf, -1.0, jnp.nan])
    places = np.asarray(soundness.places(jnp.asarray(words, jnp.int32), log_prob, 40))
    stages = bad * np.arange(1, 41)[:, None]
    assert np.array_equal(places[:-1], stages[:-1])
    assert np.array_equal(places[-1], np.where(bad[-1], 40, np.where(np.isfinite(log_prob), 0, 41)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_prompt_token_that_spoils_the_caches_is_an_error_before_the_first_tick(value: float) -> None:
    engine = broken(**{f"model.embed_tokens.weight/{PROMPT[4]}": value})
    start(engine)
    error = caught(engine)
    assert (error.stage, error.tick, error.progress.tokens) == (1, 0, [])
    assert "the output of the target's stage 1 of 4 (layers 1 to 2) is not finite (NaN or infinity) in pre" in str(
        error
    )


@pytest.mark.parametrize(
    ("matrix", "value", "stage"),
    [
        ("1.mlp.down_proj", np.nan, 1),
        ("2.self_attn.k_proj", np.nan, 2),  # what is cached is made finite
        ("3.self_attn.k_proj", np.inf, 3),
        ("4.self_attn.v_proj", np.nan, 4),
    ],
)
def test_the_stage_whose_layer_is_broken_is_named_with_the_tick(matrix: str, value: float, stage: int) -> None:
    engine = broken(**{f"model.layers.{matrix}.weight/3": value})
    start(engine, PROMPT[-1:])
    error = caught(engine)
    assert (error.stage, error.tick, error.progress.tokens) == (stage, stage, [])
    start(engine)
    error = caught(engine, (1,))
    assert (error.stage, error.tick) == (stage, 0), "in prefill, which the last token has no part in"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_named_as_such(value: float) -> None:
    # Of one token alone, whose sign differs from row to row.
    engine = broken(**{"lm_head.weight/17": value})
    start(engine)
    error = caught(engine)
    assert (error.stage, error.tick, error.progress.tokens) == (None, SHAPE.stages, [])
    assert "the target's logits are not finite (NaN or infinity) in tick 4, after 0 tokens" in str(error)


@pytest.mark.parametrize("pieces", [(NEW,), (1,) * NEW])
def test_the_answer_stops_where_its_own_token_is_unsound(plain: list[int], pieces: tuple[int, ...]) -> None:
    for token in [token for token in dict.fromkeys(plain[5:-1]) if token not in PROMPT][:3]:
        place = plain.index(token)
        start(broken())
        before = bench(SHAPE, "float64").engine.run(NEW)
        engine = broken(**{f"model.embed_tokens.weight/{token}": np.nan})
        start(engine)
        error = caught(engine, pieces)
        assert error.progress.tokens == plain[: place + 1] == before.tokens[: place + 1]
        assert error.progress.ticks == before.ticks[: place + 1]
        # It was sent in the tick after it was chosen, or earlier, as a guess.
        assert error.stage == 1
        sent = error.progress.ticks[place] + 1
        assert sent - SHAPE.stages < error.tick <= sent


def test_a_guess_that_is_unsound_hurts_nobody(plain: list[int]) -> None:
    """A token that the text has not, but the draft guesses: its rows are NaN from the first stage to the logits."""
    before: Progress = run_whole(broken())
    seen = 0
    absent = [token for token in range(VOCAB) if token not in plain and token not in PROMPT]
    engine = broken(**{f"model.embed_tokens.weight/{token}": np.nan for token in absent})
    start(engine)
    for count in range(1, NEW + 1):
        progress = engine.run(1)
        assert progress.tokens == plain[:count]
        shared = jax.device_get(engine._shared)
        flying = shared.pipe[shared.pipe < len(shared.unsound)]
        seen += int(np.sum(shared.unsound[flying] > 0))
    assert progress == before
    assert seen > NEW, "no guess was unsound"


def test_after_an_error_the_engine_goes_on_with_another_prompt(plain: list[int]) -> None:
    engine = broken(**{f"model.embed_tokens.weight/{plain[3]}": np.nan})
    start(engine)
    caught(engine)
    with pytest.raises(NotFiniteError):
        engine.run(1)
    assert run_whole(broken()).tokens == plain


def run_whole(engine: Engine) -> Progress:
    start(engine)
    return engine.run(NEW)


def test_a_stage_of_one_layer_is_named_so():
    progress = Progress([], [], [], [], [], 0, False)
    assert "stage 3 of 3 (layer 5) is not finite" in str(NotFiniteError(3, 3, (5, 5), 1, progress))


def test_layers_of_stages_of_different_lengths_are_counted_one_after_the_other():
    target = types.SimpleNamespace(split=StageSplit((1, 3, 2)))
    told = [str(not_finite_error(target, place, 7, NOTHING)) for place in (1, 2, 3, 4)]
    for text, part in zip(told, ("(layer 1)", "(layers 2 to 4)", "(layers 5 to 6)", "logits"), strict=True):
        assert part in text
    assert "in tick 7" in told[2]
    assert "in tick 6" in told[3], "the logits share the last stage's"


def test_the_error_comes_back_from_another_process_as_it_was() -> None:
    error = not_finite_error(bench(SHAPE, "float64").load(PAIR).target, 2, 7, NOTHING)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (type(error), str(error))
    assert (copy.stage, copy.tick, copy.progress) == (error.stage, error.tick, error.progress) == (2, 7, NOTHING)
