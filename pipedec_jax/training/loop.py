"""What every training run shares: numbered steps, Orbax checkpoints in between, progress, and an exact resume.

A run is a function `advance(number, carry)` whose result depends on its arguments alone; a run that is killed and
started again from its last checkpoint therefore ends with the same weights as one that is not.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from pipedec_jax.model.parameters import Parameters

Carry = tuple[Parameters, Any]
"""Parameters and optimizer state."""
Advance = Callable[[int, Carry], tuple[Carry, dict[str, jax.Array], int]]
"""`advance(step's number, carry) -> (carry, losses by name, tokens seen)`."""
Log = Callable[[dict[str, Any]], None]


def json_log(path: Path | None = None) -> Log:
    """Prints figures, one JSON object a line, and appends them to a file where one is given."""

    def log(figures: dict[str, Any]) -> None:
        line = json.dumps(figures)
        print(line, flush=True)
        if path:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    return log


def compile_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """A `step(params, state, ...)` compiled; both are donated.

    A GPU is told to add in the same order at every run: an embedding's slopes it would add as they come, and what was
    resumed would not end as what was not.
    """
    options = {"xla_gpu_deterministic_ops": True} if jax.default_backend() == "gpu" else None
    return jax.jit(step, donate_argnums=(0, 1), compiler_options=options)


class Checkpoints:
    """Orbax checkpoints of a run in one folder: parameters and optimizer state under their step."""

    def __init__(self, directory: Path) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(directory.resolve(), options=options)

    def latest(self) -> int | None:
        """The last saved step, or `None`."""
        return self._manager.latest_step()

    def save(self, step: int, params: Parameters, state: Any) -> None:
        """Save what is needed to go on at `step`."""
        if step == self.latest():
            return
        leaves = {str(index): leaf for index, leaf in enumerate(jax.tree.leaves(state))}
        self._manager.save(step, args=ocp.args.StandardSave({"params": params, "state": leaves}))
        self._manager.wait_until_finished()

    def restore(self, step: int, params: Parameters, state: Any) -> Carry:
        """Read a step back into trees of the given structure."""
        leaves = {str(index): leaf for index, leaf in enumerate(jax.tree.leaves(state))}
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": params, "state": leaves})
        saved = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        ordered = [saved["state"][str(index)] for index in range(len(leaves))]
        return saved["params"], jax.tree.unflatten(jax.tree.structure(state), ordered)


def run_steps(
    name: str,
    steps: range,
    total: int,
    carry: Carry,
    advance: Advance,
    checkpoints: Checkpoints,
    save_seconds: float = 180.0,
    log: Log | None = None,
    report: Callable[[int, Parameters], dict[str, Any]] | None = None,
) -> Carry:
    """Run `advance` for every number in `steps`, saving now and then and at the end.

    Args:
        name: Shown beside the progress.
        steps: The numbers of the steps still to run.
        total: Steps of the whole run.
        carry: What the first of them starts from.
        advance: One step.
        checkpoints: Where the carry is saved, under the number of the next step.
        save_seconds: Time between checkpoints.
        log: Called every twenty steps with step, mean losses and tokens per second.
        report: Called after every step with the number of steps done; what it finds, if anything, is logged.

    Raises:
        ValueError: when a loss is not finite.
    """
    saved, recent, tick, seen = time.monotonic(), [], time.monotonic(), 0
    progress = tqdm(steps, initial=steps.start, total=total, desc=name, disable=not sys.stderr.isatty())
    for number in progress:
        done = number + 1
        carry, losses, tokens = advance(number, carry)
        recent.append(losses)
        seen += tokens
        if done % 20 == 0 or done == steps.stop:
            means = {key: round(float(np.mean([one[key] for one in jax.device_get(recent)])), 4) for key in losses}
            if not np.isfinite(list(means.values())).all():
                raise ValueError(f"the loss of {name} is {means} at step {done}; lower learning_rate")
            speed = round(seen / (time.monotonic() - tick))
            progress.set_postfix(means | {"tokens_per_s": speed})
            if log is not None:
                log({"model": name, "step": done, **means, "tokens_per_s": speed})
            recent, tick, seen = [], time.monotonic(), 0
        if report is not None and (figures := report(done, carry[0])):
            if not progress.disable:
                progress.write(f"{name} after step {done}: {figures}", file=sys.stderr)
            if log is not None:
                log({"model": name, "step": done, **figures})
        if done == steps.stop or time.monotonic() - saved > save_seconds:
            jax.block_until_ready(carry[0])
            checkpoints.save(done, *carry)
            saved = time.monotonic()
    return carry
