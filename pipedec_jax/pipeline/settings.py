"""What the user chooses, checked: settings, whether models and requests fit, and the parts a method is made of."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Iterable, Mapping, Set
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from pipedec_jax.checks import check_count
from pipedec_jax.config import LlamaConfig
from pipedec_jax.drafters.base import Drafter, NoDrafter, check_drafter
from pipedec_jax.drafters.chances import Noise
from pipedec_jax.drafters.combined import CombinedDrafter
from pipedec_jax.drafters.exit import ExitDrafter
from pipedec_jax.drafters.model import ModelDrafter
from pipedec_jax.drafters.ngram import NGramDrafter
from pipedec_jax.model.exit_head import ExitHeadConfig, step_weights
from pipedec_jax.model.parameters import layer_shapes
from pipedec_jax.model.tensor_parallel import check_parts
from pipedec_jax.pipeline.split import StageSplit, split_at_exit, split_layers
from pipedec_jax.schedules.base import Schedule, check_schedule
from pipedec_jax.schedules.best_first import BestFirstSchedule
from pipedec_jax.schedules.levels import LevelSchedule
from pipedec_jax.schedules.plain import PlainSchedule
from pipedec_jax.schedules.static import StaticSchedule
from pipedec_jax.schedules.synchronous import SynchronousSchedule
from pipedec_jax.tick_costs import TICKS, Curve, TickCosts

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

MOST_PLACES = 16384
"""Places of a tree: what says who is above whom is as many bytes squared, on every device."""

MOST_STEPS = 64
"""Draft steps of a tick: each is a part of the program of its own, which is compiled in about a second."""

MOST_LOOKED_UP = 4
"""Guesses for each node that look-up adds to a draft model's: it seldom has more that are any good."""


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


def check_fit(
    settings: EngineSettings,
    target: LlamaConfig,
    draft: LlamaConfig | None,
    vocab_size: int,
    drafter: Drafter | str,
    head: ExitHeadConfig | None = None,
) -> None:
    """Check that settings and models fit together; needs no weights. `head` is the exit head.

    Raises:
        ValueError: when they do not.
    """
    make_split(settings, target, head)
    check_parts(target, settings.tensor_parallel)
    if isinstance(drafter, str):
        if drafter not in DRAFTERS:
            raise ValueError(f"drafter must be one of {', '.join(DRAFTERS)}, or a drafter of your own, not {drafter!r}")
    elif not isinstance(drafter, Drafter):
        raise ValueError(f"drafter must be one of {', '.join(DRAFTERS)}, or an object of a Drafter, not {drafter!r}")
    else:
        check_drafter(drafter)
    check_places(settings)
    most = _capacity_of(target.context + MOST_PLACES)
    if settings.capacity is not None and settings.capacity > most:
        raise ValueError(
            f"capacity must be at most {most}, not {settings.capacity}: as many cache slots hold the target's context"
            f" of {target.context} tokens and the largest tree"
        )
    for name, config in (("target", target), ("draft", draft)):
        if config is not None and vocab_size > config.vocab_size:
            raise ValueError(f"the {name} has {config.vocab_size} embedding rows for {vocab_size} tokens")
    if settings.method == "pp":
        return
    if settings.children > vocab_size:
        raise ValueError(f"children ({settings.children}) must not exceed the number of tokens ({vocab_size})")
    at_exit = drafter.at_exit if isinstance(drafter, Drafter) else head is not None
    if at_exit != (settings.exit_layer is not None):
        raise ValueError(
            "a drafter at an exit needs exit_layer"
            if at_exit
            else f"exit_layer {settings.exit_layer} needs an exit head, or a drafter of your own at an exit"
        )
    if settings.exit_layer is not None:
        if draft is not None:
            raise ValueError("with an exit the target drafts for itself: leave the draft model out, or exit_layer")
        if drafter == "ngram":
            raise ValueError(
                "drafter 'ngram' does without an exit: choose 'model' (the head) or 'both', or no exit_layer"
            )
        if head is not None and head.exit_layer != settings.exit_layer:
            raise ValueError(f"the exit head is for exit layer {head.exit_layer}, not {settings.exit_layer}")
        return
    if drafter in ("model", "both") and draft is None:
        raise ValueError(
            f"method {settings.method!r} needs a draft model (draft=...), or a drafter that does without one "
            "(drafter='ngram')"
        )
    if drafter not in ("model", "both") and draft is not None:
        raise ValueError("give a draft model or a drafter that does without, not both")


def check_request(
    settings: EngineSettings, target: LlamaConfig, vocab_size: int, prompt: Iterable[int], max_new_tokens: int
) -> list[int]:
    """Check what shall be decoded, and return the prompt's ids; needs no weights.

    Raises:
        ValueError: for an empty prompt, an id that is no token, or a length over the context or the capacity.
    """
    tokens = _token_ids(prompt)
    if not tokens:
        raise ValueError("the prompt is empty; give at least one token of text")
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"prompt token {token} is none of the target's: ids go from 0 to {vocab_size - 1}")
    check_count("max_new_tokens", max_new_tokens)
    if len(tokens) + max_new_tokens > target.context:
        raise ValueError(
            f"prompt ({len(tokens)} tokens) and max_new_tokens ({max_new_tokens}) exceed the target's context of "
            f"{target.context} tokens: shorten the prompt, or lower max_new_tokens"
        )
    cache_slots(settings, len(tokens) + max_new_tokens)
    return tokens


