"""Tables of hierarchies of models: what they take by measured passes, by the clock, when delayed, and by depth.

Every table is a list of Markdown lines, every answer in it is compared with plain decoding's, and the baseline of every
ratio is plain decoding by the target alone on one device, its own loop, in the same run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pipedec_jax import clock
from pipedec_jax.analysis import hierarchy_table as table
from pipedec_jax.hierarchy import choice as choices
from pipedec_jax.hierarchy.choice import Choice
from pipedec_jax.hierarchy.engine import HierarchyEngine
from pipedec_jax.hierarchy.measure import Measured, Workload, measure
from pipedec_jax.hierarchy.settings import HierarchySettings
from pipedec_jax.model.parameters import MemorySource, ParameterSource, nest, parameter_shapes
from pipedec_jax.modeled.hierarchy import most_tokens_per_pass
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.settings import EngineSettings


@dataclasses.dataclass
class Study:
    """Models, the smallest first, and the prompts that they decode."""

    names: Sequence[str]
    sources: Sequence[ParameterSource]
    vocab_size: int
    prompts: Sequence[Sequence[int]]
    new_tokens: int

    @functools.cached_property
    def plain(self) -> Engine:
        """Plain decoding by the target alone, on one device."""
        settings = EngineSettings(method="pp", stages=1)
        return Engine(self.sources[-1], None, settings, vocab_size=self.vocab_size)

    @functools.cached_property
    def answers(self) -> list[list[int]]:
        """Plain decoding's."""
        return [clock.decode(self.plain, prompt, None, self.new_tokens)[0].tokens for prompt in self.prompts]

    def measure(self, stages: Sequence[int] = (1,), smaller: Sequence[int] = ()) -> Measured:
        """Passes, plain decoding and words; see `hierarchy.measure`.

        Args:
            stages: of the target, whose exchange is timed.
            smaller: the same of all other models.
        """
        counts = [*[smaller] * (len(self.sources) - 1), stages]
        workload = Workload(self.prompts, self.vocab_size, jnp.float32, self.new_tokens)
        return measure(self.sources, workload, devices=jax.devices(), stages=counts)

    def engine(self, choice: Choice, **options: Any) -> HierarchyEngine:
        """The engine of a choice."""
        settings = HierarchySettings(stages=choice.stages, passes=choice.passes, width=choice.width, **options)
        return HierarchyEngine([self.sources[index] for index in choice.models], settings, vocab_size=self.vocab_size)

    def name(self, models: Sequence[int]) -> str:
        """Of some models."""
        return ", ".join(self.names[index] for index in models)


def modeled(study: Study, measured: Measured, models: Sequence[Sequence[int]], stages: Sequence[int]) -> Iterator[str]:
    """The best passes and width of each selection on each number of stages: counted, simulated, and modeled time."""
    yield (
        "| models | stages | devices | passes a tick | width | tokens per tick | simulated | time against plain | "
        "dispatch charged | rollbacks a token | undone a token |"
    )
    yield "|" + " --- |" * 11
    for which in models:
        for count in stages:
            best = choices.best(choices.tried(measured, which, count))
            row = table.count(study.engine(best), study.prompts, study.answers, study.new_tokens)
            # The tick's time is the simulation's; how many there were is counted.
            ratio = measured.plain * row.tokens_per_tick / best.tick_seconds
            charged = measured.plain * row.tokens_per_tick / (best.tick_seconds + measured.dispatch)
            shown, lost = ([f"{total / row.tokens:.2f}" for total in found] for found in (row.rollbacks, row.undone))
            yield (
                f"| {study.name(which)} | {count} | {best.devices} | {', '.join(map(str, best.passes))} | "
                f"{best.width} | {row.tokens_per_tick:.2f} | {best.tokens_per_tick:.2f} | {ratio:.2f}x | "
                f"{charged:.2f}x | {', '.join(shown)} | {', '.join(lost)} |"
            )


