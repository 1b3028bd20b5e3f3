"""What the user chooses, checked."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from pipedec_jax.checks import check_count
from pipedec_jax.drafters.base import Drafter
from pipedec_jax.drafters.chances import Noise
from pipedec_jax.schedules.base import Schedule, check_schedule
from pipedec_jax.tick_costs import TICKS, TickCosts

Method = Literal["pp", "stpp", "pipedec", "best-first", "ppsd", "eesd"]
"""Decoding methods: plain pipeline parallelism, a static tree at a time, PipeDec as published, the best candidates
first, and from the target's own early exit PPSD and its synchronous baseline."""

METHODS: tuple[Method, ...] = get_args(Method)
"""All of them."""

EXIT_ONLY = ("ppsd", "eesd")
"""Methods that draft at an exit; those of `EXIT_TOO` may."""

EXIT_TOO = ("pipedec", "best-first")

GUESSING = tuple(method for method in METHODS if method != "pp")
"""Methods that guess."""

OPTIONS_OF: dict[str, tuple[str, ...]] = {
    "width": GUESSING,
    "children": GUESSING,
    "drafter": GUESSING,
    "sharpness": GUESSING,
    "noise": GUESSING,
    "draft_steps": ("best-first",),
    "pool": ("best-first",),
    "adaptive": ("best-first",),
    "depth": ("stpp",),
    "draft_length": ("eesd",),
}
"""The methods of an option that others have no use for: given to one of these it would be without effect."""

DrafterName = Literal["model", "ngram", "both"]
"""Who guesses: the draft model (with an exit layer, the exit head), look-up in the text so far, or both into the same
tree."""

DRAFTERS: tuple[DrafterName, ...] = get_args(DrafterName)
"""All of them."""

SHARPNESS = (float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max))
"""The least and the greatest: logits are multiplied in float32."""

