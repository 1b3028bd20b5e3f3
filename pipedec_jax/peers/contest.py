"""Peers decode the same prompts in turn; their tokens are compared, their times put in ratios of one run."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence

from pipedec_jax.clock import first_difference
from pipedec_jax.peers.answer import Answer, Peer


@dataclasses.dataclass(frozen=True)
class Standing:
    """How one peer did, *measured*: medians over all answers."""

    name: str
    same: int
    """Answers that equal the reference's, token by token."""
    answers: int
    first_differs: str
    """Where the first answer that differs does, empty where none does."""
    first_ms: float
    """To the first token, the prompt included."""
    per_token_ms: float
    """Of the tokens after the first."""
    whole_ms: float
    """Of an answer, over its tokens, the prompt included."""
    against: dict[str, tuple[float, float, float]]
    """By the name of each baseline: its time per token after the first over this one's on the same prompt in the same
    round, median and quartiles."""


def contest(
    peers: Mapping[str, Peer],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    rounds: int = 1,
    after: Callable[[], object] = lambda: None,
) -> dict[str, list[Answer]]:
    """Every peer's answers to every prompt, round after round; on each prompt all take turns (A B C A B C).

    Each first answers the first prompt unseen, which compiles and warms up.

    Args:
        peers: by name.
        prompts: token ids.
        new_tokens: of each answer, at least 2.
        rounds: over all prompts.
        after: called after each answer.

    Raises:
        ValueError: when there is nothing to compare.
    """
    if new_tokens < 2 or rounds < 1 or not prompts:
        raise ValueError(
            f"times per token take a prompt, 2 tokens and a round at least, not {len(prompts)}, {new_tokens}, {rounds}"
        )
    for peer in peers.values():
        peer.answer(prompts[0], new_tokens)
        after()
    found: dict[str, list[Answer]] = {name: [] for name in peers}
    for _ in range(rounds):
        for prompt in prompts:
            for name, peer in peers.items():
                found[name].append(peer.answer(prompt, new_tokens))
                after()
    return found


def standings(answers: Mapping[str, Sequence[Answer]], reference: str, baselines: Sequence[str]) -> list[Standing]:
    """Each peer's figures.

    Args:
        answers: from `contest`.
        reference: whose tokens the others' are compared with.
        baselines: whose times are put over the others'.
    """
    out = []
    for name, own in answers.items():
        wrong = [
            (number, place)
            for number, (one, other) in enumerate(zip(own, answers[reference], strict=True))
            if (place := first_difference(one.tokens, other.tokens)) is not None
        ]
        against = {}
        for baseline in baselines:
            ratios = [per_token(theirs) / per_token(mine) for theirs, mine in zip(answers[baseline], own, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            against[baseline] = (middle, low, high)
        out.append(
            Standing(
                name,
                same=len(own) - len(wrong),
                answers=len(own),
                first_differs=f"answer {wrong[0][0] + 1}, token {wrong[0][1] + 1}" if wrong else "",
                first_ms=1e3 * statistics.median(one.first_s for one in own),
                per_token_ms=1e3 * statistics.median(map(per_token, own)),
                whole_ms=1e3 * statistics.median(one.seconds / len(one.tokens) for one in own),
                against=against,
            )
        )
    return out


def per_token(answer: Answer) -> float:
    """Seconds per token after the first."""
    return (answer.seconds - answer.first_s) / (len(answer.tokens) - 1)
