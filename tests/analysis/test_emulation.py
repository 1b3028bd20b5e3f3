"""Waits change no row, and a pipe of them decodes what plain decoding does; no time is asserted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipedec_jax.analysis.emulation import emulate, wait


def test_a_wait_gives_its_rows_back():
    x = jax.random.normal(jax.random.key(0), (2, 3), jnp.float32)
    assert np.array_equal(jax.jit(wait(0.0))(x), x)


@pytest.mark.slow
def test_a_filled_pipe_of_waits_gives_plain_decodings_tokens():
    row = emulate(2, 2, 0.0, ticks=4, repeats=1)  # raises where they differ
    assert (row.stages, row.width, row.share) == (2, 2, 0)
    assert row.exchange_ms > 0
