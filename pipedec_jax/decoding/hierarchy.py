"""The public decoder of a hierarchy of models: PipeSpec, and classic speculative decoding with the same models."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from pipedec_jax.analysis import cost
from pipedec_jax.decoding.decoder import Decoder, Prompt
from pipedec_jax.decoding.devices import pick_devices
from pipedec_jax.decoding.result import Generation
from pipedec_jax.decoding.stream import Request, Stream
from pipedec_jax.hierarchy.choice import Choice, Measured, agree, choose, measure
from pipedec_jax.hierarchy.engine import HierarchyEngine
from pipedec_jax.hierarchy.settings import Form, HierarchySettings, check_models
from pipedec_jax.hosts.processes import process_count, process_index
from pipedec_jax.loading import Model
from pipedec_jax.pipeline.settings import check_count
from pipedec_jax.recording.passes import PassRecording
from pipedec_jax.tokenizer import check_same_tokens

MEASURED_PROMPT = "def main(arguments):\n    for name in arguments:\n"
"""After it the models are measured, where passes are not given."""


class HierarchyDecoder:
    """Decodes prompts with two or more models, each on devices of its own.

    As `pipedec_jax.Decoder`, arguments are checked at once, weights are read when they are first needed, one request
    runs at a time, and the text is that of plain decoding by the last model.

    Args:
        models: with the same tokens, the smallest first, the target last.
        method: `pipespec`, where all run at once, or `speculative`, draft-then-verify with two models.
        form: of PipeSpec: `lockstep`, tick by tick, or `free`, each model at its own pace.
        stages: devices of each model; by default one each.
        passes: of each model but the target in a tick; of speculative, the lookahead. By default chosen from
            measurements, at construction, as is the width then (`pipedec_jax.hierarchy.choice`).
        width: most tokens that a verification reads; by default as many as the smaller models give in a tick.
        select: leave models out that do not pay, from the same measurements.
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
        method: str = "pipespec",
        form: Form = "lockstep",
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
        models = list(models)
        for model in models:
            if not isinstance(model, Model):
                raise ValueError(f"models must be such as pipedec_jax.load({model!r}) gives, not {model!r}")
        if select and (passes is not None or method == "speculative"):
            raise ValueError("models are selected together with their passes, for pipespec alone: leave passes out")
        settings = HierarchySettings(
            method=method,
            form=form,
            stages=tuple(stages) if stages is not None else (1,) * len(models),
            passes=tuple(passes) if passes is not None else (1,) * (len(models) - 1),
            width=width,
            prefill_width=prefill_width,
            capacity=capacity,
        )
        self.target = models[-1]
        check_models(settings, [model.config for model in models], self.target.vocab_size)
        for model in models[:-1]:
            check_same_tokens(self.target.tokenizer, model.tokenizer)
        ranks = sum(settings.stages)
        self.devices = pick_devices(ranks) if devices is None else list(devices)[:ranks]
        # Of the target alone: it checks requests, and knows the dtype that plain decoding would have.
        self._requests = Decoder(
            self.target,
            method="pp",
            stages=settings.stages[-1],
            dtype=dtype,
            devices=self.devices[-settings.stages[-1] :],
            capacity=capacity,
        )
        self.dtype = self._requests.dtype
        self.measured: Measured | None = None
        self.choice: Choice | None = None
        if passes is None:
            if process_index() == 0:
                self.measured = self._measure(models)
                self.choice = choose(self.measured, all_models=not select, stages=settings.stages[-1])
            self.choice = agree(self.choice, len(models))
            settings = _chosen(settings, self.choice, width)
            models = [models[index] for index in self.choice.models]
        self.models = models
        self.method, self.form = method, form
        self.settings = HierarchySettings(**{**vars(settings), "dtype": self.dtype})
        self.record = record
        self._stream: Stream | None = None

    @property
    def stages(self) -> int:
        """Stages of the target (N)."""
        return self.settings.stages[-1]

    @functools.cached_property
    def engine(self) -> HierarchyEngine:
        """The engine, with the weights on the devices; made when it is first asked for."""
        return HierarchyEngine(
            [model.source for model in self.models],
            self.settings,
            vocab_size=self.target.vocab_size,
            devices=self.devices,
            record=self.record,
        )

    def prepare(self) -> HierarchyEngine:
        """Convert and read the weights now, where the first answer would: what is wrong with them then shows here."""
        return self.engine

    def generate(self, prompt: Prompt, *, max_new_tokens: int = 128, **options: Any) -> Generation:
        """Decode an answer; arguments and errors are those of `Decoder.generate`."""
        request = self.request(prompt, max_new_tokens=max_new_tokens, **options)
        stream = self._begin(request, chunk=16 if request.stop else max_new_tokens)
        for _ in stream:
            pass
        return stream.result

    def stream(self, prompt: Prompt, *, max_new_tokens: int = 128, chunk: int = 4, **options: Any) -> Stream:
        """Decode an answer piece by piece; arguments and errors are those of `Decoder.stream`."""
        check_count("chunk", chunk)
        return self._begin(self.request(prompt, max_new_tokens=max_new_tokens, **options), chunk)

    def generate_many(self, prompts: Iterable[Prompt], **options: Any) -> list[Generation]:
        """Decode several answers one after another, with the same options."""
        if isinstance(prompts, str):
            raise ValueError("generate_many takes a list of prompts; generate takes one")
        return [self.generate(prompt, **options) for prompt in prompts]

    def request(self, prompt: Prompt, *, max_new_tokens: int = 128, **options: Any) -> Request:
        """Check what `generate` and `stream` are given; arguments and errors are those of `Decoder.request`."""
        return self._requests.request(prompt, max_new_tokens=max_new_tokens, **options)

    def bytes_per_device(self) -> list[dict[str, int | str]]:
        """Bytes of weights and caches on each device; caches appear with the first prompt."""
        return self.engine.bytes_per_device()

    def recording(self) -> PassRecording:
        """What every model did for the last answer, as far as it has come.

        Raises:
            RuntimeError: before the first answer.
            ValueError: where the decoder was not made with `record=True`.
        """
        names = [Path(model.name).name for model in self.models]
        return self.engine.recording(names, lambda token: self.target.tokenizer.decode([token]) or f"<{token}>")

    def modeled_speedup_vs_pp(self, ticks_per_token: float) -> float:
        """How many times faster than PP on as many stages of the target an answer is, in modeled time.

        From bytes of weights read: a tick lasts as long as its slowest rank. Draft-then-verify pays for its draft's
        passes before each verification, one more than the lookahead, as after a lookahead that was right throughout.
        """
        size = self.dtype.itemsize
        stages = self.settings.stages
        whole = cost.byte_costs(self.target.config, None, size)
        token = cost.pp_token_cost(whole, self.target.config.layers, stages[-1])
        *drafts, tick = (
            cost.pass_cost(cost.byte_costs(model.config, None, size), model.config.layers, count)
            for model, count in zip(self.models, stages, strict=True)
        )
        if self.method == "speculative":
            # A round: the draft's passes, then one tick for every stage of the target.
            drafting = (self.settings.passes[0] + 1) * drafts[0] * stages[0]
            return token / (ticks_per_token * (tick + drafting / stages[-1]))
        passes = [*zip(drafts, self.settings.passes, strict=True), (tick, 1)]
        return token / (ticks_per_token * cost.lockstep_tick_cost(passes))

    def _measure(self, models: Sequence[Model]) -> Measured:
        return measure(
            [model.source for model in models],
            [self.target.tokenizer.encode(MEASURED_PROMPT)],
            vocab_size=self.target.vocab_size,
            # Of several processes the first one measures alone, each model in turn on a device of its own.
            devices=self.devices if process_count() == 1 else jax.local_devices()[:1] * len(models),
            dtype=self.dtype,
        )

    def _begin(self, request: Request, chunk: int) -> Stream:
        if self._stream is not None:
            self._stream.supersede()
        self._stream = Stream(
            self.engine, self.target.tokenizer, request, self.method, self.modeled_speedup_vs_pp, chunk
        )
        return self._stream


def _chosen(settings: HierarchySettings, choice: Choice, width: int | None) -> HierarchySettings:
    """Settings for the models and passes that were chosen."""
    passes = choice.passes
    if settings.method == "speculative":
        passes = (max(1, choice.width - 1),)
    return HierarchySettings(
        **{
            **vars(settings),
            "stages": tuple(settings.stages[index] for index in choice.models),
            "passes": passes,
            "width": width or (None if settings.method == "speculative" else choice.width),
        }
    )
