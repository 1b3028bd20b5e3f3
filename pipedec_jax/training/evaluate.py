"""How good the demo family is: held-out loss, and how often the smaller models guess the target's next token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.parameters import Parameters, parameter_count, parameter_shapes
from pipedec_jax.training.forward import forward
from pipedec_jax.training.generate import generate, score
from pipedec_jax.training.tokenizer import BEGIN, END, token_id
from pipedec_jax.training.trainer import loss_of

TOPS = (1, 2, 4, 8)
"""Sizes of the draft's shortlist for which agreement is reported."""

Model = tuple[LlamaConfig, Parameters]


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on the held-out files."""

    seed: int = 0
    windows: int = 96
    """Windows of held-out text for the loss; 0 takes all text."""
    window: int = 512
    """Tokens of a window; each starts with the begin token."""
    prompts: int = 64
    prompt: int = 128
    """Tokens of a prompt, the begin token included."""
    new: int = 128
    """Tokens that the target writes after each prompt."""
    samples: int = 3
    """Texts shown in the report."""
    batch: int = 16


def step_weights(config: LlamaConfig) -> int:
    """Weights that one decoding step reads: layers, final norm and head; of the embedding only a row is read."""
    embedding = math.prod(parameter_shapes(config)["embedding"])
    return parameter_count(config) - (0 if config.tied_embeddings else embedding)


def held_out_windows(documents: Sequence[np.ndarray], begin: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets `[windows, length]` that cut every document from its start; a short last piece is dropped."""
    pieces = []
    for document in documents:
        text = document[1:]  # Every window gets a begin token of its own.
        pieces.extend(text[start : start + length] for start in range(0, len(text) - length + 1, length))
    target = np.stack(pieces)
    return np.concatenate((np.full((len(target), 1), begin, np.int32), target[:, :-1]), axis=1), target


def held_out_loss(model: Model, token: np.ndarray, target: np.ndarray, batch: int = 16) -> float:
    """Mean cross entropy in nats per token; windows that do not fill a batch are left out."""
    config, params = model

    @jax.jit
    def loss(params: Parameters, token: jax.Array, target: jax.Array) -> jax.Array:
        return loss_of(forward(config, params, token), {"target": target})

    starts = range(0, len(token) - batch + 1, batch)
    return float(np.mean([loss(params, token[at : at + batch], target[at : at + batch]) for at in starts]))


def greedy_texts(target: Model, prompts: np.ndarray, new: int, batch: int = 16) -> np.ndarray:
    """`[prompts, P + new]`: every prompt and the target's greedy continuation."""
    config, params = target
    cold = jnp.zeros(batch, jnp.float32)
    key = jax.random.key(0)
    texts = [
        generate(config, params, prompts[at : at + batch], new, cold, 1, key)[0]
        for at in range(0, len(prompts) - batch + 1, batch)
    ]
    return np.concatenate([np.asarray(text) for text in texts])


def agreement(student: Model, text: np.ndarray, prompt: int, end: int, batch: int = 16) -> dict[str, float]:
    """Share of the generated positions whose token is among the student's best 1, 2, 4 and 8.

    Positions after the first end token are not counted: decoding would have stopped there.
    """
    config, params = student
    found = [
        np.asarray(score(config, params, text[at : at + batch], max(TOPS))[0]).astype(np.int32)
        for at in range(0, len(text) - batch + 1, batch)
    ]
    return count_agreement(np.concatenate(found), text, prompt, [end])


def count_agreement(choice: np.ndarray, text: np.ndarray, prompt: int, ends: Sequence[int]) -> dict[str, float]:
    """As `agreement`, from the student's best tokens.

    Args:
        choice: `[texts, T, max(TOPS)]` best next tokens after every position, the best first.
        text: `[texts or more, T]` prompts with the target's continuations.
        prompt: Tokens of a prompt.
        ends: Tokens that end a text.
    """
    written = text[: len(choice), prompt:]
    end = np.isin(written, ends)
    ended = np.cumsum(end, axis=1) - end > 0
    hit = choice[:, prompt - 1 : -1] == written[..., None]
    return {str(top): round(float(hit[..., :top].any(-1)[~ended].mean()), 4) for top in TOPS}


