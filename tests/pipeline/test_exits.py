"""Drafting at an exit of the target: tokens, ticks, and that heads guess in the pipe what they would guess alone."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipedec_jax.analysis.simulator import Simulator
from pipedec_jax.drafters.combined import CombinedDrafter
from pipedec_jax.drafters.ngram import NGramDrafter
from pipedec_jax.drafters.replay import ReplayAtExit, ReplayDrafter
from pipedec_jax.model.exit_head import ExitHead, ExitHeadConfig
from pipedec_jax.model.parameters import read_tree
from pipedec_jax.modeled.exit_cost import ppsd_ticks
from pipedec_jax.pipeline import placement
from pipedec_jax.pipeline.engine import Engine, make_request
from pipedec_jax.pipeline.fit import check_fit
from pipedec_jax.pipeline.placement import OWN, SAME
from pipedec_jax.pipeline.prefill import begin
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.pipeline.split import StageSplit, split_at_exit
from pipedec_jax.pipeline.state import System
from pipedec_jax.pipeline.tick import tick
from pipedec_jax.sampling import GREEDY
from tests.exactness import Outcome, bench, compare
from tests.grids import EXIT_GRID, combinations
from tests.oracle import Draw
from tests.random_pairs import FIVE, PAIRS, VOCAB, Pair, as_source, exit_head, prompt_of, target_weights
from tests.whole_exit import exit_logits

CHAIN, TREE, EESD = (shape for shape, _, _ in EXIT_GRID)


@functools.cache
def outcomes(number: int) -> list[Outcome]:
    shape, kind, count = EXIT_GRID[number]
    return [compare(c) for c in combinations(shape, kind, count, offset=number)]


@pytest.mark.parametrize("number", range(len(EXIT_GRID)), ids=[f"{shape}, {kind}" for shape, kind, _ in EXIT_GRID])
def test_tokens_and_their_log_probabilities_equal_plain_decoding_in_float64(number: int) -> None:
    for outcome in outcomes(number):
        assert not outcome.other, outcome
        assert outcome.log_prob_error < 2e-6, outcome
    rates = [outcome.hit_rate for outcome in outcomes(number)]
    assert 0.3 < np.mean(rates) < 0.95, rates


def test_a_chain_takes_e_ticks_for_a_hit_and_a_refill_for_a_miss() -> None:
    drawn = Draw(0.8, seed=3)
    for number, pair in enumerate(PAIRS[FIVE]):
        progress = bench(CHAIN, "float64").decode(pair, prompt_of(20, number), 60, drawn)
        hits = sum(progress.hits[:-1])
        assert 0 < hits < 59
        assert set(progress.delays) <= {-1, 2}
        assert progress.ticks[-1] == ppsd_ticks(5, 2, hits, 59 - hits)


def alone(pair: Pair, head: ExitHead, text: list[int]) -> np.ndarray:
    """The head's favourite after every token of a text, computed at once with a causal mask."""
    source = as_source(pair.target_config, target_weights(pair))
    params: Any = jax.tree.map(jnp.asarray, head.params)
    logits = jax.jit(functools.partial(exit_logits, head.config, source.config))
    padded = np.pad(np.asarray(text, np.int32), (0, 100 - len(text)))
    found = np.asarray(logits(params, read_tree(source), padded)[0])
    return np.argmax(found[: len(text), :VOCAB], axis=-1)


def test_a_head_with_a_block_guesses_in_the_pipe_what_it_guesses_alone() -> None:
    """Its cache never changes a token, only the hits: a hole or a wrong mask in it would show here alone."""
    assert EESD.head is not None
    length, compared = 4, 0
    for number, pair in enumerate(PAIRS[FIVE][:3]):
        prompt = prompt_of((33, 2, 20)[number], number)  # Several chunks, and one row, of prefill.
        progress = bench(EESD, "float64").decode(pair, prompt, 60)
        with jax.enable_x64(True):
            favourite = alone(pair, exit_head(pair, EESD.head), [*prompt, *progress.tokens])[len(prompt) - 1 : -1]
        # A round ends after `length` accepted tokens and one more, or with the first that is another.
        accepted = 0
        for token, guess, hit in zip(progress.tokens, favourite, progress.hits, strict=True):
            assert hit == (accepted < length and token == guess)
            accepted = accepted + 1 if hit else 0
            compared += hit
    assert compared > 40


