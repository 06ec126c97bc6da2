"""The list of packages in pyproject.toml is the tree, and what is installed is what the list promises."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import import_module, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "moefast": "moefast",
    "moefast.kernels": "kernels",
    "moefast.export": "export",
    "moefast.benchmarks": "benchmarks",
}


def _config() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def _tree() -> set[str]:
    found = set()
    for name, folder in ROOMS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([name, *init.parent.relative_to(ROOT / folder).parts]))
    return found


def test_packages_listed_are_the_tree() -> None:
    tree = _tree()
    assert {*ROOMS, "moefast.spectra"} <= tree
    assert set(_config()["packages"]) == tree


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for top in ROOMS.values() for path in (ROOT / top).rglob("*.py")}
    assert folders
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_listed_packages_import() -> None:
    for name in _config()["packages"]:
        if not name.endswith(".build"):
            assert import_module(name).__doc__, f"{name} says nothing about itself"


def test_every_file_of_the_tree_is_installed() -> None:
    """Also templates of pages and what modules import only when they are asked to."""
    for name, folder in ROOMS.items():
        home = Path(str(import_module(name).__file__)).parent
        files = [
            path
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts and "results" not in path.parts
        ]
        assert len(files) > 5
        assert [str(path) for path in files if not (home / path.relative_to(ROOT / folder)).is_file()] == []


def test_version_is_the_installed_one() -> None:
    import moefast

    assert metadata.version("moefast") == moefast.__version__


def test_package_data_is_installed() -> None:
    import moefast
    from moefast.model import SHIPPED

    home = Path(moefast.__file__).parent
    models = [f"shipped/{name}/{file}" for name in SHIPPED for file in ("model.onnx", "manifest.json")]
    ceilings = [
        f"ceilings/data/{name}-{part}.json.gz"
        for name in ("z0", "survey")
        for part in ("test_1k", "test_10k")
    ]
    for name in ("py.typed", *models, "simulate/data/emulator.npz", *ceilings):
        assert (home / name).is_file(), name
    benchmarks = import_module("moefast.benchmarks").__file__
    assert benchmarks is not None
    assert (Path(benchmarks).parent / "data/real_stars.h5").is_file()


@pytest.mark.skipif("MOEFAST_WHEEL" not in os.environ, reason="only where a wheel is installed")
def test_wheel_is_what_runs() -> None:
    for name in ROOMS:
        assert "site-packages" in str(import_module(name).__file__)


def test_python_started_inside_a_clone_finds_all_of_the_package():
    code = (
        "import sys\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]\n"
        "import moefast, moefast.kernels, moefast.export\n"
        "print(moefast.kernels.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent.name == "kernels"


def test_constraints_pin_every_requirement_within_its_range():
    """Of all extras: what is not pinned is another version tomorrow."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {"build", "test", "cuda"} <= set(extras)
    for text in [*project["dependencies"], *(text for extra in extras.values() for text in extra)]:
        requirement = Requirement(text)
        # Of two kinds of ONNX Runtime a machine gets one.
        if requirement.name == "moefast" or (requirement.marker and not requirement.marker.evaluate()):
            continue
        assert canonicalize_name(requirement.name) in pins, text
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text
