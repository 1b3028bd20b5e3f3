"""The engine against the oracle: compiled shapes, the comparison, and the grids of what is compared."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pipedec_jax.model.exit_head import ExitHeadConfig
from pipedec_jax.pipeline import placement
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.fit import tree_slots
from pipedec_jax.pipeline.progress import Progress
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.sampling import Sampling
from tests.oracle import GREEDY, Draw
from tests.random_pairs import (
    VOCAB,
    Pair,
    as_source,
    draft_weights,
    exit_head,
    plain_steps,
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
    head: ExitHeadConfig | None = None
    """The exit head, where that drafts."""

    def __str__(self) -> str:
        tree = f" width {self.width} children {self.children}" if self.method != "pp" else ""
        tree += f" steps {self.steps}" if self.steps > 1 else ""
        tree += f" drafter {self.drafter}" if self.drafter != "model" else ""
        tree += f" head {self.head.name}" if self.head else ""
        tree += "".join(f" {name} {value}" for name, value in self.others)
        return f"{self.method} {self.stages} stages{tree}, {self.geometry}"

    @property
    def drafts(self) -> bool:
        """Whether there is a draft model."""
        return self.method != "pp" and self.drafter != "ngram" and self.head is None

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
            exit_layer=self.head.exit_layer if self.head else None,
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
        head = exit_head(pair, self.shape.head) if self.shape.head else None
        dtype = jnp.dtype(self.dtype)
        with self.x64():
            if self.engine is None:
                settings = self.shape.settings(self.longest, dtype)
                self.engine = Engine(
                    target, draft, settings, vocab_size=VOCAB, drafter=self.shape.drafter, exit_head=head
                )
            else:
                mesh, split = self.engine.mesh, self.engine.target.split
                weights = self.engine.weights.replace(target=placement.place_target(mesh, target, split, dtype))
                if draft is not None:
                    weights = weights.replace(drafter=placement.place_draft(mesh, draft, dtype))
                if head is not None:
                    weights = weights.replace(drafter=placement.place_exit_head(mesh, head, target, dtype))
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
        if self.shape.method == "eesd":
            check_rounds(progress, engine)
        else:
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


def check_rounds(progress: Progress, engine: Engine) -> None:
    """EESD's ticks: every token comes at the end of a round of k e + N, and a round ends with a token not guessed."""
    length, split = engine.settings.draft_length, engine.target.split
    expected, ticks, accepted = length * split.exit + split.stages, [], 0
    for delay in progress.delays:
        ticks.append(expected)
        assert delay in (-1, split.exit)
        accepted = accepted + 1 if delay > 0 else 0
        assert accepted <= length
        expected += length * split.exit + split.stages if delay < 0 else 0
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
        late=sum(delay > max(1, bench(c.shape, dtype).load(c.pair).target.split.exit) for delay in progress.delays),
        other=other,
        log_prob_error=max(errors, default=0.0),
    )
