"""Held-out prompts: the same for a seed, whole lines, from files the models never saw."""

import pytest

from pipedec_jax.analysis.held_out import held_out_prompts, prompts_given
from pipedec_jax.training.corpus import HELD_OUT_PACKAGES, library_root
from tests.listed_library import needs_listed_library

pytestmark = needs_listed_library


def test_a_seed_draws_the_same_prompts_and_another_seed_others():
    prompts = held_out_prompts(5, 3)
    assert prompts == held_out_prompts(5, 3)
    assert prompts != held_out_prompts(5, 4)


def test_prompts_are_whole_lines_of_held_out_files():
    for prompt in held_out_prompts(12, 0, characters=300):
        assert prompt.path.split("/")[0] in HELD_OUT_PACKAGES
        source = (library_root() / prompt.path).read_text(encoding="utf-8")
        assert prompt.text.endswith("\n")
        assert 300 <= len(prompt.text) < 700
        before, found, _ = source.partition(prompt.text)
        assert found
        assert not before or before.endswith("\n")
        assert (before + found).count("\n") + 1 == prompt.line


def test_files_are_used_once_before_any_is_used_again():
    paths = [prompt.path for prompt in held_out_prompts(10, 1)]
    assert len(set(paths)) == len(paths)


def test_prompts_are_given_by_their_number_or_as_a_file_of_them(tmp_path):
    texts, words = prompts_given("3", 1)
    assert texts == [prompt.text for prompt in held_out_prompts(3, 1)]
    assert words == "3 held-out prompts (seed 1)"
    file = tmp_path / "own.txt"
    file.write_text("first\n\n日本語\n", encoding="utf-8")
    texts, before = prompts_given(str(file), 1)
    assert texts == ["first", "日本語"]
    assert before.startswith("2 prompts of own.txt (SHA-256 ")
    file.write_text("first\n\nother\n", encoding="utf-8")
    assert prompts_given(str(file), 1)[1] != before
    for bad in ("0", "-2"):
        with pytest.raises(ValueError, match=f"held-out prompts must be at least 1, not {bad}"):
            prompts_given(bad, 0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        prompts_given(str(tmp_path / "nowhere"), 0)
