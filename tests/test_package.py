"""The package as users get it: its modules, its public names, and a wheel that works."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import race_dist
from race_dist.renamed_modules import RENAMED

ROOT = Path(__file__).parents[1]
PLACES = {"race_dist": ROOT / "race_dist", "race_dist.kernels": ROOT / "kernels", "race_dist.launch": ROOT / "launch"}
DATA = {
    "race_dist.configs": ROOT / "configs",
    "race_dist.configs.quality": ROOT / "configs/quality",
    "race_dist.launch.templates": ROOT / "launch/templates",
}  # no modules there
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package by its installed name."""
    for package, place in PLACES.items():
        for file in place.rglob("*.py"):
            parts = file.relative_to(place).with_suffix("").parts
            yield ".".join([package, *(p for p in parts if p != "__init__")]), file


def test_every_package_of_the_tree_is_installed() -> None:
    found = {name for name, file in modules() if file.name == "__init__.py"}
    assert found | set(DATA) == set(PROJECT["tool"]["setuptools"]["packages"])


def test_no_package_lacks_its_init() -> None:
    for name, file in modules():
        assert (file.parent / "__init__.py").is_file(), f"{name} lies in a folder without __init__.py"


@pytest.mark.parametrize("name", sorted(race_dist.__all__))
def test_public_names_are_there(name: str) -> None:
    assert getattr(race_dist, name) is not None
    assert name in dir(race_dist)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'attention_race'"):
        _ = race_dist.attention_race  # type: ignore[attr-defined]


def test_old_names_of_modules_import_the_new_ones_with_a_warning() -> None:
    for old, new in RENAMED.items():
        sys.modules.pop(old, None)
        with pytest.warns(DeprecationWarning, match=f"{re.escape(old)} is now {re.escape(new)}"):
            assert importlib.import_module(old) is importlib.import_module(new)
        package, name = old.rsplit(".", 1)
        assert getattr(importlib.import_module(package), name) is importlib.import_module(new)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the tree, installed without dependencies into an empty folder."""
    tree = tmp_path_factory.mktemp("tree")
    for part in ("race_dist", "configs", "kernels", "launch"):
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, tree / part)
    site = tmp_path_factory.mktemp("site")
    said = quietly([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tree / "dist"), str(tree)])
    warnings = [line for line in said.splitlines() if "warning" in line.lower() and "byte-compiling" not in line]
    assert not warnings
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:  # what is unpacked is what pip would put there
        archive.extractall(site)
    return site


def quietly(command: list[str], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout + done.stderr)


def test_a_wheel_holds_every_module_and_nothing_else(installed: Path) -> None:
    expected = {
        Path(*name.split("."), "__init__.py") if file.name == "__init__.py" else Path(*name.split(".")).with_suffix(".py")
        for name, file in modules()
    }
    assert {file.relative_to(installed) for file in installed.rglob("*.py")} == expected
    assert (installed / "race_dist" / "py.typed").is_file()
    for name, folder in DATA.items():
        there = installed.joinpath(*name.split("."))
        assert {f.name for f in there.iterdir()} == {f.name for f in folder.iterdir()}
    assert not (installed / "kernels").exists()
    assert not (installed / "launch").exists()


def test_the_page_of_a_wheel_has_links_that_work_elsewhere(installed: Path) -> None:
    (metadata,) = installed.glob("*.dist-info/METADATA")
    text = metadata.read_text()
    assert "\nProject-URL: Homepage, https://github.com/race-dist/race-dist\n" in text
    assert "\nAuthor: race-dist contributors\n" in text
    assert not re.findall(r"\]\((?!https?://|#|mailto:)([^)]+)\)", text)


def test_a_wheel_works_by_itself(installed: Path, tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(installed)!r})
import torch, race_dist, race_dist.kernels, race_dist.launch.local
for module in (race_dist, race_dist.kernels, race_dist.launch.local):
    assert module.__file__.startswith({str(installed)!r}), module.__file__
q = torch.randn(1, 8, 2, 4)
out = race_dist.race_attention(q, q, q, race_dist.sample_planes(2, 3, 4, seed=0), 1.0)
assert out.shape == q.shape
from race_dist.cli import app
from race_dist.training.config import load_config
assert load_config("demo").name == "demo"
"""
    quietly([sys.executable, "-c", program], cwd=tmp_path)
