"""One training loop for all models of the demo family: phases, growth in depth, Muon with AdamW, exact resume.

What a step sees depends on its number and the seed alone, so that a run that is killed and resumed ends with the same
weights as one that is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from pipedec_jax.config import LlamaConfig, check_keys
from pipedec_jax.model.parameters import Parameters, flatten, nest
from pipedec_jax.training.forward import forward
from pipedec_jax.training.loop import Carry, Checkpoints, Log, compile_step, run_steps

Batch = dict[str, np.ndarray]
"""`token [B, T]` and either `target [B, T]`, or `choice [B, T, K]` with `log_prob [B, T, K]` of the teacher."""
Batches = Callable[[int, int, int], Batch]
"""`batches(first window's number, B, T)`: the same answer for the same arguments, always."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of steps with one shape."""

    steps: int
    layers: int
    """Depth of the model in this phase; a later phase may be deeper."""
    batch: int
    """Sequences in a step (B)."""
    length: int
    """Tokens in a sequence (T)."""
    rate: tuple[float, float] = (1.0, 1.0)
    """Learning rate at the phase's start and end, as fractions of the peak; linear between them."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How one model is trained."""

    phases: tuple[Phase, ...]
    seed: int = 0
    learning_rate: float = 6e-3
    """Peak rate of the matrices, which Muon updates."""
    adam_learning_rate: float = 3e-3
    """Peak rate of embedding and norms, which AdamW updates."""
    weight_decay: float = 0.05
    momentum: float = 0.95
    hard: float = 0.0
    """In distillation, the weight of the teacher's first choice alone against its whole distribution."""
    clip: float = 1.0
    """Largest global norm of a gradient."""
    warmup: int = 100
    """Steps at the very start over which the rate rises from zero."""

    @property
    def steps(self) -> int:
        """Steps of all phases together."""
        return sum(phase.steps for phase in self.phases)

    def locate(self, step: int) -> tuple[Phase, int]:
        """The phase of a step, and the number of the first sequence of the step."""
        phase, within, window = self._place(step)
        return phase, window + within * phase.batch

    def fraction(self, step: int) -> float:
        """The learning rate of a step as a fraction of its peak."""
        phase, within, _ = self._place(step)
        start, end = phase.rate
        rise = (step + 1) / self.warmup if self.warmup else 1.0
        return min(1.0, rise) * (start + (end - start) * within / phase.steps)

    def _place(self, step: int) -> tuple[Phase, int, int]:
        """The phase of a step, the step's number within it, and the first sequence of the phase."""
        window = 0
        for phase in self.phases:
            if step < phase.steps:
                return phase, step, window
            step -= phase.steps
            window += phase.steps * phase.batch
        raise ValueError(f"step lies {step} steps after the last phase")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingConfig:
        """Build from a dictionary; unknown and missing keys raise `ValueError`."""
        check_keys(values, cls, "training config")
        for phase in values["phases"]:
            check_keys(phase, Phase, "phase")
        phases = (Phase(**(phase | {"rate": tuple(phase.get("rate", (1.0, 1.0)))})) for phase in values["phases"])
        fields: dict[str, Any] = values | {"phases": tuple(phases)}
        return cls(**fields)

    def scaled(self, steps: int) -> TrainingConfig:
        """The same run in about `steps` steps: every phase is stretched alike."""
        factor = steps / self.steps
        phases = tuple(dataclasses.replace(phase, steps=max(1, round(phase.steps * factor))) for phase in self.phases)
        return dataclasses.replace(self, phases=phases, warmup=max(1, round(self.warmup * min(1.0, factor))))


MATRIX_AXES = {
    "query": MuonDimensionNumbers(0, (1, 2)),
    "key": MuonDimensionNumbers(0, (1, 2)),
    "value": MuonDimensionNumbers(0, (1, 2)),
    "output": MuonDimensionNumbers((0, 1), 2),
    "gate": MuonDimensionNumbers(0, 1),
    "up": MuonDimensionNumbers(0, 1),
    "down": MuonDimensionNumbers(0, 1),
    "map": MuonDimensionNumbers(0, 1),
}
"""Input and output axes of the arrays that Muon treats as matrices."""


def matrix_axes(params: Parameters) -> Any:
    """For every array, which axes are input and which output of its matrix; `None` for what AdamW updates."""
    axes: dict[str, MuonDimensionNumbers | None] = {}
    for path, _ in flatten(params):
        axes[path] = MATRIX_AXES.get(path.rpartition("/")[2])
    return nest(axes)


class Rates(Protocol):
    """What the optimizer reads of a training's configuration."""

    @property
    def learning_rate(self) -> float:
        """As `TrainingConfig.learning_rate`."""
        ...

    @property
    def adam_learning_rate(self) -> float:
        """As `TrainingConfig.adam_learning_rate`."""
        ...

    @property
    def weight_decay(self) -> float:
        """As `TrainingConfig.weight_decay`."""
        ...

    @property
    def momentum(self) -> float:
        """As `TrainingConfig.momentum`."""
        ...

    @property
    def clip(self) -> float:
        """As `TrainingConfig.clip`."""
        ...