def test_a_head_that_shares_the_vocabulary_guesses_behind_a_norm_of_its_own() -> None:
    """Its rows go through the target's head in one product with rows behind the target's norm."""
    assert CHAIN.head is not None
    pair, shared, prompt = PAIRS[FIVE][0], bench(CHAIN, "float64"), prompt_of(20, 0)
    engine, target = shared.load(pair), as_source(pair.target_config, target_weights(pair))
    head = exit_head(pair, CHAIN.head)
    norm = np.asarray(head.params["final_norm"])
    other = norm * np.random.default_rng(0).uniform(0.2, 2.0, norm.shape)
    head = dataclasses.replace(head, params={**head.params, "final_norm": other})
    with shared.x64():
        drafter = placement.place_exit_head(engine.mesh, head, target, jnp.dtype("float64"))
        engine.weights = engine.weights.replace(drafter=drafter)
    try:
        progress = shared.decode(pair, prompt, 60, Draw(1e-6))  # greedy in effect, by a program that is compiled
    finally:
        shared.pair = None  # the next to use it gets its own weights
    with shared.x64():
        favourite = alone(pair, head, [*prompt, *progress.tokens])[len(prompt) - 1 : -1]
    assert progress.hits == [token == guess for token, guess in zip(progress.tokens, favourite, strict=True)]
    assert 5 < sum(progress.hits) < 55


def products_with_the_vocabulary(engine: Engine, system: System) -> int:
    """How many products with a slice of the target's head a tick's program holds."""
    capacity = engine.capacity_for(20)
    shared = begin(system, make_request([0], 1, capacity, GREEDY), jnp.zeros((), jnp.int32))
    own = jax.tree.map(lambda leaf: leaf.sharding.spec, engine.weights)
    spread = jax.shard_map(
        functools.partial(tick, system), mesh=engine.mesh, in_specs=(own, SAME, OWN), out_specs=(SAME, OWN)
    )
    program = jax.jit(spread).lower(engine.weights, shared, engine.new_local(capacity)).as_text()
    rows, width = engine.weights.target.output.sharding.shard_shape(engine.weights.target.output.shape)
    return len(re.findall(f"stablehlo.dot_general .*tensor<{rows}x{width}xf64>", program))


def test_one_product_serves_the_target_and_an_exit_that_shares_its_head() -> None:
    engine = bench(CHAIN, "float64").load(PAIRS[FIVE][0])
    tied = engine.system()
    own = dataclasses.replace(tied.drafter, head=ExitHeadConfig(2, "norm-linear"))
    with jax.enable_x64(True):
        assert products_with_the_vocabulary(engine, tied) == 1
        both = CombinedDrafter(tied.drafter, NGramDrafter(1))
        assert products_with_the_vocabulary(engine, dataclasses.replace(tied, drafter=both)) == 1
        # The shapes are the same, and so are the weights: only the head says that they are not the target's.
        assert products_with_the_vocabulary(engine, dataclasses.replace(tied, drafter=own)) == 2


def test_simulated_ticks_from_an_exit_are_the_engines() -> None:
    pair = PAIRS[EESD.geometry][1]
    engine = bench(EESD, "float64").load(pair)
    target = as_source(pair.target_config, target_weights(pair))
    assert EESD.head is not None
    with jax.enable_x64(True):
        head = exit_head(pair, EESD.head)
        simulator = Simulator(target, None, engine.settings, vocab_size=VOCAB, exit_head=head)
        for seed, length in ((1, 9), (2, 30)):
            prompt = prompt_of(length, seed)
            real = bench(EESD, "float64").decode(pair, prompt, 60)
            found = simulator.run(prompt, real.tokens)
            assert (found.tokens, found.ticks, found.delays) == (real.tokens, real.ticks, real.delays)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # Layers, stages, exit layer, what the head weighs in layers; layers of each stage, stages of the exit path.
        ((16, 4, 4, 0.0), ((4, 4, 4, 4), 1)),
        ((16, 4, 8, 1.1), ((5, 3, 4, 4), 2)),
        ((16, 8, 2, 1.0), ((2, 2, 2, 2, 2, 2, 2, 2), 1)),
        ((16, 8, 4, 1.1), ((3, 1, 2, 2, 2, 2, 2, 2), 2)),
        ((16, 8, 2, 1.1), ((2, 2, 2, 2, 2, 2, 2, 2), 1)),
        ((16, 4, 8, 0.0), ((4, 4, 4, 4), 2)),
        ((5, 5, 3, 9.0), ((1, 1, 1, 1, 1), 3)),
        ((16, 2, 5, 2.0), ((5, 11), 1)),
    ],
)
def test_stages_are_split_so_that_a_token_is_quick_with_the_head(
    sizes: tuple[int, int, int, float], expected: tuple[tuple[int, ...], int]
) -> None:
    assert split_at_exit(*sizes) == StageSplit(*expected)


