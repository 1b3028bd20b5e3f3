"""Every method over the same known answers, simulated: ticks and modeled time, all ranks counted.

The answers are plain decoding's. Methods of the engine are counted by `analysis.simulator`, hierarchies by
`modeled.hierarchy` on what their models say along the answers. Where a method has a choice that the text decides
(depth, draft length, passes), a few are tried and the best one by modeled time is a text's row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pipedec_jax.analysis.benchmark import conversation
from pipedec_jax.analysis.questions import Question
from pipedec_jax.analysis.simulator import Simulator
from pipedec_jax.decoding.decoder import Decoder
from pipedec_jax.decoding.hierarchy import HierarchyDecoder
from pipedec_jax.hierarchy.choice import labels
from pipedec_jax.loading import Model
from pipedec_jax.model.llama import forward
from pipedec_jax.model.parameters import Parameters, read_tree
from pipedec_jax.modeled.hierarchy import most_tokens_per_pass
from pipedec_jax.modeled.hierarchy import simulate as simulate_hierarchy

CAPACITY = 4096
"""Cache slots of everything that is simulated, so that a setting is compiled once."""


@dataclasses.dataclass(frozen=True)
class Known:
    """A prompt and plain decoding's answer to it."""

    corpus: str
    category: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A method as it is tried."""

    method: str
    note: str
    """What the table says of it beside its name; settings that share both compete."""
    stages: int
    """Of the target."""
    tried: str
    """What sets it apart from those it competes with."""
    options: Mapping[str, Any]
    """Arguments of `Decoder`, or of `HierarchyDecoder` but for the models."""
    models: tuple[str, ...] = ()
    """Of a hierarchy, by the names under which they are given."""

    @property
    def name(self) -> str:
        """Apart from all others."""
        return f"{self.method}, {self.note}, {self.stages} stages, {self.tried}"


@dataclasses.dataclass(frozen=True)
class Count:
    """What a setting needs for every known answer, *simulated*."""

    setting: Setting
    ranks: int
    """Ranks of the drafts, beside the target's stages."""
    unit: float
    """PP's modeled time for a token, in the unit of `costs`."""
    ticks: tuple[int, ...]
    costs: tuple[float, ...]
    """What the answers' ticks cost, modeled from bytes of weights read."""
    hits: tuple[int, ...] | None
    """Tokens that were in the pipe when the target chose them; not counted for hierarchies and PP."""


@dataclasses.dataclass(frozen=True)
class TableRow:
    """The best of the settings that compete, over some answers."""

    count: Count
    answers: int
    tokens: int
    ticks_per_token: float
    modeled_speedup_vs_pp: float
    hit_rate: float | None
    """Hits over the tokens that could be hits: all but each answer's last."""


def know(
    plain: Decoder, questions: Iterable[Question], corpus: str, new_tokens: int, chat: bool = False
) -> tuple[list[Known], dict[int | str, str]]:
    """Plain decoding's answers to all turns of some questions, and why others are left out.

    Args:
        plain: PP on one stage.
        questions: to answer.
        corpus: what to call their text.
        new_tokens: of an answer at most.
        chat: use the chat template.
    """
    found, left_out = [], {}
    for question in questions:
        answers: list[str] = []
        for turn in range(1, len(question.turns) + 1):
            prompt = conversation(plain.target, question.turns[:turn], answers, chat)
            try:
                request = plain.request(prompt, max_new_tokens=new_tokens)
            except ValueError as error:
                left_out[question.id] = f"turn {turn}: {error}"
                break
            result = plain.generate(prompt, max_new_tokens=new_tokens)
            answers.append(result.text)
            found.append(Known(corpus, question.category, request.prompt, tuple(result.token_ids)))
    return found, left_out