def make_optimizer(config: Rates) -> optax.GradientTransformation:
    """Gradient clipping, then Muon for matrices and AdamW for the rest, at their peak rates."""
    axes: Any = matrix_axes  # optax's annotation knows no nested trees
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        muon(
            config.learning_rate,
            beta=config.momentum,
            weight_decay=config.weight_decay,
            adam_b1=0.9,
            adam_b2=0.98,
            adam_weight_decay=0.0,
            adam_learning_rate=config.adam_learning_rate,
            muon_weight_dimension_numbers=axes,
            consistent_rms=0.2,
        ),
    )


def grow(params: Parameters, layers: int) -> Parameters:
    """The same model with its layers repeated, in order, until there are `layers` of them."""
    old = len(params["layers"])
    # Every layer needs an array of its own: training donates them.
    stacked = {str(index): jax.tree.map(jnp.array, params["layers"][str(index % old)]) for index in range(layers)}
    return params | {"layers": stacked}


def loss_of(logits_NV: jax.Array, batch: dict[str, jax.Array], hard: float = 0.0) -> jax.Array:
    """Mean loss per token in nats: cross entropy, or the teacher's coarse cross entropy where it is given.

    The teacher's distribution is its K best tokens and one more class for all others, so that the student learns
    how much is left over but not how the teacher spreads it. `hard` mixes in the cross entropy of its first choice.
    """
    log_prob = logits_NV - jax.nn.logsumexp(logits_NV, axis=-1, keepdims=True)
    if "choice" not in batch:
        picked = jnp.take_along_axis(log_prob, batch["target"].reshape(-1, 1), axis=-1)
        return -jnp.mean(picked)
    K = batch["choice"].shape[-1]
    teacher = jnp.exp(batch["log_prob"].reshape(-1, K).astype(jnp.float32))
    student = jnp.take_along_axis(log_prob, batch["choice"].reshape(-1, K), axis=-1)
    rest_teacher = jnp.maximum(1.0 - jnp.sum(teacher, axis=-1), 0.0)
    rest_student = jnp.maximum(1.0 - jnp.sum(jnp.exp(student), axis=-1), 1e-6)
    soft = jnp.sum(teacher * student, axis=-1) + rest_teacher * jnp.log(rest_student)
    return -jnp.mean((1.0 - hard) * soft + hard * student[:, 0])


def make_step(model: LlamaConfig, optimizer: optax.GradientTransformation, hard: float = 0.0) -> Callable[..., Any]:
    """A compiled `step(params, state, batch, fraction) -> (params, state, loss)`; params and state are donated."""

    def step(params: Parameters, state: Any, batch: dict[str, jax.Array], fraction: jax.Array):
        loss, slope = jax.value_and_grad(lambda tree: loss_of(forward(model, tree, batch["token"]), batch, hard))(
            params
        )
        # Optax's own arithmetic promotes implicitly.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            update, state = optimizer.update(slope, state, params)
        params = jax.tree.map(lambda value, change: value + fraction * change, params, update)
        return params, state, loss

    return compile_step(step)


def train(
    name: str,
    model: LlamaConfig,
    config: TrainingConfig,
    initial: Parameters,
    batches: Batches,
    directory: Path,
    save_seconds: float = 180.0,
    stop_after: int | None = None,
    log: Log | None = None,
) -> Parameters:
    """Train from `initial` (as deep as the first phase), or go on from the last checkpoint in `directory`.

    Args:
        name: Shown beside the progress.
        model: Geometry of the finished model; `layers` of the last phase must agree.
        config: The run.
        initial: Parameters in float32.
        batches: Where sequences come from.
        directory: The run's checkpoints.
        save_seconds: Time between checkpoints.
        stop_after: Save and stop after this step, as if killed there.
        log: Called every twenty steps with step, loss, tokens per second.

    Returns:
        The parameters after the last step (or after `stop_after`).
    """
    if config.phases[-1].layers != model.layers:
        raise ValueError(f"the last phase has {config.phases[-1].layers} layers, the model {model.layers}")
    checkpoints = Checkpoints(directory)
    optimizer = make_optimizer(config)
    start = checkpoints.latest() or 0
    params = jax.tree.map(jnp.array, initial)
    if start:
        layers = config.locate(start - 1)[0].layers
        params = grow(params, layers)
        params, state = checkpoints.restore(start, params, optimizer.init(params))
    else:
        state = optimizer.init(params)
    end = min(config.steps, stop_after or config.steps)
    step_of: dict[Phase, Callable[..., Any]] = {}

    def advance(number: int, carry: Carry) -> tuple[Carry, dict[str, jax.Array], int]:
        nonlocal step_of
        params, state = carry
        phase, window = config.locate(number)
        if len(params["layers"]) != phase.layers:
            params = grow(params, phase.layers)
            state = optimizer.init(params)
        shape = dataclasses.replace(phase, steps=0, rate=(1.0, 1.0))
        if shape not in step_of:
            step_of = {shape: make_step(dataclasses.replace(model, layers=phase.layers), optimizer, config.hard)}
        batch = batches(window, phase.batch, phase.length)
        params, state, loss = step_of[shape](params, state, batch, np.float32(config.fraction(number)))
        return (params, state), {"loss": loss}, batch["token"].size

    steps = range(min(start, end), end)
    return run_steps(name, steps, config.steps, (params, state), advance, checkpoints, save_seconds, log)[0]