def test_no_other_split_makes_a_token_quicker() -> None:
    def splits(layers: int, stages: int) -> list[tuple[int, ...]]:
        if stages == 1:
            return [(layers,)]
        return [(n, *rest) for n in range(1, layers - stages + 2) for rest in splits(layers - n, stages - 1)]

    def token(count: tuple[int, ...], e: int, head: float) -> float:
        longest = max(layers + head * (k + 1 == e) for k, layers in enumerate(count))
        return longest * (0.8 * e + 0.2 * len(count))

    for layers, stages, head in ((7, 3, 0.0), (7, 4, 1.4), (8, 5, 2.6), (6, 6, 1.0)):
        for layer in range(1, layers):
            found = split_at_exit(layers, stages, layer, head)
            assert found.exit > 0
            assert sum(found.count[: found.exit]) == layer
            sums = [(split, np.cumsum(split).tolist()) for split in splits(layers, stages)]
            times = [token(split, ends.index(layer) + 1, head) for split, ends in sums if layer in ends[:-1]]
            assert token(found.count, found.exit, head) == min(times)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "ppsd"}, "method 'ppsd' drafts at an exit of the target: give exit_layer"),
        ({"method": "eesd"}, "give exit_layer"),
        ({"method": "pp", "exit_layer": 2}, "method 'pp' has no exit"),
        ({"method": "stpp", "exit_layer": 2}, "method 'stpp' has no exit"),
        ({"method": "ppsd", "exit_layer": 0}, "exit_layer must be a whole number of at least 1"),
        ({"method": "pipedec", "exit_stages": 1}, "exit_stages is for an exit"),
        ({"method": "best-first", "exit_layer": 2, "draft_steps": 2}, "draft_steps must be 1 at an exit"),
        ({"method": "best-first", "exit_layer": 2, "pool": 20}, "pool is for guesses extended before they are sent"),
        ({"method": "eesd", "exit_layer": 2, "width": 2}, "eesd drafts a chain: width and children must be 1"),
        ({"method": "eesd", "exit_layer": 2, "draft_length": 0}, "draft_length must be"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineSettings(**{"width": 1, "children": 1} | values)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"exit_layer": 5}, {}, "exit layer 5 lies not inside the target's 5 layers; choose 1 to 4"),
        ({"stages": 1}, {}, "an exit needs from 2 stages to as many as the target's layers"),
        ({"stages": 6}, {}, r"as many as the target's layers \(5\), not 6"),
        ({"exit_stages": 3}, {}, "exit_stages must be 1 to 2 for 4 stages and an exit after 2 of 5 layers, not 3"),
        ({}, {"head": None}, "exit_layer 2 needs an exit head, or a drafter of your own at an exit"),
        ({}, {"head": ExitHeadConfig(3)}, "the exit head is for exit layer 3, not 2"),
        ({}, {"draft": True}, "with an exit the target drafts for itself"),
        ({}, {"drafter": "ngram"}, "drafter 'ngram' does without an exit"),
        ({}, {"drafter": ReplayDrafter(1, VOCAB), "head": None}, "exit_layer 2 needs an exit head"),
        ({"exit_layer": None, "method": "pipedec"}, {"drafter": ReplayAtExit(1, VOCAB)}, "needs exit_layer"),
        ({"children": 102}, {}, "must not exceed the number of tokens"),
    ],
)
def test_parts_that_do_not_fit_are_refused(settings: dict[str, Any], options: dict[str, Any], message: str) -> None:
    config = as_source(PAIRS[FIVE][0].target_config, target_weights(PAIRS[FIVE][0])).config
    chosen = EngineSettings(**{"method": "ppsd", "stages": 4, "exit_layer": 2, "width": 1, "children": 1} | settings)
    given = {"head": ExitHeadConfig(2), "drafter": "model"} | options
    draft = dataclasses.replace(config, layers=1) if given.pop("draft", False) else None
    with pytest.raises(ValueError, match=message):
        check_fit(chosen, config, draft, VOCAB, **given)