def evaluate(
    models: Mapping[str, Model],
    documents: Sequence[np.ndarray],
    sizes: Sequence[int],
    tokenizer: Tokenizer,
    settings: EvaluationConfig,
) -> dict[str, Any]:
    """The report: for every model its size and held-out loss, for the smaller ones agreement with the target.

    Args:
        models: `target` and any smaller ones.
        documents: Held-out files as token ids, begin and end tokens included.
        sizes: Their sizes in bytes, for the loss per byte.
        tokenizer: Of all models.
        settings: What to measure.
    """
    begin, end = token_id(tokenizer, BEGIN), token_id(tokenizer, END)
    random = np.random.default_rng(settings.seed)
    token, target = held_out_windows(documents, begin, settings.window)
    chosen = random.permutation(len(token))[: settings.windows or None]
    token, target = token[chosen], target[chosen]
    bytes_per_token = sum(sizes) / sum(len(document) - 1 for document in documents)
    prompts = draw_prompts(documents, begin, settings)
    texts = greedy_texts(models["target"], prompts, settings.new, settings.batch)
    report: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "held_out": {
            "files": len(documents),
            "bytes": int(sum(sizes)),
            "bytes_per_token": round(bytes_per_token, 3),
            "tokens_measured": len(target) // settings.batch * settings.batch * settings.window,
        },
        "models": {},
    }
    for name, model in models.items():
        loss = held_out_loss(model, token, target, settings.batch)
        row: dict[str, Any] = {
            "parameters": parameter_count(model[0]),
            "step_weights": step_weights(model[0]),
            "loss_per_token": round(loss, 4),
            "loss_per_byte": round(loss / bytes_per_token, 4),
        }
        if name != "target":
            row["agreement"] = agreement(model, texts, settings.prompt, end, settings.batch)
        report["models"][name] = row
    report["samples"] = [
        {
            "prompt": tokenizer.decode(list(text[1 : settings.prompt])),
            "text": tokenizer.decode(list(text[settings.prompt :])),
        }
        for text in texts[: settings.samples]
    ]
    return report


def draw_prompts(documents: Sequence[np.ndarray], begin: int | None, settings: EvaluationConfig) -> np.ndarray:
    """Prompts `[prompts, prompt]` from held-out files, drawn by the seed, long files more often.

    Each begins with the token `begin`, as the documents do; where that is `None`, with any token of the text.
    """
    lead = [] if begin is None else [begin]
    count = settings.prompt - len(lead)
    random = np.random.default_rng([settings.seed, 1])
    long = [document for document in documents if len(document) > settings.prompt + 1]
    weight = np.asarray([len(document) for document in long], float)
    prompts = []
    for number in random.choice(len(long), settings.prompts, p=weight / weight.sum()):
        document = long[number]
        start = int(random.integers(len(lead), len(document) - settings.prompt + 1))
        prompts.append(np.concatenate((lead, document[start : start + count])))
    return np.stack(prompts).astype(np.int32)


def table(report: Mapping[str, Any]) -> str:
    """The report's figures as lines of text."""
    lines = [
        "measured on held-out text, but for the weights, which are counted",
        f"{'model':8} {'parameters':>11} {'per step':>10} {'nats/token':>10} {'nats/byte':>10}   top 1, 2, 4, 8 (%)",
    ]
    for name, row in report["models"].items():
        tops = "  ".join(f"{100 * share:5.1f}" for share in row.get("agreement", {}).values())
        lines.append(
            f"{name:8} {row['parameters']:11,} {row['step_weights']:10,} {row['loss_per_token']:10.3f} "
            f"{row['loss_per_byte']:10.3f}   {tops}"
        )
    if "exits" in report:
        lines += ["", agreement_table(report["exits"])]
    return "\n".join(lines)


def agreement_table(agreement: Mapping[str, Mapping[str, float]]) -> str:
    """The agreement of exit heads with the target, by name, as lines of text."""
    lines = [f"{'exit head':24}   top 1, 2, 4, 8 (%, measured)"]
    lines += [
        f"{name:24} " + "".join(f"{100 * share:7.1f}" for share in row.values()) for name, row in agreement.items()
    ]
    return "\n".join(lines)
