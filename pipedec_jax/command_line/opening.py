"""The decoder that the options of a command ask for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pipedec_jax
from pipedec_jax.command_line.options import METHOD_NAMES, check_options, read_calibration
from pipedec_jax.config import LlamaConfig
from pipedec_jax.hierarchy import settings as hierarchy
from pipedec_jax.modeled.cost import head_bytes, layer_bytes
from pipedec_jax.pipeline.settings import EXIT_ONLY, EXIT_TOO, METHODS

if TYPE_CHECKING:
    from pipedec_jax.decoding.hierarchy import AnyDecoder

AS_GIVEN = (
    *("method", "drafter", "width", "children", "draft_steps", "depth", "pool", "sharpness", "noise", "dtype"),
    *("exit_layer", "exit_head", "exit_stages", "draft_length"),
)
"""Options that `Decoder` takes under the same names."""
DEMO = {"pipespec": ("draft", "middle", "target"), "speculative": ("draft", "target")}


def target_and_draft(target: str | None, draft: str | None) -> tuple[pipedec_jax.Model, pipedec_jax.Model]:
    """The models of `--target` and `--draft`, of commands that need both; the demo's draft goes with its target only.

    Raises:
        ValueError: when one is given without the other, or is no model.
        OSError: when a model cannot be read.
    """
    if (target is None) != (draft is None):
        raise ValueError("give --target DIR and --draft DIR, or neither for the demo family")
    if target is None or draft is None:
        return pipedec_jax.load_demo("target"), pipedec_jax.load_demo("draft")
    return pipedec_jax.load(target), pipedec_jax.load(draft)


def open_decoder(options: argparse.Namespace, record: bool = False) -> AnyDecoder:
    """The decoder of the options; it may record what happens in every tick.

    Raises:
        ValueError: when they do not go together.
        OSError: when a model cannot be read.
    """
    if options.dtype == "float64":
        import jax

        jax.config.update("jax_enable_x64", True)
    if options.method not in (*METHODS, *hierarchy.METHODS):
        raise ValueError(f"method must be one of {METHOD_NAMES}, not {options.method!r}")
    if options.method in hierarchy.METHODS and (options.target is not None or options.draft is not None):
        raise ValueError(f"--method {options.method} takes --models, not --target and --draft")
    check_options(options)
    if options.method not in hierarchy.METHODS and isinstance(options.stages, list):
        raise ValueError(
            f"--stages takes one number with --method {options.method}, not {' '.join(map(str, options.stages))}: one "
            f"for each model is for {', '.join(hierarchy.METHODS)}"
        )
    if options.method in hierarchy.METHODS:
        return open_hierarchy(options, record)
    target, draft = open_models(options)
    return pipedec_jax.Decoder(
        target,
        draft,
        stages=4 if options.stages is None else options.stages,
        tensor_parallel=1 if options.tensor_parallel is None else options.tensor_parallel,
        idle_ranks=options.idle_ranks or 0,
        calibration=read_calibration(options.calibration),
        record=record,
        **{name: getattr(options, name) for name in AS_GIVEN},
    )


def open_models(options: argparse.Namespace) -> tuple[pipedec_jax.Model, pipedec_jax.Model | None]:
    """The target, and the draft where one guesses.

    Raises:
        ValueError: when a draft is missing, or given where none guesses.
        OSError: when a model cannot be read.
    """
    draft = None
    if options.target is None:
        target = pipedec_jax.load_demo("target", int8=options.int8)
        draft = pipedec_jax.load_demo("draft")
    else:
        target = pipedec_jax.load(options.target, int8=options.int8)
    if options.draft is not None:
        draft = pipedec_jax.load(options.draft)
    if options.exit_layer is not None or options.method in EXIT_ONLY:
        if options.draft is not None:
            raise ValueError("with an exit the target drafts for itself: leave --draft out")
        return target, None
    if options.drafter == "ngram":
        if options.draft is not None:
            raise ValueError("--drafter ngram takes no --draft")
        return target, None
    if draft is None and options.method != "pp":
        other = ", or --exit-layer E" if options.method in EXIT_TOO else ""
        raise ValueError(f"--method {options.method} needs --draft DIR beside --target DIR, or --drafter ngram{other}")
    return target, draft


def weights_of(config: LlamaConfig) -> float:
    """How many weights a step of a model reads."""
    return config.layers * layer_bytes(config, 1) + head_bytes(config, 1)


def open_hierarchy(options: argparse.Namespace, record: bool = False) -> pipedec_jax.HierarchyDecoder:
    """The same, of a hierarchy of models."""
    for name in ("exit_layer", "exit_head", "exit_stages", "calibration"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is not for --method {options.method}")
    names = options.models or []
    select = names[:1] == ["auto"]
    load, names = pipedec_jax.load, names[select:]
    if not names:
        load, names = pipedec_jax.load_demo, DEMO[options.method]
    stages = stages_of(options.stages, names)
    models = [*(load(name) for name in names[:-1]), load(names[-1], int8=options.int8)]
    for name, model in zip(names, models, strict=True):
        if weights_of(model.config) > weights_of(models[-1].config):
            raise ValueError(
                f"--models takes the smallest first and the target last, but {names[-1]} is smaller than {name}"
            )
    return pipedec_jax.HierarchyDecoder(
        models,
        method=options.method,
        form=options.form,
        stages=stages,
        passes=options.passes,
        width=options.width,
        select=select,
        dtype=options.dtype,
        record=record,
    )


def stages_of(given: int | Sequence[int] | None, names: Sequence[str]) -> list[int] | None:
    """Stages of each model of a hierarchy: as given, or the target's alone, where the others have one.

    Raises:
        ValueError: for several numbers that are not one for each model.
    """
    if given is None:
        return None
    if isinstance(given, int):
        return [1] * (len(names) - 1) + [given]
    if len(given) != len(names):
        raise ValueError(
            f"--stages takes the target's number alone or one for each of the {len(names)} models "
            f"({', '.join(names)}), not {len(given)}: {' '.join(map(str, given))}"
        )
    return list(given)
