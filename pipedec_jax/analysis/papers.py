"""The papers' model pairs and tables as commands of `scripts/benchmark.py`, with what the papers report beside."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from pipedec_jax.exit_store import stored_exit_heads
from pipedec_jax.loading import load


@dataclasses.dataclass(frozen=True)
class Table:
    """One comparison of a paper."""

    name: str
    source: str
    models: tuple[str, ...]
    """What it needs, the smallest first, the target last."""
    flags: tuple[str, ...]
    """Under which flags their directories are given."""
    devices: int
    """Devices of the paper's own setting."""
    arguments: tuple[str, ...]
    """Of `benchmark.py`, for that setting."""
    demo: tuple[str, ...]
    """The same for the demo family, on fewer devices."""
    reported: str
    """What the paper says: on its own hardware and data, not measured here."""

    def command(self, prompts: Path, out: Path, given: Mapping[str, str], demo: bool) -> list[str]:
        """Arguments of `benchmark.py`; `given` are the models' directories by flag, and `exit-layer` where one drafts.

        Raises:
            ValueError: where a directory is missing, and it is not for the demo family.
        """
        common = ["--prompts", str(prompts), "--out", str(out / self.name)]
        if demo:
            return [*common, *self.demo, "--plain"]  # one device holds the demo's target
        missing = [flag for flag in self.flags if flag not in given]
        if missing:
            need = ", ".join(f"--{flag} ({model})" for flag, model in zip(self.flags, self.models, strict=True))
            raise ValueError(f"table {self.name!r} needs {need}: give {', '.join('--' + flag for flag in missing)}")
        directories = [given[flag] for flag in self.flags]
        if "pipespec" in self.arguments:
            return [*common, *self.arguments, "--target", directories[-1], "--models", *directories]
        named = ["--target", directories[-1]]
        if "exit-target" in self.flags:
            named += [
                "--exit-layer",
                given["exit-layer"] if "exit-layer" in given else str(exit_layer(directories[-1])),
            ]
        if len(directories) > 1:
            named += ["--draft", directories[0]]
        return [*common, *self.arguments, *named]


def exit_layer(target: str) -> int:
    """Of the layers after which a target has trained heads, the nearest to a quarter of all, as in PPSD's table.

    Raises:
        ValueError: where it has none.
    """
    layers, heads = load(target).config.layers, stored_exit_heads(target)
    if not heads:
        raise ValueError(f"{target} has no exit head: train one with scripts/train_exit_head.py")
    return min((head.exit_layer for head in heads), key=lambda layer: abs(layer - layers / 4))


def trees(stages: int, width: int) -> tuple[str, ...]:
    """Pipelines of trees beside plain pipeline parallelism and the static tree."""
    methods = ("pp", "stpp", "pipedec", "best-first")
    return ("--methods", *methods, "--stages", str(stages), "--width", str(width))


TABLES = (
    Table(
        name="pipedec",
        source="PipeDec, arXiv 2504.04104v1",
        models=("LLaMA-3.2-1B", "LLaMA-3.1-70B"),
        flags=("draft", "target"),
        devices=15,
        arguments=trees(14, 32),
        demo=trees(4, 8),
        reported="pipedec 4.46x to 7.79x over pp, 2.2x to 2.69x over stpp, 14 stages, six data sets",
    ),
    Table(
        name="specpipe",
        source="SpecPipe, arXiv 2504.04104v2",
        models=("LLaMA-3.2-1B", "LLaMA-3.1-70B"),
        flags=("draft", "target"),
        devices=9,
        arguments=trees(8, 32),
        demo=trees(2, 8),
        reported="time between tokens 4.19x to 5.53x better than pp, 2.08x to 2.38x than tree speculation, 8 stages",
    ),
    Table(
        name="ppsd",
        source="PPSD, arXiv 2509.19368",
        models=("a LLaMA-2-13B or 70B with exit heads (scripts/train_exit_head.py)",),
        flags=("exit-target",),
        devices=4,
        arguments=("--methods", "pp", "eesd", "ppsd", "--stages", "4"),
        demo=("--methods", "pp", "eesd", "ppsd", "--stages", "4", "--exit-layer", "4"),
        reported="2.01x to 3.81x over plain decoding; eesd is its baseline",
    ),
    Table(
        name="pipespec",
        source="PipeSpec, arXiv 2505.01572",
        models=("LLaMA-3.2-1B", "LLaMA-3.1-8B", "LLaMA-3.1-70B"),
        flags=("draft", "middle", "target"),
        devices=6,
        arguments=("--methods", "pp", "speculative", "pipespec", "--stages", "4"),
        demo=("--methods", "pp", "speculative", "pipespec", "--stages", "2"),
        reported="HumanEval: three models 2.54x, {8B, 70B} 2.27x over plain decoding; draft-then-verify 1.32x",
    ),
)
