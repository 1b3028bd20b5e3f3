"""The engine against the oracle: compiled shapes, the comparison, and the grids of what is compared."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from pipedec_jax.drafters.model import Noise
from pipedec_jax.pipeline import placement
from pipedec_jax.pipeline.engine import Engine, Progress
from pipedec_jax.pipeline.settings import DRAFTERS, METHODS, EngineSettings, tree_slots
from pipedec_jax.sampling import Sampling
from tests.oracle import GREEDY, Draw
from tests.random_pairs import (
    FIVE,
    ODD,
    PAIRS,
    SIXTEEN,
    VOCAB,
    Pair,
    as_source,
    draft_weights,
    plain_steps,
    prompt_of,
    target_weights,
)

LONGEST = 120
"""Prompt and answer of one combination at most (but see `Bench`)."""
PREFILL = {"five layers": 16, "sixteen layers": 7, "odd": 1000}
"""Prompt tokens per prefill chunk; one exceeds the cache."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a compiled engine is made for."""

    method: str
    stages: int
    width: int
    children: int
    geometry: str
    steps: int = 1
    """Draft steps of best-first, levels of STPP."""
    drafter: str = "model"
    others: tuple[tuple[str, Any], ...] = ()
    """Further settings by name."""

    def __str__(self) -> str:
        tree = f" width {self.width} children {self.children}" if self.method != "pp" else ""
        tree += f" steps {self.steps}" if self.steps > 1 else ""
        tree += f" drafter {self.drafter}" if self.drafter != "model" else ""
        tree += "".join(f" {name} {value}" for name, value in self.others)
        return f"{self.method} {self.stages} stages{tree}, {self.geometry}"

    @property
    def drafts(self) -> bool:
        """Whether there is a draft model."""
        return self.method != "pp" and self.drafter != "ngram"

    def settings(self, longest: int, dtype: Any) -> EngineSettings:
        """For an engine whose cache is only just large enough for so many tokens."""
        settings = EngineSettings(
            method=self.method,
            stages=self.stages,
            width=self.width,
            children=self.children,
            draft_steps=self.steps if self.method == "best-first" else 1,
            depth=self.steps,
            dtype=dtype,
            prefill_width=PREFILL[self.geometry],
            **dict(self.others),
        )
        return dataclasses.replace(settings, capacity=longest + tree_slots(settings))


class Bench:
    """An engine of one shape and dtype whose weights can be exchanged.

    The cache is only just large enough for `longest` tokens, so that slots are scarce and get reused soon.
    """

    def __init__(self, shape: Shape, dtype: str = "float64", longest: int = LONGEST) -> None:
        self.shape, self.dtype, self.longest = shape, dtype, longest
        self.pair: Pair | None = None
        self.engine: Engine | None = None

    def x64(self) -> Any:
        """The context all of this engine's work runs in."""
        return jax.enable_x64(self.dtype == "float64")

    def load(self, pair: Pair) -> Engine:
        """The engine with the pair's weights."""
        if pair == self.pair and self.engine is not None:
            return self.engine
        target = as_source(pair.target_config, target_weights(pair))
        draft = as_source(pair.draft_config, draft_weights(pair)) if self.shape.drafts else None
        dtype = jnp.dtype(self.dtype)
        with self.x64():
            if self.engine is None:
                settings = self.shape.settings(self.longest, dtype)
                self.engine = Engine(target, draft, settings, vocab_size=VOCAB, drafter=self.shape.drafter)
            else:
                mesh, split = self.engine.mesh, self.engine.target.split
                weights = self.engine.weights.replace(target=placement.place_target(mesh, target, split, dtype))
                if draft is not None:
                    weights = weights.replace(drafter=placement.place_draft(mesh, draft, dtype))
                self.engine.weights = weights
        self.pair = pair
        return self.engine

    def decode(
        self,
        pair: Pair,
        prompt: Sequence[int],
        new_tokens: int,
        draw: Draw = GREEDY,
        end_tokens: Sequence[int] = (),
        pieces: Sequence[int] = (),
    ) -> Progress:
        """Decode one prompt, after `pieces` of so many tokens in one go, checking the state after each."""
        engine = self.load(pair)
        with self.x64():
            sampling = Sampling(temperature=draw.temperature, top_k=draw.top_k, top_p=draw.top_p, seed=draw.seed)
            engine.start(prompt, max_new_tokens=new_tokens, sampling=sampling, end_tokens=end_tokens)
            for piece in (*pieces, new_tokens):
                progress = engine.run(piece)
                check_state(engine)
        check_ticks(progress, self.shape.stages, drafting=int(self.shape.method == "stpp"))
        return progress


