"""The public decoder: a target, a draft and a method, over one prompt after another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pipedec_jax.config import LlamaConfig
from pipedec_jax.decoding.base import BaseDecoder, Prompt
from pipedec_jax.decoding.devices import check_devices, check_dtype, decoding_dtype, pick_devices
from pipedec_jax.decoding.exit_choice import describe_choice, pick_exit
from pipedec_jax.decoding.request_options import check_request_options
from pipedec_jax.decoding.stream import Request
from pipedec_jax.drafters.base import Drafter
from pipedec_jax.drafters.chances import Noise
from pipedec_jax.exit_store import given_exit_head, load_exit_head
from pipedec_jax.loading import Model
from pipedec_jax.model.exit_head import ExitHead, ExitHeadConfig
from pipedec_jax.model.parameters import parameter_count
from pipedec_jax.model.tensor_parallel import tensor_share
from pipedec_jax.modeled import cost
from pipedec_jax.modeled.exit_cost import Cycle, cycle, eesd_tick_costs, exit_tick_costs
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.fit import check_fit, check_request, has_places
from pipedec_jax.pipeline.methods import make_drafter, make_schedule, make_split
from pipedec_jax.pipeline.settings import EXIT_ONLY, DrafterName, EngineSettings, Method, check_used
from pipedec_jax.recording.history import Recording
from pipedec_jax.schedules.base import Schedule
from pipedec_jax.tick_costs import Curve, TickCosts
from pipedec_jax.tokenizer import check_same_tokens

USUAL = 16
"""Width, and guesses after each token, where none are given and the guesses are no chain."""


class Decoder(BaseDecoder[Engine]):
    """Decodes prompts with one method.

    Arguments are checked at once; weights are read, and programs compiled, when they are first needed, and then kept.
    What a method has no use for is refused where it is given, but PP, the baseline, takes what others guess by: a
    draft, which it leaves unread, `width`, `children`, `drafter`, `sharpness` and `noise`.
    One request runs at a time: a new one, of whatever thread, ends the stream before it.

    Args:
        target: the model whose tokens are given.
        draft: the model that guesses, with the target's tokens; PP needs none, nor does an exit.
        method: `best-first`, `pipedec` as published, `stpp` for one static tree at a time, `pp` for plain pipeline
            parallelism, `ppsd` for guesses from the target's own early exit, or `eesd` for the same drafted first and
            verified then. The tokens are the same.
        stages: stages that the target's layers are spread over; the draft takes one more.
        tensor_parallel: devices that each stage is split over, by heads, feed-forward width and vocabulary; the draft
            is whole on each of its own.
        idle_ranks: ranks behind all others, which hold a slice of the vocabulary alone (the draft and caches too, as
            arrays of all ranks are alike): where devices of a TPU slice may not be left out. By default none.
        width: most guesses that a tick sends into the pipe; by default 16, and 1 for `ppsd` (the paper's chain) and
            `eesd`.
        children: most guesses of the draft after each token; beside a draft, look-up adds a few. By default 16; of
            `ppsd` as many as `width`, at most 16, and of `eesd` 1.
        draft_steps: steps the draft makes in a tick of best-first; by default as many as fit beside a stage, and in
            the tree's places.
        depth: levels of a tree of STPP; by default 12.
        exit_layer: layers of the target after which a head guesses (PPSD), in place of a draft; with `ppsd`, `eesd`,
            `pipedec` and `best-first`. The first two need none where heads are stored: the one that is predicted to be
            quickest is taken (`exit_forecasts`).
        exit_head: that head: the name of one stored beside the target without its exit layer, such as `block`;
            `target` for the untrained one, which is the target's own norm and LM head; a `model.exit_head.ExitHead`.
            By default, of those stored for the exit layer, the one that agrees most with the target.
        exit_stages: stages that those layers are spread over; by default as many as make a token quickest.
        draft_length: tokens that EESD drafts before it verifies; by default 4.
        pool: most tokens that best-first extends before they are sent; by default two batches for every draft step but
            one.
        adaptive: whether best-first sends only what is worth its cost, where a calibration says that it grows with the
            rows of a batch (the default); otherwise as much as there is place for.
        sharpness: factor on the draft model's logits before they are taken for the target's chances; by default 1.
        noise: under which noise the draft model guesses tokens that are drawn: `shared` with the target (the default),
            `independent` or `none`.
        dtype: one of `devices.DTYPES`; by default the checkpoint's on accelerators and float32 on CPU.
        devices: devices to use, the first stage's first; by default JAX's, or for small models virtual CPU devices if
            accelerators are too few.
        drafter: who guesses: `model` (the draft, or the exit head), `ngram` (look-up in the text so far), `both`, or a
            drafter of your own (see `pipedec_jax.drafters`). By default both; the exit head alone for `ppsd` and
            `eesd`.
        calibration: measured seconds for modeled times (`modeled.cost.Costs`), in place of bytes: what
            `analysis.calibration.calibrate` gives, or the JSON that `scripts/calibrate.py` writes, read. Where they
            grow with a batch's rows, fewer rows are computed as such, and `adaptive` has something to go by.
        schedule: what a tick sends and extends, by a schedule of your own in place of best-first's (see
            `pipedec_jax.schedules`); width and pool are then its.
        prefill_width: prompt tokens that prefill takes in one step.
        capacity: cache slots; by default the next power of two that suffices.
        record: whether to keep what happens in every tick, for `recording`. Tokens and ticks are the same; off, which
            it is by default, it costs nothing, and on, as many ticks at a time come back to the host.

    Raises:
        ValueError: when settings, models and devices do not fit together.
        FileNotFoundError: when there is no such exit head.
    """

    def __init__(
        self,
        target: Model,
        draft: Model | None = None,
        *,
        method: Method = "best-first",
        stages: int = 4,
        tensor_parallel: int = 1,
        idle_ranks: int = 0,
        width: int | None = None,
        children: int | None = None,
        draft_steps: int | None = None,
        depth: int | None = None,
        exit_layer: int | None = None,
        exit_head: ExitHead | str | None = None,
        exit_stages: int | None = None,
        draft_length: int | None = None,
        pool: int | None = None,
        adaptive: bool | None = None,
        sharpness: float | None = None,
        noise: Noise | None = None,
        dtype: Any = None,
        devices: Sequence[jax.Device] | None = None,
        drafter: Drafter | DrafterName | None = None,
        calibration: Mapping[str, Any] | None = None,
        schedule: Schedule | None = None,
        prefill_width: int = 128,
        capacity: int | None = None,
        record: bool = False,
    ) -> None:
        super().__init__()
        for name, model in (("target", target), ("draft", draft)):
            if not isinstance(model, Model | None if name == "draft" else Model):
                raise ValueError(f"{name} must be a model, such as pipedec_jax.load({model!r}) gives, not {model!r}")
        options: dict[str, Any] = {
            "width": width,
            "children": children,
            "sharpness": sharpness,
            "noise": noise,
            "draft_steps": draft_steps,
            "pool": pool,
            "adaptive": adaptive,
            "depth": depth,
            "draft_length": draft_length,
        }
        if method in ("pipespec", "speculative"):
            raise ValueError(f"method {method!r} is of a hierarchy of models: use pipedec_jax.HierarchyDecoder")
        check_used(method, drafter, **options)
        given = {name: value for name, value in options.items() if value is not None}
        if schedule is not None:
            for name in ("width", "pool", "adaptive"):
                if name in given:
                    raise ValueError(f"{name} is for schedules of pipedec_jax: leave it out beside one of your own")
        chain = method in EXIT_ONLY
        if drafter is None:
            drafter = "model" if chain else "both"
        usual = {"width": 1 if chain else USUAL, "children": _usual_children(method, width), "depth": 12}
        # The dtype comes last: it depends on the devices, which the other checks must come before.
        settings_at = functools.partial(
            EngineSettings,
            method=method,
            stages=stages,
            tensor_parallel=tensor_parallel,
            idle_ranks=idle_ranks,
            exit_stages=exit_stages,
            schedule=schedule,
            prefill_width=prefill_width,
            capacity=capacity,
            record=record,
            **(usual | given),
        )
        settings, head, self.exit_forecasts = pick_exit(target, settings_at, method, exit_layer, exit_head, drafter)
        """Of each stored exit head that fits, the chosen one first; none where the exit was given, or there is none."""
        check_fit(settings, target.config, draft.config if draft else None, target.vocab_size, drafter, head)
        if draft is not None:
            check_same_tokens(target.tokenizer, draft.tokenizer)
        self.target = target
        self.draft = draft = None if method == "pp" else draft
        self.method = settings.name
        self.drafter = drafter
        self.split = make_split(settings, target.config, head)
        self._head = head
        self._given_head = given_exit_head(exit_head, target.config) if isinstance(exit_head, ExitHead) else None
        guessing = draft.config if draft else None
        draft_ranks = make_drafter(settings, guessing, drafter, target.vocab_size, target.config, head).ranks
        ranks, parts = settings.stages + draft_ranks + settings.idle_ranks, settings.tensor_parallel
        if devices is None:
            models = [target.config, *([guessing] if guessing else [])]
            self.devices = pick_devices(ranks, parts, sum(map(parameter_count, models)))
        else:
            self.devices = check_devices(devices, ranks * parts)
        self.dtype = decoding_dtype(dtype, target.dtype, self.devices[0])
        costs = _model_costs(calibration, target.config, guessing, self.dtype, head)
        self._costs = cost.split_over(costs, target.config, parts)
        if draft_steps is None and settings.exit_layer is None and _drafts_ahead(settings):
            settings = _with_draft_steps(settings, self._costs, target.config.layers)
        self.settings = dataclasses.replace(settings, costs=self._tick_costs(settings, draft_ranks), dtype=self.dtype)

    def _tick_costs(self, settings: EngineSettings, draft_ranks: int) -> TickCosts:
        if settings.method == "eesd":
            return eesd_tick_costs(self._costs, self.split, settings.draft_length)
        if self.split.exit:
            return exit_tick_costs(self._costs, self.split, settings.width)
        layers, width = self.target.config.layers, make_schedule(settings).width
        if settings.method == "pp":  # a stage at a time: what a token costs, however unevenly, is spread over its ticks
            return TickCosts(Curve((cost.pp_token_cost(self._costs, layers, settings.stages) / settings.stages,)))
        return cost.tick_costs(self._costs, layers, settings.stages, draft_ranks, width)

    def __repr__(self) -> str:
        return f"Decoder({self.target!r}, {self.method}, {self.stages} stages, width {self.width}, {self.dtype})"

    @property
    def stages(self) -> int:
        """Stages of the target (N)."""
        return self.settings.stages

    @property
    def width(self) -> int:
        """Most guesses that a tick sends into the pipe (W)."""
        return self.settings.width

    @property
    def children(self) -> int:
        """Most guesses after each token (K)."""
        return self.settings.children

    @property
    def lag(self) -> int:
        """Ticks from a token's sending to that of its guesses at the earliest: 1, or the stages of the exit path."""
        return max(1, self.split.exit)

    @property
    def cycle(self) -> Cycle | None:
        """The longest stage of a target with an exit at full width, the exit head included; `None` without an exit.

        In whole layers, also where a device has a part of each.
        """
        if not self.split.exit:
            return None
        found, parts = cycle(self._costs, self.split, self.width), self.settings.tensor_parallel
        share = tensor_share(self.target.config, parts)
        return Cycle(found.stage, share * found.layers, share * found.head, parts * share * found.vocabulary)

    @property
    def exit_head_config(self) -> ExitHeadConfig | None:
        """What the exit head is, or `None`; reads no weight."""
        return self._head

    @functools.cached_property
    def exit_head(self) -> ExitHead | None:
        """The exit head, read when it is first asked for, or `None`.

        Raises:
            ValueError: when it is damaged, or belongs to another target.
        """
        if self._given_head is not None or self._head is None:
            return self._given_head
        return load_exit_head(self.target, self._head.exit_layer, self._head.kind)

    def _make_engine(self) -> Engine:
        check_dtype(self.dtype)
        return Engine(
            self.target.source,
            self.draft.source if self.draft is not None else None,
            self.settings,
            vocab_size=self.target.vocab_size,
            devices=self.devices,
            drafter=self.drafter,
            exit_head=self.exit_head,
        )

    def report(self) -> list[str]:
        """What was predicted where the exit was chosen, as lines; none where it was given, or there is none."""
        return describe_choice(self.exit_forecasts)

    def request(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Collection[str] = (),
        logprobs: bool = False,
        drafter_params: Any = None,
    ) -> Request:
        """Check what `generate` and `stream` are given; decodes nothing and reads no weight.

        Args:
            prompt: text, or token ids (of a chat: `target.chat(messages)`).
            max_new_tokens: most tokens of the answer.
            temperature: divides the logits; 0 takes the most likely token.
            top_k: sample among the k most likely tokens; 0 among all.
            top_p: sample among the most likely tokens that hold this probability; 1 among all.
            seed: of the sampling noise. The answer depends on prompt, seed, target and dtype alone.
            stop: strings that end the answer when they appear in its text; they are cut off.
            logprobs: whether to give each token's log-probability.
            drafter_params: new parameters for a drafter of one's own; by default it keeps those of the request before.

        Raises:
            ValueError: for an empty prompt, a token that is none, a length over the context, or a value out of range;
                and for float64 where JAX's 64-bit mode, which each thread has of its own, is off.
        """
        check_dtype(self.dtype)
        if isinstance(prompt, str):
            prompt = self.target.tokenizer.encode(prompt) if prompt else []
        tokens = check_request(self.settings, self.target.config, self.target.vocab_size, prompt, max_new_tokens)
        if drafter_params is not None and isinstance(self.drafter, str):
            raise ValueError(f"drafter_params are for a drafter of your own; this decoder's is {self.drafter!r}")
        if not isinstance(logprobs, bool):
            raise ValueError(f"logprobs must be True or False, not {logprobs!r}")
        sampling, stops = check_request_options(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop
        )
        return Request(
            prompt=tuple(tokens),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            end_tokens=tuple(token for token in self.target.end_tokens if token < self.target.vocab_size),
            stop=stops,
            logprobs=logprobs,
            drafter_params=drafter_params,
        )

    def recording(self) -> Recording:
        """What happened in every tick of the last answer, as far as it has come.

        Where a stop string cut the answer, ticks that were decoded beyond it are there too.

        Raises:
            RuntimeError: before the first answer.
            ValueError: where the decoder was not made with `record=True`.
        """
        return self.engine.recording(self.target.tokenizer.label)

    def modeled_speedup_vs_pp(self, cost_per_token: float) -> float:
        """How many times faster than PP on as many stages an answer is, in modeled time; 1 for PP itself.

        Args:
            cost_per_token: what the answer's ticks cost (`self.settings.costs`) for each of its tokens.
        """
        if self.method == "pp":
            return 1.0
        return cost.pp_token_cost(self._costs, self.target.config.layers, self.stages) / cost_per_token


