"""Fixtures of the conversion tests."""

from pathlib import Path

import pytest

from checkpoints_convert import convert
from tests.checkpoints_convert.sources import tiny_source
from tests.checkpoints_convert.stopping import contents


@pytest.fixture
def source(tmp_path) -> Path:
    """A fresh small Hugging Face directory, alone in `tmp_path`."""
    return tiny_source(tmp_path / "source")


@pytest.fixture
def expected(source, tmp_path_factory):
    """What a conversion of it gives that nothing stops."""
    return contents(convert(source, tmp_path_factory.mktemp("whole") / "converted"))


@pytest.fixture
def others(tmp_path):
    """A function: what lies in `tmp_path` besides the source."""
    return lambda: sorted(path.name for path in tmp_path.iterdir() if path.name != "source")
