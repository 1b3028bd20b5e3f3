"""Training early-exit heads by self-distillation (PPSD, arXiv 2509.19368): the target is frozen, and its own teacher.

All heads of a run, of several exits and variants, learn from the same pass of the target over the data. Each has its
own loss, gradient norm and optimizer state, so it comes out as it would alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pipedec_jax.config import LlamaConfig, check_keys, read_values
from pipedec_jax.model import llama
from pipedec_jax.model.exit_head import ExitHeadConfig, initialize_head, vocabulary_part
from pipedec_jax.model.parameters import Parameters
from pipedec_jax.training.forward import hidden_after, layer, linear, rope_constants
from pipedec_jax.training.loop import Carry, Checkpoints, Log, compile_step, run_steps
from pipedec_jax.training.trainer import Batches, loss_of, make_optimizer

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
"""What a run may compute in. The heads' own weights and their sums are float32 in either."""

Heads = dict[str, Parameters]
"""Every head's arrays under its name."""


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Consecutive steps with batches of one shape."""

    steps: int
    batch: int
    """Sequences of one pass (B); a step makes `accumulate` passes."""
    length: int
    """Tokens of a sequence (T)."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, not {value!r}")


@dataclasses.dataclass(frozen=True)
class ExitTraining:
    """How exit heads are trained. The defaults are those reported for PPSD, and a distillation half hard."""

    stretches: tuple[Stretch, ...]
    seed: int = 0
    learning_rate: float = 5e-4
    """Peak rate of a block's matrices and of the map, which Muon updates."""
    adam_learning_rate: float = 5e-4
    """Peak rate of norms and of the map to the vocabulary, which AdamW updates."""
    weight_decay: float = 0.0
    momentum: float = 0.95
    hard: float = 0.5
    """Weight of the target's greedy token alone against its whole distribution (0 to 1)."""
    clip: float = 1.0
    """Largest global norm of one head's gradient."""
    warmup: float = 0.03
    """Share of the steps over which the rate rises; after them it falls to zero as a cosine."""
    accumulate: int = 1
    """Batches whose gradients one step averages."""
    dtype: str = "float32"
    """What target and heads are computed in; one of `DTYPES`."""

    def __post_init__(self) -> None:
        if not self.stretches:
            raise ValueError("a training needs at least one stretch of steps")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
        for name in ("hard", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)!r}")
        for name in ("learning_rate", "adam_learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)!r}")
        for name in ("weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)!r}")
        if not isinstance(self.accumulate, int) or self.accumulate < 1:
            raise ValueError(f"accumulate must be a positive whole number, not {self.accumulate!r}")

    @property
    def steps(self) -> int:
        """Steps of all stretches together."""
        return sum(stretch.steps for stretch in self.stretches)

    def locate(self, step: int) -> tuple[Stretch, int]:
        """The stretch of a step, and the number of the first sequence of the step."""
        window = 0
        for stretch in self.stretches:
            if step < stretch.steps:
                return stretch, window + step * stretch.batch * self.accumulate
            step -= stretch.steps
            window += stretch.steps * stretch.batch * self.accumulate
        raise ValueError(f"step lies {step} steps after the last stretch")

    def fraction(self, step: int) -> float:
        """The learning rate of a step as a fraction of its peak: warm-up, then a cosine to zero."""
        # Where all steps warm up optax would have no cosine to compute.
        warmup = min(round(self.warmup * self.steps), self.steps - 1)
        schedule: Any = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, self.steps)
        # The first step's rate is not zero.
        return float(schedule(step + 1 if step < warmup else step))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ExitTraining:
        """Build from a dictionary; unknown and missing keys and bad values raise `ValueError`."""
        check_keys(values, cls, "training of exit heads")
        if not isinstance(values["stretches"], list | tuple):
            raise ValueError(f"stretches must be a list, not {values['stretches']!r}")
        for stretch in values["stretches"]:
            check_keys(stretch, Stretch, "stretch")
        fields: dict[str, Any] = values | {"stretches": tuple(Stretch(**stretch) for stretch in values["stretches"])}
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class ExitPlan:
    """Which heads, and how they are trained: the content of a file such as `configs/demo_exits.json`."""

    heads: tuple[ExitHeadConfig, ...]
    training: ExitTraining

    def __post_init__(self) -> None:
        names = [head.name for head in self.heads]
        if not names:
            raise ValueError("a plan needs at least one exit head")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"exit head {', '.join(twice)} is named twice; name every head once")
        if any(head.variant == "target" for head in self.heads):
            raise ValueError("the 'target' head is not trained; leave it out of the plan")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary that `from_dict` reads back."""
        return {"heads": [head.to_dict() for head in self.heads], "training": dataclasses.asdict(self.training)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ExitPlan:
        """Build from a dictionary; unknown and missing keys and bad values raise `ValueError`."""
        check_keys(values, cls, "plan of exit heads")
        if not isinstance(values["heads"], list):
            raise ValueError(f"heads must be a list, not {values['heads']!r}")
        heads = tuple(ExitHeadConfig.from_dict(head) for head in values["heads"])
        return cls(heads, ExitTraining.from_dict(values["training"]))

    @classmethod
    def simple(
        cls,
        exit_layer: Sequence[int],
        head: Sequence[str] = ("norm-linear",),
        width: int | None = None,
        feed_forward: int | None = None,
        tied: bool = False,
        steps: int = 1000,
        batch: int = 8,
        length: int = 512,
        **training: Any,
    ) -> ExitPlan:
        """A plan with every variant in `head` at every exit, all sequences of one length; `training` as `ExitTraining`.

        Raises:
            ValueError: for bad values.
        """
        if feed_forward is not None and "block" not in head:
            raise ValueError(
                f"feed_forward is the block's, and no block is trained: give --head block, or leave --feed-forward "
                f"{feed_forward} out"
            )
        heads = tuple(
            ExitHeadConfig(number, variant, width, feed_forward if variant == "block" else None, tied)
            for number in exit_layer
            for variant in head
        )
        return cls(heads, ExitTraining((Stretch(steps, batch, length),), **training))

    @classmethod
    def read(cls, path: Path) -> ExitPlan:
        """Read a plan.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is not JSON, or for unknown and missing keys and bad values.
        """
        values = read_values(path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def head_logits(
    head: ExitHeadConfig,
    target: LlamaConfig,
    params: Parameters,
    own: Parameters,
    x_ND: jax.Array,
    shape: tuple[int, int],
) -> jax.Array:
    """Logits `[B * T, V]` of whole sequences, `shape` = (B, T): `exit_head`'s functions for the speed of gradients.

    `own` holds the target's `final_norm` and LM head; no gradient goes through them.
    """
    model = head.model(target)
    if head.mapped:
        x_ND = linear(llama.rms_norm(x_ND, params["map_norm"], target.norm_eps), params["map"])
    if head.variant == "block":
        x_ND = layer(model, params["layers"]["0"], x_ND, rope_constants(model, shape[1], x_ND.dtype), shape)
    norm, head_VR = vocabulary_part(head, params, own["final_norm"], llama.head_matrix(own))
    if x_ND.dtype == jnp.float32:
        return linear(llama.rms_norm(x_ND, norm, model.norm_eps), jnp.asarray(head_VR).T)
    return llama.logits(model, norm, head_VR, x_ND)


def distillation_loss(logits_NV: jax.Array, teacher_NV: jax.Array, hard: float) -> jax.Array:
    """Mean cross entropy in nats against the target's distribution, `hard` of it against its greedy token alone."""
    log_prob = jax.nn.log_softmax(logits_NV, axis=-1)
    soft = jnp.sum(jax.nn.softmax(teacher_NV, axis=-1) * log_prob, axis=-1)
    greedy = jnp.take_along_axis(log_prob, jnp.argmax(teacher_NV, axis=-1)[:, None], axis=-1)[:, 0]
    return -jnp.mean((1.0 - hard) * soft + hard * greedy)


