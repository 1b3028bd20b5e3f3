"""What the project promises about itself: README's commands, package data, dependencies."""

import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import pipedec_jax

ROOT = Path(__file__).parents[1]


def command(name):
    found = re.findall(rf"^<!-- command: {name} -->\n```bash\n(.*)\n```$", (ROOT / "README.md").read_text(), re.M)
    assert len(found) == 1, f"README.md must hold one line after <!-- command: {name} -->"
    return found[0]


def test_readme_has_the_two_commands_as_one_line_each():
    assert command("run").endswith("python scripts/generate.py")
    assert "pip install . " in command("run")
    assert command("test").endswith("python -m pytest -n 2 --dist worksteal")
    assert "pip install '.[test]'" in command("test")


def test_ci_takes_the_commands_from_readme():
    function = re.search(r"^readme\(\).*?^}", ci(), re.S | re.M)[0]
    program = f"root='{ROOT}'\n{function}\nreadme run\nreadme test"
    shown = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown == f"{command('run')}\n{command('test')}\n"


def test_an_ordinary_install_carries_types_and_the_demo_family():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    data = settings["tool"]["setuptools"]["package-data"]["pipedec_jax"]
    assert {"py.typed", "demo/**/*"} <= set(data)
    assert (ROOT / "pipedec_jax" / "py.typed").is_file()


def test_every_dependency_is_pinned_by_range_and_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        name = re.match(r"[A-Za-z0-9_-]+", requirement)[0]
        assert re.fullmatch(rf"{name}>=[\d.]+,<[\d.]+", requirement), requirement
        assert importlib.metadata.version(name)


def test_nothing_that_decodes_imports_what_measures_it():
    """`pipedec_jax.analysis` stands above the rest of the package."""
    for path in (ROOT / "pipedec_jax").rglob("*.py"):
        imports = re.findall(r"^ *(?:from|import) pipedec_jax(?:\.| import )analysis", path.read_text(), re.M)
        assert not imports or "analysis" in path.parts, f"{path} imports analysis"


def ci():
    path = ROOT / ".ci" / "run"
    if not path.is_file():
        pytest.skip("not a checkout")
    return path.read_text()


def test_what_readme_names_in_the_package_is_public():
    """So that `dir`, `help` and editors show it."""
    named = set(re.findall(r"pipedec_jax\.(\w+)\(", (ROOT / "README.md").read_text()))
    named |= set(re.findall(r"pipedec_jax\.(\w+)\.\w+\(", (ROOT / "README.md").read_text()))
    assert {"Decoder", "disk_cache"} <= named <= set(pipedec_jax.__all__)
