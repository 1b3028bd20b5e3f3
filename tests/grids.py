"""What is decoded and compared: the grids of compiled programs, and combinations that hypothesis draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import hypothesis.strategies as st
import numpy as np

from pipedec_jax.analysis.answer_file import LineFile
from pipedec_jax.drafters.chances import Noise
from pipedec_jax.model.exit_head import ExitHeadConfig
from pipedec_jax.pipeline.settings import DRAFTERS, EXIT_ONLY, EXIT_TOO, METHODS
from pipedec_jax.tick_costs import Curve, TickCosts
from tests.exactness import Combination, Outcome, Shape, bench, compare
from tests.oracle import GREEDY, Draw
from tests.random_pairs import FIVE, ODD, PAIRS, SIXTEEN, VOCAB, prompt_of

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


RISING = TickCosts(Curve((0.0, 1.0, 1.3, 1.3, 2.0, 2.0, 3.0)), Curve((0.0, 0.1, 0.1, 0.6)), Curve((0.0, 0.2, 0.4)))
"""Costs that grow with the rows of a tick."""

SMALL_GRID: list[tuple[Shape, str, int]] = [
    (Shape("pp", 1, 1, 1, FIVE), "greedy", 4),
    (Shape("pp", 4, 1, 1, FIVE), "filtered", 7),
    (Shape("pp", 16, 1, 1, SIXTEEN), "sampled", 2),
    (Shape("pipedec", 1, 4, 2, FIVE), "greedy", 4),
    (Shape("pipedec", 2, 1, 1, FIVE), "greedy", 16),
    (Shape("pipedec", 2, 6, 4, ODD), "filtered", 21),
    (Shape("pipedec", 3, 4, 2, SIXTEEN), "greedy", 16),
    (Shape("pipedec", 4, 16, 8, FIVE), "greedy", 20),
    (Shape("pipedec", 4, 8, 4, FIVE), "filtered", 21),
    (Shape("pipedec", 8, 8, 4, SIXTEEN), "greedy", 6),
    (Shape("pipedec", 14, 5, 3, SIXTEEN), "greedy", 3),
    (Shape("pipedec", 16, 12, 6, SIXTEEN), "greedy", 3),
    (Shape("stpp", 3, 4, 3, FIVE, steps=3), "sampled", 12),
    (Shape("best-first", 2, 4, 3, ODD), "filtered", 14),
    (Shape("best-first", 4, 8, 4, FIVE, steps=3), "greedy", 16),
    (Shape("best-first", 4, 8, 4, FIVE, steps=3), "sampled", 16),
    (Shape("best-first", 8, 6, 3, SIXTEEN, steps=2, drafter="both"), "greedy", 8),
    (Shape("best-first", 2, 6, 3, FIVE, steps=4, drafter="ngram"), "greedy", 8),
    (Shape("best-first", 3, 6, 3, ODD, steps=2, others=(("costs", RISING),)), "sampled", 12),
]
"""Compiled programs of the tests: shape, mode, and how many combinations each decodes."""


EXIT_GRID: list[tuple[Shape, str, int]] = [
    (Shape("ppsd", 5, 1, 1, FIVE, head=ExitHeadConfig(2, "norm-linear", tied=True)), "sampled", 6),
    (Shape("best-first", 5, 6, 3, ODD, drafter="both", head=ExitHeadConfig(3, "block")), "filtered", 7),
    (
        Shape("eesd", 5, 1, 1, FIVE, drafter="both", head=ExitHeadConfig(2, "block", width=24, feed_forward=12)),
        "greedy",
        6,
    ),
]
"""The same for drafting at an exit."""

HEADS = (
    {"variant": "target"},
    {"variant": "norm-linear"},
    {"variant": "norm-linear", "width": 24},
    {"variant": "norm-linear", "tied": True},
    {"variant": "block"},
    {"variant": "block", "width": 24, "feed_forward": 12},
    {"variant": "block", "tied": True},
)
"""Exit heads but for their layer."""


def all_exits() -> list[tuple[Shape, str, int]]:
    """The script's grid of exits: every exit with every head, chain and trees; methods and ways to draw take turns.

    On the target of five layers every method has every exit and head; on others, every exit and head has one of them.
    """
    grid, turn = [], 0
    for geometry, stages, layers in ((FIVE, 3, 5), (ODD, 4, 5), (SIXTEEN, 8, 16)):
        for layer in range(1, layers):
            for number, head in enumerate(HEADS):
                config = ExitHeadConfig(layer, **head)
                shapes = [
                    Shape("ppsd", stages, 1, 1, geometry, head=config),
                    Shape("ppsd", stages, 6, 3, geometry, head=config),
                    Shape("best-first", stages, 6, 3, geometry, drafter="both", head=config),
                    Shape("eesd", stages, 1, 1, geometry, head=config),
                ]
                for shape in shapes if geometry == FIVE else [shapes[(layer + number) % len(shapes)]]:
                    grid.append((shape, sorted(DRAWS)[turn % len(DRAWS)], 4))
                    turn += 1
    return grid


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
    if method in EXIT_ONLY or (method in EXIT_TOO and draw(st.booleans())):
        return draw(exit_combination(method))
    width, steps, others = draw(st.integers(1, 9)), 1, {}
    if method != "pp":
        others["sharpness"] = draw(st.sampled_from((0.5, 1.0, 2.0)))
        others["noise"] = draw(st.sampled_from(get_args(Noise)))
        if draw(st.booleans()):
            curve = st.lists(st.sampled_from(COSTS), min_size=2, max_size=9).map(
                lambda cost: Curve(tuple(sorted(cost)))
            )
            others["costs"] = TickCosts(draw(curve), draw(curve), draw(curve))
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
    return draw(of_shape(shape))


@st.composite
def exit_combination(draw: st.DrawFn, method: str) -> Combination:
    """Every setting of a method that drafts at an exit."""
    layer, stages = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    possible = range(max(1, stages - 5 + layer), min(layer, stages - 1) + 1)
    others = {
        "sharpness": draw(st.sampled_from((0.5, 1.0, 2.0))),
        "noise": draw(st.sampled_from(get_args(Noise))),
        "exit_stages": draw(st.none() | st.sampled_from(possible)),
        "draft_length": draw(st.integers(1, 6)),
    }
    shape = Shape(
        method=method,
        stages=stages,
        width=1 if method == "eesd" else draw(st.integers(1, 9)),
        children=1 if method == "eesd" else draw(st.integers(1, 5)),
        geometry=draw(st.sampled_from((FIVE, ODD))),
        drafter=draw(st.sampled_from(("model", "both"))),
        others=tuple(others.items()),
        head=ExitHeadConfig(layer, **draw(st.sampled_from(HEADS))),
    )
    return draw(of_shape(shape))


@st.composite
def of_shape(draw: st.DrawFn, shape: Shape) -> Combination:
    """Any pair, prompt and way to draw."""
    drawn = Draw(
        draw(st.sampled_from((0.0, 0.5, 0.9, 1.4))),
        draw(st.integers(0, 40)),
        draw(st.sampled_from((1.0, 0.9, 0.5))),
        draw(st.integers(0, 2**32 - 1)),
    )
    prompt = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40))
    return Combination(shape, draw(st.sampled_from(PAIRS[shape.geometry])), tuple(prompt), drawn, 40)


COSTS = (1.0, 1.2, 2.0, 5.0)
"""Of ticks, from which curves are drawn."""

NEAR_TIE = {"float64": 0.0, "float32": 1e-3, "bfloat16": 3.0}
"""Largest distance (see `oracle.Step.distance`) at which another token counts as a near tie; logits have a standard
deviation of about 5. bfloat16 keeps 8 bits of each activation, and these random models amplify errors: plain decoding
in bfloat16 gives as many other tokens, as far off (`as_plain`)."""


def as_plain(combination: Combination) -> Combination:
    """The same text wanted from plain decoding on one device, one token at a time."""
    return dataclasses.replace(combination, shape=Shape("pp", 1, 1, 1, combination.shape.geometry))


def run_grid(
    grid: Sequence[tuple[Shape, str, int]], dtype: str, new_tokens: int = 32, out: Path | None = None
) -> Iterator[list[Outcome]]:
    """The outcomes of each program in turn; programs of one shape share an engine while they follow each other.

    With `out`, they are kept in that file, and a run of the same grid goes on with it; `ValueError` for another grid's.
    """
    kept = LineFile(out) if out else None
    head = {"dtype": dtype, "new_tokens": new_tokens, "programs": [f"{shape}, {kind}" for shape, kind, _ in grid]}
    if kept and not kept.rows:
        kept.append(head)
    if kept and kept.rows[0] != head:
        raise ValueError(f"{out} holds another grid's outcomes: choose another file")
    return _outcomes(grid, dtype, new_tokens, kept)


def _outcomes(
    grid: Sequence[tuple[Shape, str, int]], dtype: str, new_tokens: int, kept: LineFile | None
) -> Iterator[list[Outcome]]:
    done = [row["outcomes"] for row in kept.rows[1:]] if kept else []
    for number, (shape, kind, count) in enumerate(grid):
        wanted = combinations(shape, kind, count, number, new_tokens)
        if number < len(done):
            yield [Outcome(c, **_restored(row)) for c, row in zip(wanted, done[number], strict=True)]
            continue
        outcomes = [compare(c, dtype) for c in wanted]
        if kept:
            names = [field.name for field in dataclasses.fields(Outcome) if field.name != "combination"]
            kept.append({"outcomes": [{name: getattr(one, name) for name in names} for one in outcomes]})
        yield outcomes
        if number + 1 == len(grid) or grid[number + 1][0] != shape:
            bench.cache_clear()


def _restored(row: dict[str, Any]) -> dict[str, Any]:
    """An outcome's fields from JSON, which has no tuples."""
    return row | {"other": tuple((int(index), distance) for index, distance in row["other"])}


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