def places(measured: Measured, models: Sequence[int], stages: Sequence[int], smaller: Sequence[int]) -> Iterator[str]:
    """The best numbers of some models on every placement: stages of the target, and of at most one smaller model."""
    yield "| stages of each | devices | passes a tick | width | tokens per tick (simulated) | time against plain |"
    yield "|" + " --- |" * 6
    lower = len(models) - 1
    spread = [
        [1] * lower,
        *([count if k == which else 1 for k in range(lower)] for which in range(lower) for count in smaller),
    ]
    for count in stages:
        for place in spread:
            best = choices.best(choices.tried(measured, models, (*place, count)))
            yield (
                f"| {', '.join(map(str, best.stages))} | {best.devices} | {', '.join(map(str, best.passes))} | "
                f"{best.width} | {best.tokens_per_tick:.2f} | {best.speedup:.2f}x |"
            )


def bounds(measured: Measured, stages: Sequence[int], widths: Sequence[int] = (2, 4, 8, 16)) -> Iterator[str]:
    """What no passes can exceed: every verification finds all that any smaller model says, and those take no time.

    Of a target on one stage; on more, what a filled pipe gives if a wrong token alone costs a refill.
    """
    target = len(measured.seconds) - 1
    yield "| stages | width | tokens per tick | time against plain |"
    yield "| --- | --- | --- | --- |"
    for width in widths:
        most = most_tokens_per_pass(measured.words, width)
        yield f"| 1 | {width} | {most:.2f} | {most * measured.plain / measured.costs(target, width)[-1]:.2f}x |"
    right = np.mean(np.any(measured.words[:-1, 1:] == measured.words[-1, 1:], axis=0))
    for count in stages:
        if count > 1:
            ticks = 1 / (right + (1 - right) * count)
            seconds = measured.costs(target, 2, count)[1]
            yield f"| {count} | 1 | {ticks:.2f} | {ticks * measured.plain / seconds:.2f}x |"


def rows_free(
    measured: Measured, study: Study, models: Sequence[Sequence[int]], stages: Sequence[int]
) -> Iterator[str]:
    """What the same words would give were a verification as cheap as a plain step, and the exchange free; simulated.

    The passes of one row keep the ratios that were measured.
    """
    one = (*({1: seconds[1]} for seconds in measured.seconds[:-1]), {1: measured.plain})
    free = dataclasses.replace(measured, seconds=one, exchange=())
    yield "| models | stages | passes a tick | width | tokens per tick | time against plain |"
    yield "|" + " --- |" * 6
    for which in models:
        for count in stages:
            best = choices.best(choices.tried(free, which, count))
            yield (
                f"| {study.name(which)} | {count} | {', '.join(map(str, best.passes))} | {best.width} | "
                f"{best.tokens_per_tick:.2f} | {best.speedup:.2f}x |"
            )


def turns(measured: Measured, study: Study) -> Iterator[str]:
    """Classic draft-then-verify with its best lookahead, by the same measured passes."""
    yield "| models | lookahead | tokens per round (simulated) | time against plain | dispatch charged |"
    yield "| --- | --- | --- | --- | --- |"
    target = len(measured.seconds) - 1
    for draft in range(target):
        best = choices.best(choices.tried_in_turns(measured, (draft, target)))
        charged = best.tokens_per_tick * measured.plain / (best.tick_seconds + 2 * measured.dispatch)
        yield (
            f"| {study.name(best.models)} | {best.passes[0]} | {best.tokens_per_tick:.2f} | {best.speedup:.2f}x | "
            f"{charged:.2f}x |"
        )


def clocks(study: Study, measured: Measured, pairs: Sequence[tuple[int, int]]) -> Iterator[str]:
    """Wall clock of two models on this machine, each way with the numbers that are predicted to be best for it."""
    yield "| models | plain, one device | speculative | lockstep | free-running |"
    yield "| --- | --- | --- | --- | --- |"
    for which in pairs:
        best = choices.best(choices.tried(measured, which, 1, measured.dispatch))
        turned = choices.best(choices.tried_in_turns(measured, which, measured.dispatch))
        lockstep, speculative = study.engine(best), study.engine(turned)
        speculative.settings = dataclasses.replace(speculative.settings, method="speculative", passes=turned.passes)
        found = clock.race(
            {"plain": study.plain, "speculative": speculative, "lockstep": lockstep, "free": lockstep},
            study.prompts,
            study.answers,
            study.new_tokens,
            before=_forms(lockstep),
        )
        cells = [f"{ms:.2f} ({found['plain'] / ms:.2f}x)" for ms in found.values()]
        cells[1] += f" lookahead {turned.passes[0]}"
        cells[2] += f" passes {best.passes[0]}, width {best.width}"
        yield f"| {study.name(which)} | {' | '.join(cells)} |"