def _token_ids(prompt: Iterable[int]) -> list[int]:
    """A prompt as whole numbers; `ValueError` when it is none."""
    if isinstance(prompt, bytes):
        raise ValueError("a prompt must be text or token ids, not bytes; decode it first")
    if isinstance(prompt, Mapping | Set):
        raise ValueError(f"a prompt must be text or token ids in their order, not a {type(prompt).__name__}")
    shape = getattr(prompt, "shape", None)
    if shape is not None and len(shape) != 1:
        raise ValueError(f"an array of token ids must have one axis, not the shape {tuple(shape)}: give one prompt")
    try:
        found = list(prompt)
        if any(isinstance(token, Mapping) for token in found):
            raise TypeError("those of a chat's messages are model.chat(messages)")
        if any(isinstance(token, bool) for token in found):
            raise TypeError("True and False are none")
        return [operator.index(token) for token in found]
    except TypeError as error:
        raise ValueError(f"a prompt must be text or whole token ids ({error})") from error


def cache_slots(settings: EngineSettings, length: int) -> int:
    """Cache slots (S) for prompt and answer of this length together, the tree in flight included.

    Raises:
        ValueError: when `settings.capacity` is less.
    """
    # A slot that is silently missing would be wrong text.
    need = int(length + tree_slots(settings))
    if settings.capacity is None:
        return _capacity_of(need)
    if need > settings.capacity:
        raise ValueError(
            f"prompt, answer and tree need {need} cache slots but capacity is {settings.capacity}; raise capacity, or "
            "lower max_new_tokens or width"
        )
    return settings.capacity


def _capacity_of(need: int) -> int:
    """The slots of a cache that has to have so many: a power of two, so that one program serves many lengths."""
    return max(256, 1 << (need - 1).bit_length())


def check_places(settings: EngineSettings) -> None:
    """Raise `ValueError` where the tree is too large (`MOST_PLACES`)."""
    if has_places(settings):
        return
    sizes = {"stpp": "width or depth", "pipedec": "width or stages", "ppsd": "width or stages", "eesd": "draft_length"}
    raise ValueError(
        f"the tree would need {tree_slots(settings)} places, and {MOST_PLACES} are the most; lower "
        f"{sizes.get(settings.method, 'width, stages, draft_steps or pool')}"
    )


def has_places(settings: EngineSettings) -> bool:
    """Whether the tree is small enough (`MOST_PLACES`)."""
    return tree_slots(settings) <= MOST_PLACES


def tree_slots(settings: EngineSettings) -> int:
    """Cache slots that the tree can take beside the text."""
    return make_schedule(settings).capacity(settings.stages)


def make_split(settings: EngineSettings, target: LlamaConfig, head: ExitHeadConfig | None = None) -> StageSplit:
    """The target's layers over the stages; an exit's head counts as part of its stage, but for the vocabulary.

    Raises:
        ValueError: as `split_layers` and `split_at_exit` do.
    """
    if settings.exit_layer is None:
        return split_layers(target.layers, settings.stages)
    weights = step_weights(head, target)["path"] if head else 0
    layer = sum(math.prod(shape) for shape in layer_shapes(target).values())
    return split_at_exit(target.layers, settings.stages, settings.exit_layer, weights / layer, settings.exit_stages)


def make_schedule(settings: EngineSettings) -> Schedule:
    """The method's schedule, or one's own."""
    if settings.schedule is not None:
        return settings.schedule
    width = settings.width
    match settings.method:
        case "pp":
            return PlainSchedule()
        case "stpp":
            spare = -(-settings.depth // settings.stages)
            return StaticSchedule(width=1 + settings.depth * width, level=width, spare=spare)
        case "pipedec" | "ppsd":
            return LevelSchedule(width)
        case "eesd":
            return SynchronousSchedule(width=1, length=settings.draft_length)
        case _:
            pool = settings.pool or 2 * (settings.draft_steps - 1) * width
            return BestFirstSchedule(width, pool, price=batch_price(settings))


def batch_price(settings: EngineSettings) -> Curve | None:
    """What a tick costs by the rows of its widest batch, in ticks of one row; `None` where that makes no difference.

    Rows are the cheaper the more a tick takes in any case: its draft steps, of a row each at least, and what it adds.
    """
    costs = settings.costs
    if not settings.adaptive or len(costs.stage.sizes(settings.width)) == 1:
        return None
    drafting = settings.steps * costs.draft.at(1)
    added = costs.slices(1, None if settings.exit_layer is None else 1) + costs.exchange
    ticks = [max(stage, drafting) + added for stage in costs.stage.cost]
    return Curve(tuple(tick / ticks[1] for tick in ticks))


def make_drafter(
    settings: EngineSettings,
    draft: LlamaConfig | None,
    drafter: Drafter | str,
    vocab_size: int,
    target: LlamaConfig | None = None,
    head: ExitHeadConfig | None = None,
) -> Drafter:
    """Who guesses: the drafter given, or one of `DRAFTERS` by its name. A `head` is one of a `target`."""
    if settings.method == "pp":
        return NoDrafter()
    if isinstance(drafter, Drafter):
        return drafter
    if drafter == "ngram":
        return NGramDrafter(children=settings.children)
    if head is not None:
        assert target is not None
        model = ExitDrafter(
            head=head,
            target=target,
            children=settings.children,
            vocab_size=vocab_size,
            sharpness=settings.sharpness,
            noise=settings.noise,
        )
    else:
        assert draft is not None  # check_fit
        model = ModelDrafter(
            config=draft,
            children=settings.children,
            vocab_size=vocab_size,
            sharpness=settings.sharpness,
            noise=settings.noise,
        )
    look_up = NGramDrafter(children=min(settings.children, MOST_LOOKED_UP))
    return CombinedDrafter(model, look_up) if drafter == "both" else model
