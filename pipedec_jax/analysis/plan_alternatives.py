"""What devices can do without this engine: one alone, tensor parallel, stages x tensor, a static tree without a pipe.

They are favoured: split layers take exactly their share of the time, nothing is charged for a step's fixed cost or for
embedding a token, and their draft runs as is quickest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipedec_jax.analysis.device_memory import tensor_bytes
from pipedec_jax.analysis.hit_curve import Setting, lines_at
from pipedec_jax.analysis.links import all_reduce_seconds, hop_seconds
from pipedec_jax.analysis.prediction import (
    Prediction,
    Problem,
    batch_rows,
    costs_with_cache,
    rows_cost,
    useful_stages,
)
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.tensor_parallel import divides, tensor_share
from pipedec_jax.modeled.cost import Costs


def _costs(problem: Problem) -> Costs:
    """Seconds of the parts with a cache of no more slots than tokens."""
    return costs_with_cache(problem, problem.context)


def pass_seconds(problem: Problem, stages: int, tensor: int, rows: int = 1) -> float:
    """Seconds of one pass of the target with each of its stages split over `tensor` devices, one stage at a time.

    Every layer ends its attention and its feed-forward layer with a sum over the stage's devices; the head is sliced
    over all devices.
    """
    target, link, costs = problem.target, problem.link, _costs(problem)
    batch = rows * target.width * problem.item_bytes
    layer = rows_cost(costs.layer, rows) * tensor_share(target, tensor)
    layer += 2 * all_reduce_seconds(link, batch, tensor)
    ranks = stages * tensor
    head = rows_cost(costs.head, rows) / ranks + all_reduce_seconds(link, 16 * ranks * rows, ranks)
    return target.layers * layer + (stages - 1) * hop_seconds(link, batch) + head


def split_draft_step(problem: Problem, draft: LlamaConfig, tensor: int, rows: int) -> float:
    """Seconds of a draft step on one device or split over `tensor`, whichever is less."""
    alone = rows_cost(_costs(problem).draft, rows)
    if not divides(draft, tensor):
        return alone
    sums = 2 * draft.layers * all_reduce_seconds(problem.link, rows * draft.width * problem.item_bytes, tensor)
    return min(alone, alone / tensor + sums)


def alternative_predictions(problem: Problem) -> Iterator[Prediction]:
    """One device, stages one after another, tensor parallel, stages x tensor, and a static tree without a pipe."""
    target = problem.target
    for tensor in range(1, problem.devices + 1):
        if not divides(target, tensor):
            continue
        for stages in useful_stages(target.layers, problem.devices // tensor):
            if stages > 1:
                method = "stages x tensor" if tensor > 1 else "plain stages"
            else:
                method = "tensor" if tensor > 1 else "one device"
            yield _other(problem, method, stages, tensor, pass_seconds(problem, stages, tensor))
        if problem.draft is None:
            continue
        for setting, ticks, _ in lines_at(problem.curve, 1):
            if setting.method == "stpp":
                yield _static_tree(problem, problem.draft, setting, 2 / ticks, tensor)


def _other(problem: Problem, method: str, stages: int, tensor: int, seconds: float, **values: Any) -> Prediction:
    draft = problem.draft if "draft_steps" in values else None
    held = tensor_bytes(problem.target, stages, tensor, problem.context, problem.item_bytes, draft)
    values = {"devices": stages * tensor} | values
    return Prediction(
        method=method,
        ours=False,
        stages=stages,
        tensor=tensor,
        seconds=seconds,
        memory=held,
        fits=problem.fits(held),
        **values,
    )


def _static_tree(problem: Problem, draft: LlamaConfig, setting: Setting, tokens: float, tensor: int) -> Prediction:
    """Draft, then verify: the curve's static tree without a pipe; `tokens` are those of a round."""
    drafting = split_draft_step(problem, draft, tensor, 1)
    drafting += (setting.draft_steps - 1) * split_draft_step(problem, draft, tensor, setting.width)
    round_seconds = drafting + pass_seconds(problem, 1, tensor, batch_rows(setting))
    return _other(
        problem,
        "tensor, static tree" if tensor > 1 else "one device, static tree",
        1,
        tensor,
        round_seconds / tokens,
        drafter=setting.drafter,
        width=setting.width,
        children=setting.children,
        draft_steps=setting.draft_steps,
    )
