"""What the user chooses for a hierarchy, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax.numpy as jnp

from pipedec_jax.checks import check_count
from pipedec_jax.config import LlamaConfig
from pipedec_jax.pipeline.split import split_layers

METHODS = ("pipespec", "speculative")
"""PipeSpec, where all models run at once, and classic draft-then-verify, where they take turns."""

Form = Literal["lockstep", "free"]
"""How PipeSpec's models keep time: tick by tick, or each at its own pace."""


MOST_PASSES = 256
"""Most passes of a model in a tick. They are one program, which the host cannot interrupt."""


@dataclasses.dataclass(frozen=True)
class HierarchySettings:
    """What the user chooses.

    Raises:
        ValueError: for a method or form that does not exist, or numbers that do not fit.
    """

    method: str = "pipespec"
    form: Form = "lockstep"
    stages: tuple[int, ...] = (1, 1)
    """Stages of each model, M_0's first; their number is that of the models."""
    passes: tuple[int, ...] = (4,)
    """Passes in a tick of each model but the target, M_0's first. In the free-running form, between two looks at the
    others' buffers. A pass of a model on several stages is a tick of its own pipe, so a token takes that many. Of
    speculative, the lookahead: tokens that are drafted before each verification."""
    width: int | None = None
    """Most tokens that a verification reads (W); by default as many as the smaller models give in a tick."""
    lead: int | None = None
    """Most tokens that a model may be ahead of the target; by default no bound in lockstep, four widths when free."""
    dtype: Any = jnp.float32
    prefill_width: int = 128
    capacity: int | None = None
    """Places of each buffer and cache; by default the next power of two that holds prompt and answer."""
    tick_cost: float = 1.0
    """What a tick of the target's pipe costs, its share of what the other models do included; by default 1, so that
    ticks are counted. It changes what `Progress.costs` says, and nothing else."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {self.method!r}")
        if self.form not in get_args(Form):
            raise ValueError(f"form must be one of {', '.join(get_args(Form))}, not {self.form!r}")
        models = len(self.stages)
        if models < 2:
            raise ValueError(f"{self.method} needs at least two models, the smallest first, not {models}")
        if self.method == "speculative" and models != 2:
            raise ValueError(f"speculative takes two models, the draft and the target, not {models}")
        if len(self.passes) != models - 1:
            raise ValueError(
                f"passes must be one number for each model but the target: {models - 1}, not {len(self.passes)}"
            )
        for name, numbers in (("stages", self.stages), ("passes", self.passes)):
            for number in numbers:
                check_count(name, number)
        if max(self.passes) > MOST_PASSES:
            raise ValueError(f"passes must be at most {MOST_PASSES} in a tick, not {max(self.passes)}")
        check_count("prefill_width", self.prefill_width)
        for name in ("width", "lead", "capacity"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))

    @property
    def widths(self) -> tuple[int, ...]:
        """Most tokens that a pass of each model reads. The smallest reads its own last one."""
        own = -(-self.passes[0] // self.stages[0])  # on several stages it says a token in as many passes
        verified = 1 + self.passes[0] if self.method == "speculative" else own + sum(self.passes[1:])
        return (1, *[self.width or max(2, verified)] * (len(self.stages) - 1))

    @property
    def most_ahead(self) -> int:
        """Most tokens that a model may be ahead of the target."""
        if self.method == "speculative":
            return self.passes[0]
        free = 4 * self.widths[-1] if self.form == "free" else 2**30
        return self.lead or free


def check_models(settings: HierarchySettings, configs: Sequence[LlamaConfig | None], vocab_size: int) -> None:
    """Check that settings and models fit together; `None` for a model that needs no geometry.

    Raises:
        ValueError: when they do not.
    """
    if len(configs) != len(settings.stages):
        raise ValueError(f"stages are given for {len(settings.stages)} models but there are {len(configs)}")
    for index, (config, stages) in enumerate(zip(configs, settings.stages, strict=True)):
        if config is None:
            continue
        try:
            split_layers(config.layers, stages)
        except ValueError as error:
            message = str(error).replace("target", "model")
            raise ValueError(f"model {index} (counted from 0, the smallest): {message}") from error
        if vocab_size > config.vocab_size:
            raise ValueError(
                f"model {index} has {config.vocab_size} embedding rows for {vocab_size} tokens; choose models of the "
                "target's family"
            )