def head_losses(
    plan: ExitPlan, target: LlamaConfig, heads: Heads, own: Parameters, batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Every head's loss on a batch: `token [B, T]`, and the target's recorded choices where it has them.

    Without a record the target's distribution is computed in the same pass, by its remaining layers.
    """
    training = plan.training
    recorded = "choice" in batch
    exits = {head.exit_layer for head in plan.heads} | (set() if recorded else {target.layers})
    rows = {number: jax.lax.stop_gradient(x) for number, x in hidden_after(target, own, batch["token"], exits).items()}
    if recorded:
        loss = functools.partial(loss_of, batch=batch, hard=training.hard)
    else:
        teacher = llama.logits(target, own["final_norm"], llama.head_matrix(own), rows[target.layers])
        loss = functools.partial(distillation_loss, teacher_NV=teacher, hard=training.hard)
    B, T = batch["token"].shape
    dtype = DTYPES[training.dtype]
    return {
        head.name: loss(
            head_logits(
                head,
                target,
                jax.tree.map(lambda value: value.astype(dtype), heads[head.name]),
                own,
                rows[head.exit_layer],
                (B, T),
            )
        )
        for head in plan.heads
    }


def make_exit_step(plan: ExitPlan, target: LlamaConfig) -> Callable[..., Any]:
    """A compiled `step(heads, state, own, batches, fraction) -> (heads, state, losses)`; heads and state are donated.

    `batches` holds arrays `[accumulate, B, T, ...]`; `own` is the frozen target.
    """
    # The program depends on neither the number of steps nor the seed.
    unit = dataclasses.replace(plan.training, stretches=(Stretch(1, 1, 1),), seed=0, warmup=0.0)
    return _compiled_step(ExitPlan(plan.heads, unit), target)


@functools.lru_cache(maxsize=8)
def _compiled_step(plan: ExitPlan, target: LlamaConfig) -> Callable[..., Any]:
    optimizer = make_optimizer(plan.training)

    def slopes(heads: Heads, own: Parameters, batch: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], Heads]:
        def total(heads: Heads) -> tuple[jax.Array, dict[str, jax.Array]]:
            losses = head_losses(plan, target, heads, own, batch)
            return jnp.sum(jnp.stack(list(losses.values()))), losses

        (_, losses), slope = jax.value_and_grad(total, has_aux=True)(heads)
        return losses, slope

    def step(heads: Heads, state: Any, own: Parameters, batches: dict[str, jax.Array], fraction: jax.Array):
        count = plan.training.accumulate
        if count == 1:
            losses, slope = slopes(heads, own, {name: value[0] for name, value in batches.items()})
        else:

            def add(sums: Any, batch: dict[str, jax.Array]) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, sums, slopes(heads, own, batch)), None

            zero = {head.name: jnp.zeros((), jnp.float32) for head in plan.heads}, jax.tree.map(jnp.zeros_like, heads)
            sums, _ = jax.lax.scan(add, zero, batches)
            losses, slope = jax.tree.map(lambda value: value / count, sums)
        moved, states = {}, {}
        for name, params in heads.items():
            # Optax's own arithmetic promotes implicitly.
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                update, states[name] = optimizer.update(slope[name], state[name], params)
            moved[name] = jax.tree.map(lambda value, change: value + fraction * change, params, update)
        return moved, states, losses

    return compile_step(step)


def train_exit_heads(
    plan: ExitPlan,
    target: LlamaConfig,
    own: Parameters,
    batches: Batches,
    directory: Path,
    save_seconds: float = 180.0,
    stop_after: int | None = None,
    log: Log | None = None,
    report: Callable[[int, Heads], dict[str, Any]] | None = None,
) -> Heads:
    """Train all heads of a plan, or go on from the last checkpoint in `directory`.

    Args:
        plan: Heads and training.
        target: The target's geometry.
        own: The target's parameters in float32 (computed with in the plan's dtype); never changed.
        batches: Where sequences come from.
        directory: The run's checkpoints.
        save_seconds: Time between checkpoints.
        stop_after: Save and stop after this step, as if killed there.
        log: Called every twenty steps with step, every head's loss, tokens per second.
        report: Called after every step with the number of steps done and the heads; what it finds is logged.

    Returns:
        Every head's arrays, float32, after the last step (or after `stop_after`).
    """
    training = plan.training
    for head in plan.heads:
        head.check(target)
    checkpoints = Checkpoints(directory)
    optimizer = make_optimizer(training)
    heads = {head.name: initialize_head(head, target, own, training.seed) for head in plan.heads}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        carry: Carry = heads, {name: optimizer.init(params) for name, params in heads.items()}
    start = checkpoints.latest() or 0
    if start:
        carry = checkpoints.restore(start, *carry)
    frozen = jax.tree.map(lambda value: jnp.asarray(value, DTYPES[training.dtype]), own)
    step = make_exit_step(plan, target)

    def advance(number: int, carry: Carry) -> tuple[Carry, dict[str, jax.Array], int]:
        stretch, window = training.locate(number)
        whole = batches(window, training.accumulate * stretch.batch, stretch.length)
        split = {
            name: value.reshape(training.accumulate, stretch.batch, *value.shape[1:]) for name, value in whole.items()
        }
        heads, state, losses = step(*carry, frozen, split, np.float32(training.fraction(number)))
        return (heads, state), losses, whole["token"].size

    end = min(training.steps, stop_after or training.steps)
    steps = range(min(start, end), end)
    return run_steps("exits", steps, training.steps, carry, advance, checkpoints, save_seconds, log, report)[0]
