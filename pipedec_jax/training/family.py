"""The demo family from start to end: text, tokenizer, target, teacher's records, middle, draft, export.

Every stage leaves files in the run's folder and is skipped when they are complete, and the models' training goes on
from its last checkpoint: a killed run is resumed by starting it again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from pipedec_jax.config import LlamaConfig, check_keys, read_values
from pipedec_jax.exit_store import stored_exit_heads
from pipedec_jax.loading import load
from pipedec_jax.model.exit_head import ExitHeadConfig
from pipedec_jax.model.parameters import Parameters, initialize
from pipedec_jax.training import corpus
from pipedec_jax.training.batches import TextWindows
from pipedec_jax.training.evaluate import EvaluationConfig, evaluate
from pipedec_jax.training.exit_run import measure_stored
from pipedec_jax.training.export import export, load_exported
from pipedec_jax.training.teacher import Portion, TeacherWindows, write_records
from pipedec_jax.training.tokenizer import (
    BEGIN,
    encode_files,
    load_tokenizer,
    save_tokenizer,
    token_id,
    train_tokenizer,
)
from pipedec_jax.training.trainer import TrainingConfig, train
from pipedec_jax.whole_files import write_whole

STAGES = ("text", "target", "records", "middle", "draft", "export", "evaluate")
"""In the order they run."""

STUDENTS = ("middle", "draft")
Log = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class ModelPlan:
    """Geometry and training of one model: the content of a file under `configs/`."""

    model: LlamaConfig
    training: TrainingConfig

    @classmethod
    def read(cls, path: Path) -> ModelPlan:
        """Read a plan.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is not JSON, or for an unknown or missing key.
        """
        values = read_values(path)
        check_keys(values, cls, str(path))
        return cls(LlamaConfig.from_dict(values["model"]), TrainingConfig.from_dict(values["training"]))

    def scaled(self, steps: int) -> ModelPlan:
        """The same plan in about `steps` steps."""
        return dataclasses.replace(self, training=self.training.scaled(steps))


def read_portions(path: Path) -> list[Portion]:
    """Read what the teacher records from a file under `configs/`.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not JSON, or for unknown and missing keys and bad values.
    """
    found = read_values(path)
    if not isinstance(found, list) or not found or not all(isinstance(values, dict) for values in found):
        raise ValueError(f"{path} must hold a list of portions, as configs/demo_records.json does")
    return [Portion.from_dict(values) for values in found]


class Family:
    """A run in one folder.

    Args:
        directory: The run's folder: checkpoints, records and the finished family under `family/`.
        plans: `target`, `middle` and `draft`.
        portions: What the teacher records.
        root: The standard library; the running interpreter's when not given.
        log: Called with the figures of the training.

    Raises:
        ValueError: when the plans do not go together, or the folder holds a run with others.
    """

    def __init__(
        self,
        directory: Path,
        plans: dict[str, ModelPlan],
        portions: list[Portion],
        root: Path | None = None,
        log: Log | None = None,
    ) -> None:
        self.directory = directory
        self.plans = plans
        self.portions = portions
        self.root = root or corpus.library_root()
        self.log = log
        self.family = directory / "family"
        self._check_plans()
        self._check_directory()

    def text(self) -> None:
        """Choose the files, write the lists and the overlap report, and learn the tokenizer."""
        if (self.family / "target" / "tokenizer.json").exists():
            return
        training, _ = corpus.prepare(self.root, self.family)
        texts = [corpus.read_text(self.root, file) for file in training]
        config = self.plans["target"].model
        save_tokenizer(train_tokenizer(texts, config.vocab_size), self.family / "target", config.context)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The family's tokenizer."""
        return load_tokenizer(self.family / "target")

    def documents(self, held_out: bool = False) -> tuple[list[np.ndarray], list[int]]:
        """Token ids of every training (or held-out) file, and the files' sizes in bytes."""
        files = corpus.read_list(self.family / ("heldout_files.txt" if held_out else "train_files.txt"))
        texts = [corpus.read_text(self.root, file) for file in files]
        return encode_files(self.tokenizer, texts), [len(text.encode()) for text in texts]

    @functools.cached_property
    def windows(self) -> TextWindows:
        """Windows of training text."""
        return TextWindows(self.documents()[0], token_id(self.tokenizer, BEGIN))

    @functools.cached_property
    def target(self) -> Parameters:
        """The target's trained parameters; trains what is not trained yet."""
        plan = self.plans["target"]
        key = jax.random.key(plan.training.seed)
        first = dataclasses.replace(plan.model, layers=plan.training.phases[0].layers)
        return self._train("target", initialize(first, key), self.windows)

    def records(self) -> None:
        """Let the target read and write what the smaller models learn from."""
        folder = self.directory / "records"
        if len(list(folder.glob("*.npz"))) < len(self.portions):
            write_records(self.plans["target"].model, self.target, self.windows, self.portions, folder)

    def student(self, name: str) -> Parameters:
        """The trained middle or draft model; trains what is not trained yet."""
        plan = self.plans[name]
        model = plan.model
        if dataclasses.replace(model, layers=1) == dataclasses.replace(self.plans["target"].model, layers=1):
            initial = thin(self.target, plan.training.phases[0].layers)
        else:
            first = dataclasses.replace(model, layers=plan.training.phases[0].layers)
            initial = initialize(first, jax.random.key(plan.training.seed))
        return self._train(name, initial, TeacherWindows(self.directory / "records", plan.training.seed))

    def export(self) -> None:
        """Write the three models as Hugging Face directories."""
        export(self.plans["target"].model, self.target, self.tokenizer, self.family / "target")
        for name in STUDENTS:
            export(self.plans[name].model, self.student(name), self.tokenizer, self.family / name)

    def evaluate(self, settings: EvaluationConfig) -> dict[str, Any]:
        """Measure the exported family on the held-out files and write `evaluation.json`."""
        report = evaluate_directory(self.family, settings, self.root)
        write_whole(self.family / "evaluation.json", json.dumps(report, indent=1) + "\n")
        return report

    def run(self, stage: str) -> None:
        """Run one of `STAGES` (but `evaluate`, which needs its settings)."""
        if not self._identity_file.is_file():
            write_whole(self._identity_file, json.dumps(self._identity, indent=1) + "\n")
        match stage:
            case "text":
                self.text()
            case "target":
                _ = self.target
            case "records":
                self.records()
            case "middle" | "draft":
                self.student(stage)
            case "export":
                self.export()
            case _:
                raise ValueError(f"unknown stage {stage!r}; choose one of {', '.join(STAGES[:-1])}")

    @property
    def _identity_file(self) -> Path:
        return self.directory / "run.json"

    @property
    def _identity(self) -> dict[str, Any]:
        """What a run must keep when it goes on, as JSON gives it back."""
        plans = {f"plan of the {name}": dataclasses.asdict(plan) for name, plan in self.plans.items()}
        records = [dataclasses.asdict(portion) for portion in self.portions]
        return json.loads(json.dumps(plans | {"list of records": records}))

    def _check_plans(self) -> None:
        """Raise `ValueError` where a student could not learn from what the target records."""
        target = self.plans["target"].model
        rows: dict[int, int] = {}
        for portion in self.portions:
            rows[portion.length] = rows.get(portion.length, 0) + portion.sequences
        longest = max(rows, default=0)
        if longest > target.context:
            raise ValueError(f"records of {longest} tokens exceed the target's context of {target.context}")
        for name in STUDENTS:
            plan = self.plans[name]
            if plan.model.vocab_size != target.vocab_size:
                raise ValueError(
                    f"all models have one tokenizer: vocab_size of the {name} must be the target's "
                    f"{target.vocab_size}, not {plan.model.vocab_size}"
                )
            for phase in plan.training.phases:
                if rows.get(phase.length, 0) < phase.batch:
                    raise ValueError(
                        f"a step of the {name} takes {phase.batch} sequences of length {phase.length}, but of these "
                        f"the target records {rows.get(phase.length, 0)}; it records lengths {sorted(rows)}"
                    )

    def _check_directory(self) -> None:
        """Raise `ValueError` when the folder holds another run."""
        if not self._identity_file.is_file():
            return
        found = read_values(self._identity_file)
        here = self._identity
        differing = [key for key in here if not isinstance(found, dict) or found.get(key) != here[key]]
        if differing:
            raise ValueError(
                f"{self.directory} holds a run with another {' and '.join(differing)}; name another folder (--run)"
            )

    def _train(self, name: str, initial: Parameters, batches: Any) -> Parameters:
        plan = self.plans[name]
        return train(name, plan.model, plan.training, initial, batches, self.directory / name, log=self.log)


