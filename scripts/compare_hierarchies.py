"""PipeSpec with the demo family: counts, modeled time and wall clock against plain and speculative decoding.

Modeled time charges every tick the slowest model's passes, as measured in the same run at the width they have; rows of
a verification are thus not free. Ratios are over plain decoding by the target alone on one device.

python scripts/compare_hierarchies.py                    # pass times, every selection of models, clocks of two models
python scripts/compare_hierarchies.py --delays           # lockstep and free-running with a slow or a jittery model
python scripts/compare_hierarchies.py --depth            # two, three and four models (the fourth a perturbed copy)
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any

import numpy as np

import pipedec_jax
from pipedec_jax.analysis.held_out import held_out_prompts

NAMES = ("draft", "middle", "target")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4, help="held-out prompts (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed that draws them (default 0)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens per prompt (default 128)")
    parser.add_argument("--delays", action="store_true", help="with injected delays, in place of all else")
    parser.add_argument("--depth", action="store_true", help="two, three and four models, in place of all else")
    parser.add_argument("--delay-ms", type=float, default=10.0, help="mean injected delay of a step (default 10)")
    args = parser.parse_args()

    pipedec_jax.use_cpu_devices(4)
    import jax
    import jax.numpy as jnp

    from pipedec_jax.analysis import clock
    from pipedec_jax.analysis import hierarchy_table as table
    from pipedec_jax.analysis.hierarchy import most_tokens_per_pass
    from pipedec_jax.hierarchy import choice
    from pipedec_jax.hierarchy.engine import HierarchyEngine
    from pipedec_jax.hierarchy.settings import HierarchySettings
    from pipedec_jax.pipeline.engine import Engine
    from pipedec_jax.pipeline.settings import EngineSettings

    models = [pipedec_jax.load_demo(name) for name in NAMES]
    target = models[-1]
    sources = [model.source for model in models]
    new = args.max_new_tokens
    prompts = [target.tokenizer.encode(prompt.text) for prompt in held_out_prompts(args.prompts, args.seed)]
    plain = Engine(target.source, None, EngineSettings(method="pp", stages=1), vocab_size=target.vocab_size)
    answers = [clock.decode(plain, prompt, None, new)[0].tokens for prompt in prompts]

    def engine(which: tuple[int, ...], passes: tuple[int, ...], width: int | None, **options: Any) -> HierarchyEngine:
        settings = HierarchySettings(stages=(1,) * len(which), passes=passes, width=width, **options)
        return HierarchyEngine([sources[index] for index in which], settings, vocab_size=target.vocab_size)

    if args.delays:
        two = engine((0, 2), (4,), 5)
        print(f"measured, ms per token; {{draft, target}}, delays of {args.delay_ms} ms a step on average")
        print("| delayed | lockstep | free-running | lockstep / free-running |")
        print("| --- | --- | --- | --- |")
        random = np.random.default_rng(0)
        slow = args.delay_ms * 1e-3
        cases = {
            "nobody": lambda _: 0.0,
            "the draft, always": lambda index: slow * (index == 0),
            "the target, always": lambda index: slow * (index == 1),
            "the draft, one step in 5": lambda index: 5 * slow * (index == 0 and random.random() < 0.2),
            "the target, one step in 5": lambda index: 5 * slow * (index == 1 and random.random() < 0.2),
            "both, one step in 5": lambda _: 5 * slow * (random.random() < 0.2),
        }
        settings = two.settings
        forms = {
            form: functools.partial(setattr, two, "settings", dataclasses.replace(settings, form=form))
            for form in ("lockstep", "free")
        }
        for name, delay in cases.items():
            two.delay = delay
            found = clock.race(dict.fromkeys(forms, two), prompts, answers, new, before=forms)
            ratio = found["lockstep"] / found["free"]
            print(f"| {name} | {found['lockstep']:.2f} | {found['free']:.2f} | {ratio:.2f} |", flush=True)
        return

    extra: list[Any] = []
    if args.depth:
        extra = [perturbed(sources[-1], 0.02)]
        sources = [*sources[:2], *extra, sources[-1]]
    names = (*NAMES[:2], "copy", "target") if args.depth else NAMES
    measured = choice.measure(
        sources,
        prompts,
        vocab_size=target.vocab_size,
        devices=jax.devices(),
        dtype=jnp.float32,
        new_tokens=new,
        widths=(1, 2, 4, 8, 16),
    )
    print("measured, ms per pass alone on the machine, by width; and the share of the target's tokens said")
    for name, seconds, index in zip(names, measured.seconds, range(len(names)), strict=True):
        times = ", ".join(f"{width}: {1e3 * second:.2f}" for width, second in sorted(seconds.items()))
        print(f"  {name:<7} {times}   {measured.agreement(index):.3f}")
    one = measured.pass_seconds(len(names) - 1, 1)
    print("bound, whatever the passes: tokens per tick if a verification always found all that any smaller model says")
    for width in (2, 4, 8, 16):
        most = most_tokens_per_pass(measured.words, width)
        print(f"  width {width:>2}: {most:.2f}, time {most * one / measured.pass_seconds(len(names) - 1, width):.2f}")
    print("| models | passes a tick | width | tokens per tick | as chosen | time against plain | rollbacks | undone |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    chosen = {}
    for which in [(1, 3), (0, 1, 3), (0, 1, 2, 3)] if args.depth else choice.selections(len(names)):
        options = choice.tried(measured, which)
        best = max(options, key=lambda option: option.speedup)
        widest = max(options, key=lambda option: (option.tokens_per_tick, -option.width))
        chosen[which] = best
        for option in (best, widest):
            row = table.count(engine(which, option.passes, option.width), prompts, answers, new)
            # Modeled from measured passes: a tick at this width, as many of them as were counted.
            ratio = one * row.tokens_per_tick / option.tick_seconds
            shown = [f"{total / row.tokens:.2f}" for total in row.rollbacks]
            lost = [f"{total / row.tokens:.2f}" for total in row.undone]
            print(
                f"| {', '.join(names[index] for index in which)} | {', '.join(map(str, option.passes))} | "
                f"{option.width} | {row.tokens_per_tick:.2f} | {option.tokens_per_tick:.2f} | {ratio:.2f} | "
                f"{', '.join(shown)} | {', '.join(lost)} |",
                flush=True,
            )
    print("tokens per tick: counted; as chosen: simulated on the same texts' words; time: modeled from measured")
    print("passes; rollbacks and undone tokens: counted, per token, of each model but the target")
    if args.depth:
        return
    print("measured, ms per token of two models on this machine, and plain decoding's time over it")
    print("| models | plain, one device | speculative | lockstep | free-running |")
    print("| --- | --- | --- | --- | --- |")
    for which in ((0, 2), (1, 2)):
        best = chosen[which]
        lockstep = engine(which, best.passes, best.width)
        free = dataclasses.replace(lockstep.settings, form="free")
        back = functools.partial(setattr, lockstep, "settings", lockstep.settings)
        turns = dataclasses.replace(lockstep.settings, method="speculative", passes=(best.width - 1,))
        found = clock.race(
            {"plain": plain, "speculative": lockstep, "lockstep": lockstep, "free": lockstep},
            prompts,
            answers,
            new,
            before={
                "speculative": functools.partial(setattr, lockstep, "settings", turns),
                "lockstep": back,
                "free": functools.partial(setattr, lockstep, "settings", free),
            },
        )
        cells = [f"{ms:.2f} ({found['plain'] / ms:.2f}x)" for ms in found.values()]
        print(f"| {', '.join(names[index] for index in which)} | {' | '.join(cells)} |", flush=True)


def perturbed(source: Any, noise: float) -> Any:
    """A copy whose matrices have noise of so many times their own deviation."""
    from pipedec_jax.model.parameters import MemorySource, nest, parameter_shapes

    random = np.random.default_rng(0)
    arrays = {}
    for path, shape in parameter_shapes(source.config).items():
        array = np.asarray(source.read(path), np.float32)
        arrays[path] = array + (noise * array.std() * random.normal(size=shape) if len(shape) > 1 else 0)
    return MemorySource(source.config, nest({path: np.float32(array) for path, array in arrays.items()}))


if __name__ == "__main__":
    main()