@functools.cache
def bench(shape: Shape, dtype: str) -> Bench:
    """One bench per shape and dtype, so that every test finds its programs compiled."""
    return Bench(shape, dtype)


def check_state(engine: Engine) -> None:
    """The invariants that hold between ticks: slots of sent nodes, committed text, and what is in flight."""
    shared = jax.device_get(engine._shared)
    nodes, capacity = shared.tree, shared.tree.token.shape[0]
    slots = len(shared.committed)
    sent = nodes.alive & (nodes.sent_tick > 0)
    assert np.all((nodes.slot[sent] >= 0) & (nodes.slot[sent] < slots)), "a sent node has no slot"
    owning = nodes.alive & (nodes.slot < slots)
    assert len(set(nodes.slot[owning].tolist())) == np.sum(owning), "two nodes share a slot"
    assert not np.any(shared.committed[nodes.slot[owning]]), "a node holds a slot of committed text"
    assert np.all(owning[nodes.alive & nodes.drafted]), "a drafted node has no slot"
    assert nodes.alive[nodes.root], "the root is dead"
    # The root's token is the text's last, and the cache holds all before it.
    length = int(shared.text.length)
    assert nodes.position[nodes.root] == length - 1
    assert nodes.token[nodes.root] == shared.text.token[length - 1]
    assert np.sum(shared.committed) == length - 1, "a committed token lost its slot"
    flying = shared.pipe[shared.pipe < capacity]
    assert np.all(sent[flying]), "a node that is dead or was not sent is in flight"
    assert len(set(flying.tolist())) == len(flying), "a node is in flight twice"
    # Every living sent node is in flight or has left with its choice; otherwise the loop would wait for ever.
    left = set(flying.tolist()) | set(np.flatnonzero(nodes.known & nodes.alive).tolist())
    assert set(np.flatnonzero(sent).tolist()) <= left, "a sent node was lost"
    assert np.array_equal(nodes.ancestor, nodes.ancestor & nodes.alive[:, None] & nodes.alive[None, :])


def check_ticks(progress: Progress, stages: int, drafting: int = 0) -> None:
    """The formula of a filled pipe, late hits included: a miss costs a refill, a hit its delay.

    `drafting` ticks go before every refill.
    """
    assert progress.hits == [delay >= 0 for delay in progress.delays]
    expected, ticks = drafting + stages, []
    for delay in progress.delays:
        ticks.append(expected)
        expected += drafting + stages if delay < 0 else delay
    assert progress.ticks == ticks


def hit_rate(progress: Progress) -> float:
    """Hits per token, counted after every token but the last."""
    hits = progress.hits[:-1]
    return sum(hits) / len(hits)


@dataclasses.dataclass(frozen=True)
class Combination:
    """One thing to decode."""

    shape: Shape
    pair: Pair
    prompt: tuple[int, ...]
    draw: Draw
    new_tokens: int

    def __str__(self) -> str:
        p, d = self.pair, self.draw
        drawn = (
            f"temperature {d.temperature} top-k {d.top_k} top-p {d.top_p} seed {d.seed}" if d != GREEDY else "greedy"
        )
        return f"{self.shape}, pair {p.seed} {p.deep} {p.noise}, prompt of {len(self.prompt)}, {drawn}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a combination compares with plain decoding."""

    combination: Combination
    tokens: int
    """Tokens compared."""
    hit_rate: float
    ticks: int
    late: int
    """Late hits."""
    other: tuple[tuple[int, float], ...]
    """Tokens that plain decoding would not have given after the same text so far: their index, and how far its scores
    were from them (see `oracle.Step.distance`). None of them is the same as equal texts."""
    log_prob_error: float
    """Largest difference of the tokens' log-probabilities."""

    @property
    def distance(self) -> float:
        """The largest; 0 when the texts are equal."""
        return max((distance for _, distance in self.other), default=0.0)


