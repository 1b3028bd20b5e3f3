"""The script as a module, and the tiny models as its options."""

import importlib.util

import pytest

from pipedec_jax.decoding import decoder
from tests.command_line.commands import SCRIPT


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("generate_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def models(family):
    return ["--target", str(family["target"]), "--draft", str(family["draft"])]


@pytest.fixture
def no_engine(monkeypatch):
    """Fail if weights are read."""

    def read(*_, **__):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(decoder, "Engine", read)
