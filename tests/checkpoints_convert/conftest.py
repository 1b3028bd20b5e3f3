"""Fixtures of the conversion tests."""

from pathlib import Path

import pytest

from tests.checkpoints_convert.sources import tiny_source


@pytest.fixture
def source(tmp_path) -> Path:
    """A fresh small Hugging Face directory, alone in `tmp_path`."""
    return tiny_source(tmp_path / "source")


@pytest.fixture
def others(tmp_path):
    """A function: what lies in `tmp_path` besides the source."""
    return lambda: sorted(path.name for path in tmp_path.iterdir() if path.name != "source")