def delays(study: Study, engines: Sequence[tuple[str, HierarchyEngine]], seconds: float) -> Iterator[str]:
    """Lockstep and free-running, each model's steps waiting for so long on average: always, or now and then."""
    yield "| models | delayed | lockstep, ms a token | free-running | lockstep / free-running |"
    yield "| --- | --- | --- | --- | --- |"
    for name, engine in engines:
        for late, delay in delay_cases(len(engine.models), seconds).items():
            engine.delay = delay
            found = clock.race(
                {"lockstep": engine, "free": engine},
                study.prompts,
                study.answers,
                study.new_tokens,
                before=_forms(engine),
            )
            ratio = found["lockstep"] / found["free"]
            yield f"| {name} | {late} | {found['lockstep']:.2f} | {found['free']:.2f} | {ratio:.2f} |"


def delay_cases(models: int, seconds: float, seed: int = 0) -> dict[str, Callable[[int], float]]:
    """Delays of a step by the model's index: nobody; each model always; each, and all, at random with that mean."""
    random = np.random.default_rng(seed)
    names = ["the smallest", *["a middle one"] * (models - 2), "the target"]

    def slow(which: int, index: int) -> float:
        return seconds * (index == which)

    def jittery(which: int | None, index: int) -> float:
        return random.exponential(seconds) * (which is None or index == which)

    found: dict[str, Callable[[int], float]] = {"nobody": lambda _: 0.0}
    found |= {f"{name}, always": functools.partial(slow, which) for which, name in enumerate(names)}
    found |= {f"{name}, at random": functools.partial(jittery, which) for which, name in enumerate(names)}
    return found | {"all, at random": functools.partial(jittery, None)}


def depth(study: Study, measured: Measured, models: Sequence[Sequence[int]]) -> Iterator[str]:
    """Efficiency and the cost of rollback cascades, by the number of models.

    Of numbers by which the target verifies something in a tenth of its passes at least: where smaller models are dear,
    they would be fastest if they left it alone.
    """
    yield (
        "| models | passes a tick | width | tokens per target pass | simulated | were nothing lost to refilling | "
        "passes that verify nothing | time against plain | per device | rollbacks a token | undone a token |"
    )
    yield "|" + " --- |" * 11
    for which in models:
        best = choices.best(option for option in choices.tried(measured, which) if option.idle < 0.9)
        row = table.count(study.engine(best), study.prompts, study.answers, study.new_tokens)
        most = most_tokens_per_pass(measured.words[list(which)], best.width)
        ratio = measured.plain * row.tokens_per_tick / best.tick_seconds
        shown, lost = ([f"{total / row.tokens:.2f}" for total in found] for found in (row.rollbacks, row.undone))
        yield (
            f"| {study.name(which)} | {', '.join(map(str, best.passes))} | {best.width} | {row.tokens_per_tick:.2f} | "
            f"{best.tokens_per_tick:.2f} | {most:.2f} | {100 * best.idle:.0f} % | {ratio:.2f}x | "
            f"{ratio / len(which):.2f} | {', '.join(shown)} | {', '.join(lost)} |"
        )


def perturbed(source: ParameterSource, noise: float) -> MemorySource:
    """A copy whose matrices have noise of so many times their own deviation."""
    random = np.random.default_rng(0)
    arrays = {}
    for path, shape in parameter_shapes(source.config).items():
        array = np.asarray(source.read(path), np.float32)
        arrays[path] = array + (noise * array.std() * random.normal(size=shape) if len(shape) > 1 else 0)
    return MemorySource(source.config, nest({path: np.float32(array) for path, array in arrays.items()}))


def _forms(engine: HierarchyEngine) -> dict[str, Callable[[], None]]:
    settings = engine.settings
    return {
        form: functools.partial(setattr, engine, "settings", dataclasses.replace(settings, form=form))
        for form in ("lockstep", "free")
    }
