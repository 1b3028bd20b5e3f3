"""Tests that read the files of the demo family's lists, which are those of one Python's standard library."""

import functools

import pytest

from pipedec_jax.analysis.held_out import held_out_prompts


@functools.cache
def library_is_listed() -> bool:
    """Whether this Python's standard library is the one that the held-out files are listed of."""
    try:
        held_out_prompts(1, 0)
    except (ValueError, FileNotFoundError):
        return False
    return True


needs_listed_library = pytest.mark.skipif(
    not library_is_listed(), reason="the held-out files are listed of another Python's standard library"
)
