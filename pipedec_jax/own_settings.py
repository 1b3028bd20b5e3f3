"""What a caller tells JAX about code of its own, kept away from the decoders'."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.core import Tracer


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Within a caller's settings of JAX, those that decoding takes; of this thread, as theirs.

    - A transfer guard: prompts go to the devices and tokens come back, which is meant.
    - `jax.disable_jit`: stages exist in compiled programs only.
    - `jax.debug_infs`: scores of masked slots are minus infinity. What is not finite and should be is looked for in any
      case (`pipedec_jax.soundness`).
    """
    with jax.transfer_guard("allow"), jax.disable_jit(False), jax.debug_infs(False):
        yield


def check_untraced() -> None:
    """Raise `RuntimeError` within a function that JAX compiles: a decoder has programs of its own, and reads tokens."""
    with own_settings():
        traced = isinstance(jnp.zeros(()), Tracer)
    if traced:
        raise RuntimeError(
            "a decoder cannot be used within a function that jax.jit (or a loop or shard_map of JAX) compiles: its "
            "tokens would not be known there; call it outside"
        )
