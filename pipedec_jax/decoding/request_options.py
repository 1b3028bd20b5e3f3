"""What a request says beside its prompt: checked without a model, so that it can be before one is read."""

from __future__ import annotations

from collections.abc import Collection

from pipedec_jax.pipeline.settings import check_count
from pipedec_jax.sampling import Sampling


def check_request_options(
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Collection[str] = (),
) -> tuple[Sampling, tuple[str, ...]]:
    """How tokens are drawn, and the stop strings, from what `Decoder.request` takes.

    Raises:
        ValueError: for a value out of its range.
    """
    check_count("max_new_tokens", max_new_tokens)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    # What can be gone through once would stop the first of several answers alone.
    stops = (stop,) if isinstance(stop, str) or not isinstance(stop, Collection) else tuple(stop)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise ValueError(f"a stop string must be text and not empty, not {text!r}")
    return sampling, stops
