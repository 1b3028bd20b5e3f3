"""Tiny random models, and the files of a job over many prompts."""

import json

import pytest

import pipedec_jax
from tests.decoding.jobs import PROMPTS


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS), encoding="utf-8")
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "answers.jsonl"


@pytest.fixture(scope="module")
def target(family):
    return pipedec_jax.load(family["target"])


@pytest.fixture(scope="module")
def draft(family):
    return pipedec_jax.load(family["draft"])