def settings(stages: int, layers: int, exits: Sequence[int], width: int, children: int) -> Iterator[Setting]:
    """Every method on so many stages, in the order of a table.

    Args:
        stages: of the target.
        layers: of the target.
        exits: layers after which it has exit heads, rising.
        width: most guesses in a batch; of `stpp` in a level.
        children: most guesses after each token.
    """
    shape: dict[str, Any] = {"width": width, "children": children}

    def setting(method: str, note: str, tried: str = "", **options: Any) -> Setting:
        return Setting(method, note, stages, tried, {"method": method, **options})

    yield setting("pp", "")
    drafters = {"model": "draft model", "both": "draft model and look-up"}
    for drafter, note in drafters.items():
        for depth in (8, 12, 16):
            yield setting("stpp", note, f"depth {depth}", drafter=drafter, depth=depth, **shape)
    for drafter, note in drafters.items():
        yield setting("pipedec", note, drafter=drafter, **shape)
    for drafter, note in drafters.items():
        for steps in (1, 2, 4, 8):
            yield setting("best-first", note, f"draft steps {steps}", drafter=drafter, draft_steps=steps, **shape)
    yield setting("best-first", "look-up alone", drafter="ngram", **shape)
    # The last head that is not behind the first stage of an even split; the exit is where that stage ends.
    even = -(-layers // stages)
    at = max([layer for layer in exits if layer <= even], default=exits[0]) if exits else None
    if at is not None:
        yield setting("ppsd", "chain", f"exit {at}", exit_layer=at)
        yield setting("ppsd", "tree", f"exit {at}", exit_layer=at, **shape)
        yield setting("best-first", "exit head and look-up", f"exit {at}", exit_layer=at, **shape)
        for length in (1, 2, 4):
            tried = f"exit {at}, {length} drafts"
            yield setting("eesd", "chain", tried, exit_layer=at, draft_length=length)


def hierarchies(stages: int, models: Sequence[str]) -> Iterator[Setting]:
    """Hierarchies of the smallest model and the target, and of all of them, with numbers of passes to try."""
    pair = (models[0], models[-1])

    def setting(method: str, used: Sequence[str], passes: Sequence[int]) -> Setting:
        options = {"method": method, "stages": (*(1 for _ in used[1:]), stages), "passes": tuple(passes)}
        note = " and ".join((", ".join(used[:-1]), used[-1]))
        return Setting(method, note, stages, f"passes {' '.join(map(str, passes))}", options, tuple(used))

    for lookahead in (1, 2, 3, 4, 6, 8):
        yield setting("speculative", pair, (lookahead,))
    for passes in (1, 2, 3, 4, 6, 8):
        yield setting("pipespec", pair, (passes,))
    if len(models) > 2:
        for first in (1, 2, 3, 4, 6, 8):
            for middle in (1, 2):
                yield setting("pipespec", models, (first, *(middle for _ in models[2:])))


def count(make: Callable[..., Decoder], setting: Setting, known: Sequence[Known]) -> Count:
    """Simulate a method of the engine over the answers.

    Args:
        make: makes a decoder from the setting's arguments.
        setting: none of `hierarchies`.
        known: from `know`.
    """
    decoder = make(**setting.options, stages=setting.stages, capacity=CAPACITY)
    if setting.method == "pp":
        ticks = tuple(setting.stages * len(one.answer) for one in known)
        return Count(setting, 0, 1.0, ticks, tuple(float(len(one.answer)) for one in known), None)
    simulator = Simulator.of(decoder)
    found = [simulator.run(one.prompt, one.answer) for one in known]
    return Count(
        setting,
        ranks=len(decoder.devices) - setting.stages,
        unit=decoder.modeled_speedup_vs_pp(1.0),
        ticks=tuple(progress.ticks[-1] for progress in found),
        costs=tuple(progress.costs[-1] for progress in found),
        hits=tuple(sum(progress.hits[:-1]) for progress in found),
    )


def say(model: Model, known: Sequence[Known]) -> list[np.ndarray]:
    """What a model would say, greedily, at each token of the answers `[n]`, given all before it."""
    weights = read_tree(model.source, jnp.float32)

    @jax.jit
    def best(weights: Parameters, token_T: jax.Array) -> jax.Array:
        logits = forward(model.config, weights, token_T[None])[0, :, : model.vocab_size]
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    found = []
    for one in known:
        text = [*one.prompt, *one.answer]
        size = 1 << (len(text) - 1).bit_length()
        said = np.asarray(best(weights, np.pad(np.asarray(text, np.int32), (0, size - len(text)))))
        found.append(said[len(one.prompt) - 1 : len(text) - 1])
    return found


def count_hierarchy(
    models: Mapping[str, Model], setting: Setting, known: Sequence[Known], words: Mapping[str, Sequence[np.ndarray]]
) -> Count:
    """Simulate a hierarchy over the answers.

    Args:
        models: by name.
        setting: one of `hierarchies`.
        known: from `know`.
        words: what each model but the target says along the answers, from `say`, by name.
    """
    decoder = HierarchyDecoder([models[name] for name in setting.models], **setting.options)
    width = decoder.settings.widths[-1]
    ticks = []
    for index, one in enumerate(known):
        # What comes before the answer is given: all models read it.
        said = np.stack([*(words[name][index] for name in setting.models[:-1]), np.asarray(one.answer)])
        said = np.pad(said, ((0, 0), (1, 0)))
        if setting.method == "speculative":
            passes = round(len(one.answer) / most_tokens_per_pass(said, width))
            ticks.append(setting.stages * passes)
        else:
            run = simulate_hierarchy(labels(said)[:, None], decoder.settings.passes, width=width, stages=setting.stages)
            ticks.append(int(run.ticks[0]))
    return Count(
        setting,
        ranks=sum(decoder.settings.stages[:-1]),
        unit=decoder.modeled_speedup_vs_pp(1.0),
        ticks=tuple(ticks),
        costs=tuple(decoder.settings.tick_cost * count for count in ticks),
        hits=None,
    )


def rows(counts: Iterable[Count], known: Sequence[Known], which: Callable[[Known], bool]) -> list[TableRow]:
    """The table's rows over the answers that `which` picks: of settings that compete, the best by modeled time."""
    chosen = [index for index, one in enumerate(known) if which(one)]
    lengths = [len(known[index].answer) for index in chosen]
    best: dict[tuple[str, str, int], TableRow] = {}
    for one in counts:
        tokens = sum(lengths)
        hits = None if one.hits is None else sum(one.hits[index] for index in chosen)
        row = TableRow(
            one,
            answers=len(chosen),
            tokens=tokens,
            ticks_per_token=sum(one.ticks[index] for index in chosen) / tokens,
            modeled_speedup_vs_pp=one.unit * tokens / sum(one.costs[index] for index in chosen),
            hit_rate=None if hits is None else hits / max(1, tokens - len(chosen)),
        )
        key = (one.setting.method, one.setting.note, one.setting.stages)
        if key not in best or row.modeled_speedup_vs_pp > best[key].modeled_speedup_vs_pp:
            best[key] = row
    return list(best.values())


def same_family(models: Mapping[str, Model]) -> Callable[..., Decoder]:
    """Makes decoders of the target with the smallest model as the draft; exits take none."""
    names = list(models)

    def make(**options: Any) -> Decoder:
        alone = options["method"] == "pp" or options.get("drafter") == "ngram" or "exit_layer" in options
        return Decoder(models[names[-1]], None if alone else models[names[0]], **options)

    return make


def ranks_needed(stages: Iterable[int], models: int) -> int:
    """Most devices that any setting asks for."""
    return max(stages) + max(1, models - 1)
