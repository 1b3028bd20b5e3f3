"""The strongest static tree (STPP): shapes simulated once each, then counted and priced for any number of stages.

A tree is drafted while the pipe is empty and goes through it alone, so which tokens it accepts does not depend on the
number of stages: an answer of r trees takes `r (N + 1)` ticks. One simulation with one stage thus serves all N.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pipedec_jax.analysis.method_table import MethodRow, simulate
from pipedec_jax.decoding.decoder import Decoder
from pipedec_jax.drafters.replay import random_text
from pipedec_jax.pipeline.methods import make_schedule
from pipedec_jax.schedules.static import StaticSchedule
from pipedec_jax.whole_files import write_whole

DEPTHS = (2, 4, 6, 8, 10, 12, 16, 24)
"""Levels of the trees that are tried."""

REPLAYED_VOCABULARY = 97
"""Tokens of replayed texts."""


def shapes(widths: Iterable[int], depths: Iterable[int], drafters: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Arguments of `Decoder` of every tree; at most 8 children of a node, as the draft's later guesses seldom hold."""
    for drafter, width, depth in itertools.product(drafters, widths, depths):
        yield {"drafter": drafter, "width": width, "children": min(8, width), "depth": depth}


def with_one_stage(
    make: Callable[..., Decoder],
    prompts: Sequence[str],
    answers: Sequence[list[int]],
    shape: dict[str, Any],
    **options: Any,
) -> MethodRow:
    """Simulate a tree on one stage; see `on_stages` for others.

    Args:
        make: makes a decoder from `method`, `stages` and the shape.
        prompts: texts.
        answers: from `method_table.plain_answers`.
        shape: from `shapes`.
        options: of `Decoder.generate`.
    """
    return simulate(make(method="stpp", stages=1, **shape), prompts, answers, **options)


def on_stages(row: MethodRow, decoder: Decoder) -> MethodRow:
    """What a tree simulated on one stage takes on the stages of a decoder with the same tree, by that one's costs.

    A round is charged the draft's steps, one for each level, then N ticks of the longest stage, the last with the head.
    Nodes that were sent without having been extended go through the draft meanwhile; beside a stage that is quicker
    than the draft's steps of a tick this is an upper bound.

    Raises:
        ValueError: when the row and the decoder are not of the same tree.
    """
    settings, schedule = decoder.settings, make_schedule(decoder.settings)
    tree = (row.method, row.width, row.children, row.draft_steps, row.stages)
    if tree != (decoder.method, settings.width, settings.children, settings.depth, 1):
        raise ValueError(f"a row of one stage of the decoder's own static tree is needed, not {row}")
    assert isinstance(schedule, StaticSchedule)
    nodes = jnp.int32(schedule.width)
    none = jnp.int32(0)
    step = settings.costs.draft.of(jnp.int32(schedule.level))
    drafting = settings.costs.of(none, settings.depth * step, none)
    flight = settings.costs.of(nodes, schedule.spare * step, none)
    leaving = settings.costs.of(nodes, schedule.spare * step, nodes)
    rounds = row.ticks // 2
    cost = rounds * float(drafting + (decoder.stages - 1) * flight + leaving)
    return dataclasses.replace(
        row,
        stages=decoder.stages,
        ticks=rounds * (decoder.stages + 1),
        modeled_speedup_vs_pp=decoder.modeled_speedup_vs_pp(cost / row.tokens),
    )


def strongest(rows: Iterable[MethodRow], make: Callable[..., Decoder], stages: int) -> MethodRow:
    """The tree of least modeled time on so many stages, of rows from `with_one_stage`.

    Args:
        rows: at least one.
        make: makes a decoder; what it charges decides. One with free drafting finds the tree for that.
        stages: of the target (N).
    """
    priced = (on_stages(row, make(method="stpp", stages=stages, **shape_of(row))) for row in rows)
    return max(priced, key=lambda row: row.modeled_speedup_vs_pp)


def shape_of(row: MethodRow) -> dict[str, Any]:
    """The shape that a row is of."""
    return {"drafter": row.drafter, "width": row.width, "children": row.children, "depth": row.draft_steps}


def with_free_drafting(make: Callable[..., Decoder]) -> Callable[..., Decoder]:
    """Makes the same decoders, which charge nothing for the draft: bytes of the target's weights alone."""
    from pipedec_jax.modeled.cost import byte_costs

    decoder = make(method="pp", stages=1)
    costs = dataclasses.asdict(byte_costs(decoder.target.config, None, decoder.dtype.itemsize))
    return functools.partial(make, calibration=costs)


def replayed_rounds(depth: int, rates: Sequence[float], tokens: int = 500, seed: int = 0) -> list[int]:
    """Rounds of a tree of so many levels over one text at each hit rate, guessed by the replay drafter.

    Counted without a simulation: a round accepts the right guesses up to the first wrong one, at most one for each
    level, and gives a token more. So does the simulator's, with the same text and seed
    (tests/analysis/test_static_trees.py).

    Args:
        depth: levels of the tree, which with one guess after each token is a chain.
        rates: shares of the text's tokens that are guessed right.
        tokens: of the text.
        seed: of which are right.
    """
    _, at_rate = random_text(tokens, REPLAYED_VOCABULARY, seed)
    counts = []
    for rate in rates:
        right = (np.asarray(at_rate(rate).place) == 0).tolist()
        rounds = place = 0
        while place < tokens:
            place += 1 + sum(1 for _ in itertools.takewhile(bool, right[place + 1 : place + 1 + depth]))
            rounds += 1
        counts.append(rounds)
    return counts


def ticks_with_drafting(rounds: int, stages: int, depth: int, levels: int) -> int:
    """Ticks of so many rounds where the draft makes `levels` steps in a tick: those of the pipe and of drafting."""
    return rounds * (stages + -(-depth // levels))


def about(
    target: str | None, draft: str | None, prompts: int | str, seed: int, sharpness: float = 1.0, **options: Any
) -> dict[str, Any]:
    """What a file's trees have in common: models, prompts (how many held-out ones, or others in words), options."""
    fixed = {"target": target, "draft": draft, "prompts": prompts, "seed": seed, "sharpness": sharpness}
    return fixed | options


class TreeFile:
    """Rows of `with_one_stage`, kept in a file after each, so that a search that was killed goes on.

    Args:
        path: of the file; `None` keeps nothing.
        about: what all its rows have in common, JSON-ready.

    Raises:
        ValueError: when the file is of something else.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self._path, self._about = path, about
        self.rows: list[MethodRow] = []
        if path is None or not path.exists():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            same = content["about"] == about
            self.rows = [MethodRow(**row) for row in content["trees"]]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no file of static trees ({error}): choose another") from error
        if not same:
            raise ValueError(f"{path} was made with {content['about']}, not {about}: choose another file")

    def find(self, shape: dict[str, Any]) -> MethodRow | None:
        """The row of a shape, if it is there."""
        return next((row for row in self.rows if shape_of(row) == shape), None)

    def add(self, row: MethodRow) -> MethodRow:
        """Keep a row, on the disk as a whole or not at all; gives it back."""
        self.rows.append(row)
        if self._path is not None:
            content = {"about": self._about, "trees": [dataclasses.asdict(row) for row in self.rows]}
            write_whole(self._path, json.dumps(content, indent=1) + "\n")
        return row
