"""The public decoder of a hierarchy of models: PipeSpec, and classic speculative decoding with the same models."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, Unpack, get_args

import jax

from pipedec_jax.decoding.base import BaseDecoder, Prompt
from pipedec_jax.decoding.decoder import Decoder
from pipedec_jax.decoding.devices import check_devices, pick_devices, pick_room, room
from pipedec_jax.decoding.request_options import RequestOptions
from pipedec_jax.decoding.stream import Request
from pipedec_jax.hierarchy import report
from pipedec_jax.hierarchy.choice import Choice, agree, choose, choose_in_turns, selections
from pipedec_jax.hierarchy.engine import HierarchyEngine
from pipedec_jax.hierarchy.measure import Measured, Workload, measure
from pipedec_jax.hierarchy.race import Entry, candidates, race
from pipedec_jax.hierarchy.settings import Form, HierarchySettings, check_models
from pipedec_jax.hierarchy.together import measure_together
from pipedec_jax.hosts.processes import process_count, process_index
from pipedec_jax.loading import Model, short_names
from pipedec_jax.model.parameters import parameter_count
from pipedec_jax.modeled import cost
from pipedec_jax.own_settings import own_settings
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.recording.passes import PassRecording
from pipedec_jax.tokenizer import check_same_tokens

MEASURED_PROMPT = "def main(arguments):\n    for name in arguments:\n"
"""After it the models are measured, where passes are not given."""
MEASURED_TOKENS = 96
"""Of the text along which they are measured."""
RACED_TOKENS = 64
"""Of an answer, where ways to decode are run against each other."""


class HierarchyDecoder(BaseDecoder[HierarchyEngine | Engine]):
    """Decodes prompts with two or more models, each on devices of its own.

    As `pipedec_jax.Decoder`, arguments are checked at once, one request runs at a time, and the text is that of plain
    decoding by the last model. Weights are read when they are first needed: for the first answer where `passes` are
    given, else here, where they are chosen by measuring the models.

    Args:
        models: with the same tokens, the smallest first, the target last.
        method: `pipespec`, where all run at once, or `speculative`, draft-then-verify with two models.
        form: of PipeSpec: `lockstep`, tick by tick (the default), or `free`, each model at its own pace; with `select`
            the faster one by default.
        stages: devices of each model; by default one each, or as many as `select` finds best.
        passes: of each model but the target in a tick (on several stages, a tick of its own pipe); of speculative, the
            lookahead. By default chosen from measurements, at construction, as is the width then
            (`pipedec_jax.hierarchy.choice`). Each model is measured alone on one device, which has to hold it; where
            none can, give stages and passes.
        width: most tokens that a verification reads; by default as many as the smaller models give in a tick.
        select: choose among the models as well, and, of pipespec, the stages of each and the form: the best
            predictions are run beside plain decoding (`pipedec_jax.hierarchy.race`), and the fastest is used, be it
            plain decoding; what gives other tokens there (a near tie, in float32 or bfloat16) is not. `raced` tells. Of
            several processes the first one's prediction is used, in lockstep, on the devices of all; what it takes to
            pass between them is measured by all together.
        dtype: as for `Decoder`.
        devices: the smallest model's first.
        prefill_width: prompt tokens that prefill takes in one step.
        capacity: cache slots; by default the next power of two that suffices.
        record: whether to keep what every model does, for `recording`; the programs are the same.

    Raises:
        ValueError: when settings, models and devices do not fit together.
    """

    def __init__(
        self,
        models: Sequence[Model],
        *,
        method: Literal["pipespec", "speculative"] = "pipespec",
        form: Form | None = None,
        stages: Sequence[int] | None = None,
        passes: Sequence[int] | None = None,
        width: int | None = None,
        select: bool = False,
        dtype: Any = None,
        devices: Sequence[jax.Device] | None = None,
        prefill_width: int = 128,
        capacity: int | None = None,
        record: bool = False,
    ) -> None:
        super().__init__()
        _check_arguments(models, method, form, stages, passes, select, record)
        models = list(models)
        settings = HierarchySettings(
            # Of speculative any two models may be chosen.
            method="pipespec" if select and method == "speculative" else method,
            form=form or "lockstep",
            stages=tuple(stages) if stages is not None else (1,) * len(models),
            passes=tuple(passes) if passes is not None else (1,) * (len(models) - 1),
            width=width,
            prefill_width=prefill_width,
            capacity=capacity,
        )
        self.target = models[-1]
        check_models(settings, [model.config for model in models], self.target.vocab_size)
        _check_tokens(models)
        free_stages = select and stages is None and method == "pipespec"
        if free_stages:
            _check_processes(len(models), self.target.config.layers)
        self._own_devices = devices is not None
        ranks = sum(settings.stages)
        if devices is None:
            weights = sum(parameter_count(model.config) for model in models)
            self.devices = pick_room(ranks, weights) if free_stages else pick_devices(ranks, weights=weights)
        else:
            needed = check_devices(devices, ranks)
            self.devices = list(devices) if free_stages else needed
        # Of the target alone: it checks requests, and knows the dtype that plain decoding would have.
        self._requests = self._plain(settings.stages[-1], dtype, capacity)
        self.dtype = self._requests.dtype
        self.measured: Measured | None = None
        self.choice: Choice | None = None
        self.raced: list[Entry] = []
        """What `select` has run, the fastest first."""
        self.method: str = method
        self.form: Form = form or "lockstep"
        self.settings = dataclasses.replace(settings, dtype=self.dtype)
        self.models, self.record = models, record
        names = short_names(model.name for model in models)
        self._names = [names[model.name] for model in models]
        if passes is None:
            with own_settings():
                self._choose(select, free_stages, width, (form,) if form else get_args(Form))
        if not self.plain:
            self.settings = dataclasses.replace(self.settings, tick_cost=self._tick_cost())

    def _plain(self, stages: int, dtype: Any, capacity: int | None) -> Decoder:
        return Decoder(
            self.target, method="pp", stages=stages, dtype=dtype, devices=self.devices[-stages:], capacity=capacity
        )

    def _choose(self, select: bool, free_stages: bool, width: int | None, forms: tuple[Form, ...]) -> None:
        """Passes, and whatever else is not given, from measurements."""
        models, given, processes = self.models, None if free_stages else self.settings.stages, process_count()
        raced = select and self.method == "pipespec" and processes == 1
        devices = room(self.devices)
        counts = [[count] for count in given] if given else self._stages_to_measure(devices)
        self.measured = self._measure(models, counts)
        if self.measured is not None and not raced:
            pick = choose_in_turns if self.method == "speculative" else functools.partial(choose, devices=devices)
            least = processes if processes > 1 else 0
            self.choice = pick(
                self.measured, all_models=not select, stages=given, dispatch=True, least=least, width=width
            )
        if not raced:
            self.choice = agree(self.choice, len(models))
        else:
            assert self.measured is not None  # this is the first process
            found = candidates(self.measured, selections(len(models)), given, devices, width)
            self.raced = self._race(found, forms)
            self.choice = self.raced[0].choice
            self.form = self.raced[0].form
        if self.choice is None:
            self.models, self.method = [self.target], "pp"
            self._requests = self._plain(1, self.dtype, self.settings.capacity)
            self.devices = self.devices[-1:]
            return
        self.settings = self._settings(self.choice, self.form)
        self.models = [models[index] for index in self.choice.models]
        if select or processes > 1:
            total = sum(self.settings.stages)
            parted = processes > 1 and not self._own_devices  # over all processes
            self.devices = pick_devices(total) if parted else self.devices[:total]
            self._requests = self._plain(self.settings.stages[-1], self.dtype, self.settings.capacity)

    def _stages_to_measure(self, devices: int) -> list[list[int]]:
        """Of each model, numbers of stages that may be chosen."""
        layers = [model.config.layers for model in self.models]
        most = devices - 1  # another model needs one
        counts = [stage_counts(min(most, count)) for count in layers]
        if (processes := process_count()) > 1:
            # What is left for the target where every process has to have a stage.
            forced = (processes - size + 1 for size in range(2, len(layers) + 1))
            counts[-1] = sorted({*counts[-1], *(count for count in forced if 1 < count <= layers[-1])})
        return counts

    def _settings(self, choice: Choice, form: Form) -> HierarchySettings:
        """Settings for a choice."""
        return dataclasses.replace(
            self.settings,
            method=self.method,
            stages=choice.stages,
            passes=choice.passes,
            width=choice.width,
            form=form,
        )

    def _race(self, choices: Sequence[Choice], forms: tuple[Form, ...]) -> list[Entry]:
        """Run some choices in both forms, and plain decoding on one device."""

        def make(choice: Choice | None) -> Any:
            if choice is None:
                plain = EngineSettings(method="pp", stages=1, dtype=self.dtype)
                return Engine(
                    self.target.source, None, plain, vocab_size=self.target.vocab_size, devices=self.devices[:1]
                )
            # The user's capacity is for other prompts.
            settings = dataclasses.replace(self._settings(choice, "free"), capacity=None)
            return self._engine([self.models[index] for index in choice.models], settings)

        def reform(engine: Any, form: Form) -> None:
            engine.settings = dataclasses.replace(engine.settings, form=form)

        return race(choices, forms, make, reform, *self._sample(RACED_TOKENS))

    def _sample(self, new_tokens: int) -> tuple[list[int], int]:
        """A prompt, and how many tokens to decode after it: fewer where the target's context is short."""
        context = self.target.config.context
        prompt = self.target.tokenizer.encode(MEASURED_PROMPT)[: max(1, context // 2)]
        return prompt, min(new_tokens, context - len(prompt))

    def __repr__(self) -> str:
        return f"HierarchyDecoder({self.models!r}, {self.method}, {self.form}, {self.dtype})"

    @property
    def stages(self) -> int:
        """Stages of the target (N)."""
        return 1 if self.plain else self.settings.stages[-1]

    @property
    def plain(self) -> bool:
        """Whether plain decoding by the target alone was the fastest, so that there is no hierarchy."""
        return self.method == "pp"

    def _whole_chunk(self, request: Request) -> int:
        if self.plain or request.stop:
            return super()._whole_chunk(request)
        return request.max_new_tokens  # a hierarchy's host waits for every tick, and notices an interrupt there

    def _make_engine(self) -> HierarchyEngine | Engine:
        if self.plain:
            return self._requests.engine
        return self._engine(self.models, self.settings)

    def _engine(self, models: Sequence[Model], settings: HierarchySettings) -> HierarchyEngine:
        return HierarchyEngine(
            [model.source for model in models],
            settings,
            vocab_size=self.target.vocab_size,
            devices=self.devices,
            record=self.record,
        )

    def request(self, prompt: Prompt, *, max_new_tokens: int = 128, **options: Unpack[RequestOptions]) -> Request:
        """Check what `generate` and `stream` are given; arguments and errors are those of `Decoder.request`."""
        return self._requests.request(prompt, max_new_tokens=max_new_tokens, **options)

    def recording(self) -> PassRecording:
        """What every model did for the last answer, as far as it has come.

        Raises:
            RuntimeError: before the first answer.
            ValueError: where the decoder was not made with `record=True`, or plain decoding was chosen.
        """
        self.check_recorded()
        assert isinstance(self.engine, HierarchyEngine)  # that was checked
        names = short_names(model.name for model in self.models)
        said = [names[model.name] for model in self.models]
        return self.engine.recording(said, self.target.tokenizer.label)

    def check_recorded(self) -> None:
        """Raise `ValueError` where there will be no `recording`, because plain decoding was chosen."""
        if self.plain:
            raise ValueError("plain decoding was the fastest (models auto), and of it no passes are recorded")

    def report(self) -> list[str]:
        """What was measured and predicted where something was chosen, as lines; none where all was given."""
        if self.measured is None:
            return []
        return report.lines(self.measured, self.choice, self.raced, self._names, self.settings.method)

    def modeled_speedup_vs_pp(self, cost_per_token: float) -> float:
        """How many times faster than PP on as many stages of the target an answer is, in modeled time.

        Args:
            cost_per_token: what the answer's ticks cost (`self.settings.tick_cost` each) for each of its tokens, in
                bytes of weights read.
        """
        if self.plain:
            return self._requests.modeled_speedup_vs_pp(cost_per_token)
        config = self.target.config
        return cost.pp_token_cost(self._bytes(self.target), config.layers, self.stages) / cost_per_token

    def _tick_cost(self) -> float:
        """Bytes of weights that a tick reads: as long as it lasts is what its slowest rank takes.

        Draft-then-verify pays for its draft's passes before each verification, one more than the lookahead, as after a
        lookahead that was right throughout; each tick of the round has a share in them.
        """
        stages = self.settings.stages
        *drafts, tick = (
            cost.pass_cost(self._bytes(model), model.config.layers, count)
            for model, count in zip(self.models, stages, strict=True)
        )
        if self.settings.method == "speculative":
            # A round: the draft's passes, then one tick for every stage of the target.
            drafting = (self.settings.passes[0] + 1) * drafts[0] * stages[0]
            return tick + drafting / stages[-1]
        return cost.lockstep_tick_cost([*zip(drafts, self.settings.passes, strict=True), (tick, 1)])

    def _bytes(self, model: Model) -> cost.Costs:
        return cost.byte_costs(model.config, None, self.dtype.itemsize)

    def _measure(self, models: Sequence[Model], stages: Sequence[Sequence[int]]) -> Measured | None:
        """What a choice rests on; of several processes, the first one's."""
        devices, ticks, shared = self.devices, None, 0.0
        prompt, new_tokens = self._sample(MEASURED_TOKENS)
        workload = Workload([prompt], self.target.vocab_size, self.dtype, new_tokens)
        sources = [model.source for model in models]
        if process_count() > 1:
            # Together what takes all of them; then the first one alone, each model in turn on devices of its own.
            ticks, shared = measure_together(sources, workload, stages, devices)
            if process_index() > 0:
                return None
            own = jax.local_devices()
            devices = [own[index % len(own)] for index in range(max(len(models), len(own)))]
        found = measure(sources, workload, devices=devices, stages=stages, ticks=ticks)
        return dataclasses.replace(found, shared=shared)


AnyDecoder = Decoder | HierarchyDecoder
"""Either of the public decoders."""


def _check_arguments(
    models: Sequence[Any],
    method: str,
    form: Form | None,
    stages: Sequence[int] | None,
    passes: Sequence[int] | None,
    select: bool,
    record: bool,
) -> None:
    """Raise `ValueError` for what no settings would show."""
    if not isinstance(models, Sequence) or not all(isinstance(model, Model) for model in models):
        raise ValueError(f"models must be a list of such as pipedec_jax.load(DIRECTORY) gives, not {models!r}")
    for name, value in (("select", select), ("record", record)):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, not {value!r}")
    for name, numbers in (("stages", stages), ("passes", passes)):
        if numbers is not None and not isinstance(numbers, Sequence):
            raise ValueError(f"{name} must be a list, a number for each model, not {numbers!r}")
    if stages is not None and len(models) > 1 and len(stages) != len(models):
        raise ValueError(f"stages must be one number for each model: {len(models)}, not {len(stages)}")
    if select and passes is not None:
        raise ValueError("models are selected together with their passes: leave passes out")
    if form is not None and method == "speculative":
        raise ValueError("form is for pipespec: the models of speculative take turns, so leave form out")


def _check_tokens(models: Sequence[Model]) -> None:
    """Raise `ValueError` where a model's tokens are not the target's, the last one's."""
    for model in models[:-1]:
        try:
            check_same_tokens(models[-1].tokenizer, model.tokenizer)
        except ValueError as error:
            raise ValueError(f"{model.name}: {error}") from error


def _check_processes(models: int, layers: int) -> None:
    """Raise `ValueError` where the target, of so many layers, has too few stages for every process to have a model."""
    if process_count() - models + 1 > layers:
        raise ValueError(
            f"{process_count()} processes are too many for {models} models, the target of {layers} layers: each needs "
            "a stage at least"
        )


def stage_counts(most: int) -> list[int]:
    """Numbers of stages worth trying: powers of two."""
    return [1 << power for power in range(most.bit_length())] if most else [1]
