"""The engine against the oracle: random models that give real hits, compiled shapes, and the comparison.

Models are random but not flat, and their greedy text does not loop. The draft is the target without its deep layers,
plus noise: how much the deep layers count (`deep`) and the noise set the hit rate, without training. Weights of
another pair of the same geometry go into a compiled engine as they are, so few programs serve many combinations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pipedec_jax.config import LlamaConfig, RopeScaling
from pipedec_jax.model.parameters import MemorySource, nest
from pipedec_jax.pipeline import placement
from pipedec_jax.pipeline.engine import Engine, EngineSettings, Progress, tree_slots
from pipedec_jax.sampling import Sampling
from tests import oracle
from tests.oracle import GREEDY, Draw

VOCAB = 101
"""Ids that are tokens, in every geometry."""
SHALLOW = 2
"""Layers of the target that `Pair.deep` leaves as they are."""
CONTEXT = 640
LONGEST = 120
"""Prompt and answer of one combination at most (but see `Bench`)."""


def hugging_face_config(layers: int, **changes: Any) -> dict[str, Any]:
    """A small `config.json`."""
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    }
    return config | changes


GEOMETRIES: dict[str, dict[str, Any]] = {
    "five layers": hugging_face_config(5),
    "sixteen layers": hugging_face_config(16),
    # All at once: padded vocabulary, tied embeddings, one KV head, an odd number of heads, llama3 RoPE.
    "odd": hugging_face_config(
        5,
        vocab_size=109,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=6,
        tie_word_embeddings=True,
        rope_theta=500.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 40,
        },
    ),
}
DRAFT_ROWS = {"five layers": VOCAB, "sixteen layers": VOCAB, "odd": 104}
"""Embedding rows of the draft: in one geometry padded differently from the target's."""
PREFILL = {"five layers": 16, "sixteen layers": 7, "odd": 1000}
"""Prompt tokens per prefill chunk; one exceeds the cache."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A target and a draft, by the numbers they are drawn from."""

    geometry: str
    seed: int = 0
    deep: float = 0.3
    """Weight of all layers but the first two; 0 makes them pass everything through."""
    noise: float = 0.0
    """Of the draft's matrices, relative to the target's own."""
    sharpness: float = 5.0
    """Scale of the head, and so of the logits."""
    draft_layers: int = SHALLOW
    """Layers of the draft: the first ones of the target."""

    @functools.cached_property
    def target_config(self) -> dict[str, Any]:
        """The target's `config.json`."""
        return GEOMETRIES[self.geometry]

    @functools.cached_property
    def draft_config(self) -> dict[str, Any]:
        """The draft's `config.json`."""
        rows = DRAFT_ROWS[self.geometry]
        return self.target_config | {"num_hidden_layers": self.draft_layers, "vocab_size": rows}


