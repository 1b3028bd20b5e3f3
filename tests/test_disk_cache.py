"""Where things are kept between processes: beside the conversions, only when asked to, and not when switched off."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pipedec_jax import disk_cache

PROGRAM = """
import jax, sys
import pipedec_jax, pipedec_jax.decoding.batch, pipedec_jax.decoding.decoder, pipedec_jax.decoding.hierarchy
from pipedec_jax.disk_cache import use_compilation_cache
jax.config.update("jax_platforms", "cpu")
jax.jit(lambda x: x + 1)(1)
assert jax.config.jax_compilation_cache_dir is None, "the library sets nothing by itself"
print(use_compilation_cache())
jax.jit(lambda x: x + 2)(1)
"""


def variables(**changes):
    return {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "PIPEDEC_"))} | changes


def test_compiled_programs_are_kept_beside_conversions_when_a_program_asks_for_it(tmp_path):
    changes = {"PIPEDEC_JAX_CACHE": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=variables(**changes), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'compiled'}\n"
    assert list((tmp_path / "compiled").iterdir())


@pytest.fixture
def updates(monkeypatch):
    """What is changed in JAX's configuration, without changing it; nothing is set before."""
    found = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    for name in ("PIPEDEC_JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name, raising=False)
    return found


def test_it_is_reached_as_the_readme_says_before_anything_else_is_imported():
    code = "import pipedec_jax; pipedec_jax.disk_cache.use_compilation_cache"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("switch", ["off", "0", " No "])
def test_it_can_be_switched_off(updates, monkeypatch, switch):
    monkeypatch.setenv("PIPEDEC_JAX_COMPILATION_CACHE", switch)
    assert disk_cache.use_compilation_cache() is None
    assert updates == {"jax_enable_compilation_cache": False}


def test_a_switch_that_says_neither_is_an_error(updates, monkeypatch):
    monkeypatch.setenv("PIPEDEC_JAX_COMPILATION_CACHE", "/tmp")
    with pytest.raises(ValueError, match=r"must be on or off, not '/tmp'; PIPEDEC_JAX_CACHE names the place"):
        disk_cache.use_compilation_cache()
    assert updates == {}


def test_a_directory_that_jax_was_given_stays(updates, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    with jax._src.config.compilation_cache_dir(str(tmp_path)):
        assert disk_cache.use_compilation_cache() == tmp_path
    assert updates == {}
    assert jax.config.jax_compilation_cache_dir == before


def test_the_directory_is_the_one_given_or_named_or_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("PIPEDEC_JAX_CACHE", str(tmp_path))
    assert disk_cache.cache_directory() == tmp_path
    assert disk_cache.cache_directory("here") == Path("here")
    monkeypatch.delenv("PIPEDEC_JAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert disk_cache.cache_directory() == tmp_path / ".cache" / "pipedec_jax"