def thin(params: Parameters, layers: int) -> Parameters:
    """A shallower copy of a model: `layers` of its layers, evenly spread from the first to the last."""
    picked = np.linspace(0, len(params["layers"]) - 1, layers).round().astype(int)
    return params | {"layers": {str(index): params["layers"][str(layer)] for index, layer in enumerate(picked)}}


def evaluate_directory(directory: Path, settings: EvaluationConfig, root: Path | None = None) -> dict[str, Any]:
    """Evaluate an exported family (`target/`, `middle/`, `draft/`, `heldout_files.txt`) on its held-out files.

    Exit heads stored beside the target are measured too, and the untrained ones at their exits.
    """
    root = root or corpus.library_root()
    tokenizer = load_tokenizer(directory / "target")
    texts = [corpus.read_text(root, file) for file in corpus.read_list(directory / "heldout_files.txt")]
    models = {name: load_exported(directory / name) for name in ("target", *STUDENTS) if (directory / name).exists()}
    sizes = [len(text.encode()) for text in texts]
    report = evaluate(models, encode_files(tokenizer, texts), sizes, tokenizer, settings)
    if heads := stored_exit_heads(directory / "target"):
        exits = sorted({head.exit_layer for head in heads})
        untrained = [ExitHeadConfig(number, "target") for number in exits]
        target = load(directory / "target")
        held_out = [f"@{directory / 'heldout_files.txt'}"]
        report["exits"] = measure_stored(target, [*heads, *untrained], held_out, settings, root)
    return report