def _usual_children(method: str, width: int | None) -> int:
    """Guesses after each token, where none are given."""
    # PPSD's chain is a tree where a width is given, which without siblings it could not fill.
    if method == "ppsd" and isinstance(width, int | np.integer):
        return int(min(USUAL, width))
    return 1 if method in EXIT_ONLY else USUAL


def _model_costs(
    calibration: Mapping[str, Any] | None,
    target: LlamaConfig,
    draft: LlamaConfig | None,
    dtype: np.dtype[Any],
    head: ExitHeadConfig | None,
) -> cost.Costs:
    """Measured seconds where there is a calibration, else bytes."""
    if calibration is None:
        return cost.byte_costs(target, draft, dtype.itemsize, head)
    found = cost.calibrated_costs(calibration, target, draft, dtype, head)
    if head is not None and not found.exit_head:
        raise ValueError(
            "the calibration lacks exit_head, the seconds of a step of the exit head: calibrate with it "
            f"(calibrate.py --exit-layer {head.exit_layer} --exit-head {head.name})"
        )
    return found


def _drafts_ahead(settings: EngineSettings) -> bool:
    """Whether a tick may have several draft steps."""
    return settings.method == "best-first" and (settings.schedule is None or settings.schedule.drafts_ahead)


def _with_draft_steps(settings: EngineSettings, costs: cost.Costs, layers: int) -> EngineSettings:
    """With as many draft steps as fit beside a stage, and in the tree's places; that one fits was checked before."""
    most = cost.draft_steps_beside_a_stage(costs, layers, settings.stages, settings.width)
    options = (dataclasses.replace(settings, draft_steps=steps) for steps in range(most, 0, -1))
    return next(filter(has_places, options))