def compare(combination: Combination, dtype: str = "float64") -> Outcome:
    """Decode with the engine and hold every token against what the oracle would give in its place."""
    c = combination
    progress = bench(c.shape, dtype).decode(c.pair, c.prompt, c.new_tokens, c.draw)
    tokens = tuple(progress.tokens)
    pair = dataclasses.replace(c.pair, noise=0.0)
    steps = plain_steps(pair, c.prompt, c.draw, c.new_tokens, dtype)
    assert len(tokens) == len(steps) == c.new_tokens
    if tokens != tuple(step.token for step in steps):
        steps = plain_steps(pair, c.prompt, c.draw, c.new_tokens, dtype, text=tokens)
    pairs = list(enumerate(zip(tokens, steps, strict=True)))
    other = tuple((i, step.distance(token)) for i, (token, step) in pairs if token != step.token)
    errors = [abs(progress.logprobs[i] - step.log_prob) for i, (token, step) in pairs if token == step.token]
    return Outcome(
        combination=c,
        tokens=len(tokens),
        hit_rate=hit_rate(progress),
        ticks=progress.ticks[-1],
        late=sum(delay > 1 for delay in progress.delays),
        other=other,
        log_prob_error=max(errors, default=0.0),
    )


# What is compared.

PROMPT_LENGTHS = (5, 1, 17, 40, 2, 16, 33, 60, 3, 48, 18, 7)
"""One token (nothing to prefill), one chunk and its borders, several chunks."""
DRAWS = {
    "greedy": [GREEDY],
    "sampled": [Draw(0.5), Draw(0.8), Draw(1.0), Draw(1.4)],
    "filtered": [
        Draw(0.8, top_k=5),
        Draw(1.0, top_p=0.9),
        Draw(0.7, top_k=20, top_p=0.8),
        Draw(1.3, top_k=50, top_p=0.95),
        Draw(1.0, top_k=1),
        Draw(1.5, top_p=0.3),
        Draw(0.6, top_k=VOCAB + 50),
    ],
}
"""Each kind is one compiled mode."""


def combinations(shape: Shape, kind: str, count: int, offset: int = 0, new_tokens: int = 32) -> Iterator[Combination]:
    """`count` combinations for one compiled program, changing everything else in turn, pair by pair."""
    pairs, draws = PAIRS[shape.geometry], DRAWS[kind]
    for i in sorted(range(offset, offset + count), key=lambda i: i % len(pairs)):
        draw = draws[i % len(draws)]
        if draw.temperature:
            draw = dataclasses.replace(draw, seed=(2**32 - 1) // (i + 1))
        length = PROMPT_LENGTHS[i % len(PROMPT_LENGTHS)]
        yield Combination(shape, pairs[i % len(pairs)], prompt_of(length, i), draw, new_tokens)


SMALL_GRID: list[tuple[Shape, str, int]] = [
    (Shape("pp", 1, 1, 1, FIVE), "greedy", 4),
    (Shape("pp", 4, 1, 1, FIVE), "filtered", 7),
    (Shape("pp", 16, 1, 1, SIXTEEN), "sampled", 2),
    (Shape("pipedec", 1, 4, 2, FIVE), "greedy", 4),
    (Shape("pipedec", 2, 1, 1, FIVE), "greedy", 16),
    (Shape("pipedec", 2, 6, 4, ODD), "sampled", 16),
    (Shape("pipedec", 2, 6, 4, ODD), "filtered", 21),
    (Shape("pipedec", 3, 4, 2, SIXTEEN), "greedy", 16),
    (Shape("pipedec", 3, 4, 2, SIXTEEN), "filtered", 14),
    (Shape("pipedec", 4, 16, 8, FIVE), "greedy", 20),
    (Shape("pipedec", 4, 8, 4, FIVE), "filtered", 21),
    (Shape("pipedec", 4, 3, 5, ODD), "greedy", 16),
    (Shape("pipedec", 5, 6, 3, SIXTEEN), "sampled", 12),
    (Shape("pipedec", 8, 8, 4, SIXTEEN), "greedy", 10),
    (Shape("pipedec", 8, 8, 4, SIXTEEN), "filtered", 7),
    (Shape("pipedec", 14, 5, 3, SIXTEEN), "greedy", 6),
    (Shape("pipedec", 16, 12, 6, SIXTEEN), "greedy", 6),
    (Shape("stpp", 3, 4, 3, FIVE, steps=3), "sampled", 12),
    (Shape("best-first", 2, 4, 3, ODD), "filtered", 14),
    (Shape("best-first", 4, 8, 4, FIVE, steps=3), "greedy", 16),
    (Shape("best-first", 4, 8, 4, FIVE, steps=3), "sampled", 16),
    (Shape("best-first", 8, 6, 3, SIXTEEN, steps=2, drafter="both"), "greedy", 8),
    (Shape("best-first", 2, 6, 3, FIVE, steps=4, drafter="ngram"), "greedy", 8),
]
"""Compiled programs of the tests: shape, mode, and how many combinations each decodes."""


def full_grid() -> list[tuple[Shape, str, int]]:
    """The script's grid: all stage counts, modes, and widths and children about as users choose them."""
    grid = []
    for stages in (1, 2, 3, 4, 5, 8, 14, 16):
        geometries = (FIVE, ODD, SIXTEEN) if stages <= 5 else (SIXTEEN,)
        for geometry in geometries:
            grid.append((Shape("pp", stages, 1, 1, geometry), "sampled", 4))
            for width, children in ((1, 1), (4, 2), (8, 4), (16, 8), (32, 16)):
                for method, steps in (("pipedec", 1), ("stpp", 4), ("best-first", 1), ("best-first", 3)):
                    for drafter in ("model", "ngram", "both"):
                        shape = Shape(method, stages, width, children, geometry, steps, drafter)
                        grid += [(shape, kind, 12) for kind in DRAWS]
    return grid


@st.composite
def any_combination(draw: st.DrawFn) -> Combination:
    """Every setting of every method and drafter, on up to five stages."""
    method = draw(st.sampled_from(METHODS))
    width, steps, others = draw(st.integers(1, 9)), 1, {}
    if method != "pp":
        others["sharpness"] = draw(st.sampled_from((0.5, 1.0, 2.0)))
        others["noise"] = draw(st.sampled_from(get_args(Noise)))
    if method in ("stpp", "best-first"):
        steps = draw(st.integers(1, 4))
    if method == "best-first":
        others["pool"] = draw(st.none() | st.integers(width, 4 * width))
    shape = Shape(
        method=method,
        stages=draw(st.integers(1, 5)),
        width=width,
        children=draw(st.integers(1, 5)),
        geometry=draw(st.sampled_from((FIVE, ODD))),
        steps=steps,
        drafter=draw(st.sampled_from(DRAFTERS)),
        others=tuple(others.items()),
    )
    drawn = Draw(
        draw(st.sampled_from((0.0, 0.5, 0.9, 1.4))),
        draw(st.integers(0, 40)),
        draw(st.sampled_from((1.0, 0.9, 0.5))),
        draw(st.integers(0, 2**32 - 1)),
    )
    prompt = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40))
    return Combination(shape, draw(st.sampled_from(PAIRS[shape.geometry])), tuple(prompt), drawn, 40)