@functools.lru_cache(maxsize=64)
def target_weights(pair: Pair) -> dict[str, np.ndarray]:
    """The target's weights under Hugging Face's names, float64."""
    c = pair.target_config
    random = np.random.default_rng(pair.seed)
    D, F, A = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    queries, keys = c["num_attention_heads"] * A, c["num_key_value_heads"] * A

    def matrix(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
        return random.normal(size=(rows, columns)) * scale / np.sqrt(columns)

    def norm() -> np.ndarray:
        return 1 + 0.1 * random.normal(size=D)

    # A tied embedding is the head too; a token would then mostly predict itself, so its rows are small.
    tied = c["tie_word_embeddings"]
    weights = {"model.embed_tokens.weight": matrix(c["vocab_size"], D, pair.sharpness if tied else D**0.5)}
    for layer in range(c["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        scale = (6.0 if tied else 3.0) * (1 if layer < SHALLOW else pair.deep)
        weights[name + "input_layernorm.weight"] = norm()
        weights[name + "self_attn.q_proj.weight"] = matrix(queries, D, 2)
        weights[name + "self_attn.k_proj.weight"] = matrix(keys, D, 2)
        weights[name + "self_attn.v_proj.weight"] = matrix(keys, D)
        weights[name + "self_attn.o_proj.weight"] = matrix(D, queries, scale)
        weights[name + "post_attention_layernorm.weight"] = norm()
        weights[name + "mlp.gate_proj.weight"] = matrix(F, D, 2)
        weights[name + "mlp.up_proj.weight"] = matrix(F, D)
        weights[name + "mlp.down_proj.weight"] = matrix(D, F, scale)
    weights["model.norm.weight"] = norm()
    if not tied:
        weights["lm_head.weight"] = matrix(c["vocab_size"], D, pair.sharpness)
    return weights


def draft_weights(pair: Pair) -> dict[str, np.ndarray]:
    """The draft's weights under Hugging Face's names."""
    random = np.random.default_rng([pair.seed, 1])
    weights = {}
    for name, array in target_weights(pair).items():
        if name.startswith("model.layers.") and int(name.split(".")[2]) >= pair.draft_layers:
            continue
        if array.ndim == 2:
            array = array + pair.noise * np.std(array) * random.normal(size=array.shape)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            array = array[: pair.draft_config["vocab_size"]]
        weights[name] = array
    return weights


def as_source(config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> MemorySource:
    """Weights under Hugging Face's names as the engine reads them."""
    D, A, layers = config["hidden_size"], config["head_dim"], config["num_hidden_layers"]
    flat = {"embedding": weights["model.embed_tokens.weight"], "final_norm": weights["model.norm.weight"]}
    if not config["tie_word_embeddings"]:
        flat["head"] = weights["lm_head.weight"].T
    for layer in range(layers):
        theirs, ours = f"model.layers.{layer}.", f"layers/{layer}/"
        flat[ours + "attention_norm"] = weights[theirs + "input_layernorm.weight"]
        flat[ours + "feed_forward_norm"] = weights[theirs + "post_attention_layernorm.weight"]
        for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
            flat[ours + name] = weights[f"{theirs}self_attn.{short}_proj.weight"].T.reshape(D, -1, A)
        flat[ours + "output"] = weights[theirs + "self_attn.o_proj.weight"].T.reshape(-1, A, D)
        for name in ("gate", "up", "down"):
            flat[ours + name] = weights[f"{theirs}mlp.{name}_proj.weight"].T
    scaling = config["rope_scaling"]
    ours_config = LlamaConfig(
        vocab_size=config["vocab_size"],
        width=D,
        feed_forward=config["intermediate_size"],
        layers=layers,
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_size=A,
        context=config["max_position_embeddings"],
        rope_theta=config["rope_theta"],
        rope_scaling=scaling
        and RopeScaling(
            factor=scaling["factor"],
            low_freq_factor=scaling["low_freq_factor"],
            high_freq_factor=scaling["high_freq_factor"],
            original_context=scaling["original_max_position_embeddings"],
        ),
        norm_eps=config["rms_norm_eps"],
        tied_embeddings=config["tie_word_embeddings"],
    )
    return MemorySource(ours_config, nest(flat))


@functools.lru_cache(maxsize=64)
def oracle_model(pair: Pair, dtype: str) -> oracle.Llama:
    """The oracle over the weights as a `dtype` engine holds them; it computes in float64."""
    rounded = {
        name: np.asarray(array.astype(jnp.dtype(dtype)), np.float64) for name, array in target_weights(pair).items()
    }
    return oracle.Llama(pair.target_config, rounded, np.float64, CONTEXT)


@functools.lru_cache(maxsize=4096)
def plain_steps(
    pair: Pair, prompt: tuple[int, ...], draw: Draw, new_tokens: int, dtype: str = "float64"
) -> list[oracle.Step]:
    """What plain decoding gives. The draft's numbers do not matter to it."""
    return oracle.decode(oracle_model(pair, dtype), prompt, new_tokens, draw, vocab_size=VOCAB)


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

    def __str__(self) -> str:
        tree = f" width {self.width} children {self.children}" if self.method != "pp" else ""
        tree += f" steps {self.steps}" if self.steps > 1 else ""
        tree += f" drafter {self.drafter}" if self.drafter != "model" else ""
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
    """Tokens compared: all, or up to and with the first that differs."""
    hit_rate: float
    ticks: int
    late: int
    """Late hits."""
    first_difference: int | None
    """Index of the first token that differs; what follows it is another text."""
    distance: float
    """How far plain decoding's scores were from the engine's token there (see `oracle.Step.distance`); 0 when equal."""
    log_prob_error: float
    """Largest difference of the tokens' log-probabilities, before any difference."""
    smallest_gap: float
    """Smallest gap between the two best scores in the tokens compared."""


def compare(combination: Combination, dtype: str = "float64") -> Outcome:
    """Decode with the engine and with the oracle."""
    c = combination
    progress = bench(c.shape, dtype).decode(c.pair, c.prompt, c.new_tokens, c.draw)
    steps = plain_steps(dataclasses.replace(c.pair, noise=0.0), c.prompt, c.draw, c.new_tokens, dtype)
    assert len(progress.tokens) == len(steps) == c.new_tokens
    equal = [token == step.token for token, step in zip(progress.tokens, steps, strict=True)]
    first = None if all(equal) else equal.index(False)
    stop = len(steps) if first is None else first
    errors = [abs(p - step.log_prob) for p, step in zip(progress.logprobs[:stop], steps[:stop], strict=True)]
    return Outcome(
        combination=c,
        tokens=stop if first is None else stop + 1,
        hit_rate=hit_rate(progress),
        ticks=progress.ticks[-1],
        late=sum(delay > 1 for delay in progress.delays),
        first_difference=first,
        distance=0.0 if first is None else steps[first].distance(progress.tokens[first]),
        log_prob_error=max(errors, default=0.0),
        smallest_gap=min(step.gap for step in steps[: stop + 1]),
    )


# What is compared.

FIVE, SIXTEEN, ODD = GEOMETRIES
NUMBERS = {FIVE: (0.2, 0.5, 0.3, 0.1), SIXTEEN: (0.1, 0.25, 0.15, 0.05), ODD: (0.3, 0.6, 0.4, 0.2)}
PAIRS = {
    geometry: [
        Pair(geometry, seed, deep, noise)
        for seed, (deep, noise) in enumerate(zip(deeps, (0.0, 0.0, 0.05, 0.1), strict=True))
    ]
    for geometry, deeps in NUMBERS.items()
}
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


def prompt_of(length: int, seed: int) -> tuple[int, ...]:
    """A random prompt."""
    return tuple(np.random.default_rng([seed, length]).integers(VOCAB, size=length).tolist())


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
    (Shape("pipedec", 14, 5, 3, SIXTEEN), "filtered", 7),
    (Shape("pipedec", 16, 12, 6, SIXTEEN), "greedy", 6),
    (Shape("pipedec", 16, 12, 6, SIXTEEN), "sampled", 6),
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


NEAR_TIE = {"float64": 0.0, "float32": 1e-3, "bfloat16": 0.5}
"""Largest distance (see `oracle.Step.distance`) at which a different token counts as a near tie; logits have a standard
deviation of about 5. bfloat16 keeps 8 bits of each activation, and these random models amplify errors."""


def run_grid(grid: Sequence[tuple[Shape, str, int]], dtype: str, new_tokens: int = 32) -> Iterator[list[Outcome]]:
    """The outcomes of each program in turn; programs of one shape share an engine while they follow each other."""
    for number, (shape, kind, count) in enumerate(grid):
        yield [compare(c, dtype) for c in combinations(shape, kind, count, number, new_tokens)]
        if number + 1 == len(grid) or grid[number + 1][0] != shape:
            bench.cache_clear()


def summary(outcomes: Sequence[Outcome], bound: float) -> str:
    """Counts in one line."""
    different = [outcome for outcome in outcomes if outcome.first_difference is not None]
    near = [outcome for outcome in different if outcome.distance <= bound]
    rates = sorted(outcome.hit_rate for outcome in outcomes)
    parts = [
        f"{len(outcomes)} combinations",
        f"{sum(outcome.tokens for outcome in outcomes)} tokens compared",
        f"{len(different)} differ",
        f"{len(near)} of them at near ties (distance <= {bound:g}, largest "
        f"{max((outcome.distance for outcome in different), default=0):.1e})",
        f"log-probabilities within {max(outcome.log_prob_error for outcome in outcomes):.1e}",
        f"hit rates {rates[0]:.2f} to {rates[-1]:.2f}, {sum(0.3 <= rate <= 0.95 for rate in rates)} in 0.3..0.95",
        f"{sum(outcome.late for outcome in outcomes)} late hits",
    ]
    return ", ".join(parts)


def histogram(outcomes: Sequence[Outcome]) -> str:
    """How many combinations have which hit rate."""
    counts = np.histogram([outcome.hit_rate for outcome in outcomes], bins=10, range=(0, 1))[0]
    return "hit rates in tenths: " + " ".join(str(count) for count in counts)