MOST_STEPS = 64
"""Draft steps of a tick: each is a part of the program of its own, which is compiled in about a second."""


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """What the user chooses.

    Raises:
        ValueError: for a method that does not exist, or a size that is no whole number of at least 1.
    """

    method: str = "pipedec"
    stages: int = 4
    """Stages of the target (N)."""
    tensor_parallel: int = 1
    """Devices over which each stage is split (T)."""
    idle_ranks: int = 0
    """Ranks behind all others that hold a slice of the vocabulary alone, so that no device of a slice is left out."""
    width: int = 16
    """Most nodes of a tick's batch, or of a tree level of STPP (W); PP ignores it."""
    children: int = 8
    """Most children per node (K); PP ignores it."""
    draft_steps: int = 1
    """Draft steps in a tick of best-first (R)."""
    depth: int = 4
    """Levels of STPP's tree below its root."""
    exit_layer: int | None = None
    """Layers of the target after which a head drafts (E), in place of a draft model."""
    exit_stages: int | None = None
    """Stages of that exit path (e); by default as many as make a token quickest."""
    draft_length: int = 4
    """Tokens that EESD drafts before it verifies (k)."""
    pool: int | None = None
    """Nodes that best-first extends before they are sent (P); by default two batches for every draft step but one."""
    sharpness: float = 1.0
    """Factor on the draft model's logits before they are taken for the target's chances."""
    costs: TickCosts = TICKS
    """What a tick costs by the rows in it. Where that grows, fewer rows are computed as such, and best-first sends and
    drafts only what is worth it."""
    adaptive: bool = True
    """Whether best-first sends only what is worth it; otherwise as much as there is place for."""
    noise: Noise = "shared"
    """Under which noise the draft model guesses tokens that are drawn."""
    dtype: Any = jnp.float32
    """Dtype of weights, activations and caches."""
    prefill_width: int = 128
    """Prompt tokens per prefill chunk."""
    capacity: int | None = None
    """Cache slots (S); by default the next power of two that holds prompt, answer and tree."""
    schedule: Schedule | None = None
    """One's own in place of best-first's; width and pool are then its."""
    record: bool = False
    """Whether the engine keeps what passes in every tick (`recording`). The program without it is the same as if there
    were no such thing."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {self.method!r}")
        self._take_schedule()
        for name in (
            "stages",
            "tensor_parallel",
            "width",
            "children",
            "draft_steps",
            "depth",
            "draft_length",
            "prefill_width",
            *(name for name in ("pool", "capacity", "exit_layer", "exit_stages") if getattr(self, name) is not None),
        ):
            check_count(name, getattr(self, name))
            object.__setattr__(self, name, int(getattr(self, name)))  # NumPy's numbers become Python's
        check_count("idle_ranks", self.idle_ranks, least=0)
        object.__setattr__(self, "idle_ranks", int(self.idle_ranks))
        if self.pool is not None:
            check_used(self.method, pool=self.pool)
        if self.steps > MOST_STEPS:
            name = "depth" if self.method == "stpp" else "draft_steps"
            raise ValueError(f"{name} must be at most {MOST_STEPS}, not {self.steps}: each step is compiled by itself")
        if self.pool is not None and self.pool < self.width:
            raise ValueError(f"pool ({self.pool}) must hold at least a batch: width is {self.width}")
        if self.draft_steps > 1 and self.method in ("pipedec", "stpp"):
            other = "use method best-first for more" if self.method == "pipedec" else "its depth says how many"
            raise ValueError(f"draft_steps is not for {self.method}, {other}")
        self._check_exit()
        if isinstance(self.sharpness, bool) or not isinstance(self.sharpness, numbers.Real):
            raise ValueError(f"sharpness must be a number, not {self.sharpness!r}")
        if not SHARPNESS[0] <= self.sharpness <= SHARPNESS[1]:
            raise ValueError(f"sharpness must be over 0 and finite, in float32, not {self.sharpness!r}")
        for name in ("adaptive", "record"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.noise not in get_args(Noise):
            raise ValueError(f"noise must be one of {', '.join(get_args(Noise))}, not {self.noise!r}")

    def _take_schedule(self) -> None:
        """Take the sizes of a schedule of one's own; `ValueError` where it is none, or not for this."""
        if self.schedule is None:
            return
        if not isinstance(self.schedule, Schedule):
            raise ValueError(f"schedule must be an object of a Schedule (pipedec_jax.schedules), not {self.schedule!r}")
        if self.method != "best-first":
            raise ValueError(f"a schedule of your own takes best-first's place: leave method {self.method!r} out")
        check_count("stages", self.stages)
        check_schedule(self.schedule, self.stages)
        if self.pool is not None:
            raise ValueError("pool is the schedule's own: leave it out beside a schedule")
        if self.draft_steps != 1 and not self.schedule.drafts_ahead:
            raise ValueError(
                f"draft_steps must be 1 for {self.name}, which extends only what it has sent: it has no pool"
            )
        object.__setattr__(self, "width", int(self.schedule.width))

    def _check_exit(self) -> None:
        """Raise `ValueError` where the exit and the method do not go together."""
        if self.exit_layer is None:
            if self.method in EXIT_ONLY:
                raise ValueError(
                    f"method {self.method!r} drafts at an exit of the target: give exit_layer (--exit-layer)"
                )
            if self.exit_stages is not None:
                raise ValueError("exit_stages is for an exit: give exit_layer too, or leave it out")
            return
        if self.method not in (*EXIT_ONLY, *EXIT_TOO):
            raise ValueError(
                f"method {self.method!r} has no exit: leave exit_layer out, or choose one of "
                f"{', '.join((*EXIT_ONLY, *EXIT_TOO))}"
            )
        if self.draft_steps > 1:
            raise ValueError("draft_steps must be 1 at an exit: its head sees each node once, as it passes")
        if self.pool is not None:
            raise ValueError(
                "pool is for guesses extended before they are sent; at an exit there are none: leave it out"
            )
        if self.method == "eesd" and (self.width, self.children) != (1, 1):
            raise ValueError(
                f"eesd drafts a chain: width and children must be 1, not {self.width} and {self.children} "
                "(draft_length says how long it is)"
            )

    @property
    def name(self) -> str:
        """The method's name, or that of one's own schedule."""
        return self.method if self.schedule is None else type(self.schedule).__name__

    @property
    def steps(self) -> int:
        """Draft steps of a tick, whatever the method."""
        return {"pp": 0, "stpp": self.depth}.get(self.method, self.draft_steps)


def check_used(method: str, drafter: Drafter | str | None = None, **given: Any) -> None:
    """Raise `ValueError` where an option is given that this method, or this drafter, has no use for.

    PP takes all that other methods guess by: it is what they are compared with, by the same arguments.

    Args:
        method: one of `METHODS`.
        drafter: who guesses; `None` where it is not given.
        given: options by name, of those in `OPTIONS_OF`; `None` where one is not given.
    """
    if method not in METHODS:
        return  # which is said elsewhere
    for name, value in (("drafter", drafter), *given.items()):
        methods = OPTIONS_OF[name]
        baseline = method == "pp" and methods is GUESSING
        one_step = name == "draft_steps" and value == 1  # as many as any method has
        if value is not None and method not in methods and not baseline and not one_step:
            raise ValueError(f"{name} is for {', '.join(methods)}, not for {method}: leave it out")
    own = drafter is not None and not isinstance(drafter, str)
    for name in ("sharpness", "noise", "children"):
        if given.get(name) is None:
            continue
        if own:
            has = "has its own children" if name == "children" else "guesses in its own way"
            raise ValueError(f"{name} is not used beside a drafter of your own, which {has}: leave it out")
        if drafter == "ngram" and name != "children":
            raise ValueError(f"{name} is for guesses of a model: drafter 'ngram' has no use for it, leave it out")