NEAR_TIE = {"float64": 0.0, "float32": 1e-3, "bfloat16": 3.0}
"""Largest distance (see `oracle.Step.distance`) at which another token counts as a near tie; logits have a standard
deviation of about 5. bfloat16 keeps 8 bits of each activation, and these random models amplify errors: plain decoding
in bfloat16 gives as many other tokens, as far off (`as_plain`)."""


def as_plain(combination: Combination) -> Combination:
    """The same text wanted from plain decoding on one device, one token at a time."""
    return dataclasses.replace(combination, shape=Shape("pp", 1, 1, 1, combination.shape.geometry))


def run_grid(grid: Sequence[tuple[Shape, str, int]], dtype: str, new_tokens: int = 32) -> Iterator[list[Outcome]]:
    """The outcomes of each program in turn; programs of one shape share an engine while they follow each other."""
    for number, (shape, kind, count) in enumerate(grid):
        yield [compare(c, dtype) for c in combinations(shape, kind, count, number, new_tokens)]
        if number + 1 == len(grid) or grid[number + 1][0] != shape:
            bench.cache_clear()


def summary(outcomes: Sequence[Outcome]) -> str:
    """Counts in one line."""
    distances = [distance for outcome in outcomes for _, distance in outcome.other]
    rates = sorted(outcome.hit_rate for outcome in outcomes)
    parts = [
        f"{len(outcomes)} texts",
        f"{sum(bool(outcome.other) for outcome in outcomes)} differ",
        f"{sum(outcome.tokens for outcome in outcomes)} tokens",
        f"{len(distances)} differ",
        f"the farthest by {max(distances, default=0):.1e}",
        f"log-probabilities within {max(outcome.log_prob_error for outcome in outcomes):.1e}",
        f"hit rates {rates[0]:.2f} to {rates[-1]:.2f}, {sum(0.3 <= rate <= 0.95 for rate in rates)} in 0.3..0.95",
        f"{sum(outcome.late for outcome in outcomes)} late hits",
    ]
    return ", ".join(parts)


def histogram(outcomes: Sequence[Outcome]) -> str:
    """How many combinations have which hit rate."""
    counts = np.histogram([outcome.hit_rate for outcome in outcomes], bins=10, range=(0, 1))[0]
    return "hit rates in tenths: " + " ".join(str(count) for count in counts)
