"""The list of packages in pyproject.toml is the tree, and what is installed is what the list promises."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
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


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.skipif(not (ROOT / "conda").is_dir(), reason="only in a checkout")
def test_conda_recipe_asks_for_what_the_project_asks_for() -> None:
    import moefast

    text = (ROOT / "conda/meta.yaml").read_text()
    run = re.search(r"\n  run:\n((?:    - .*\n)+)", text)
    host = re.search(r"\n  host:\n((?:    - .*\n)+)", text)
    assert run is not None
    assert host is not None
    names = {"astropy": "astropy-base", "matplotlib": "matplotlib-base", "onnxruntime-gpu": "onnxruntime"}
    project = _project()
    wanted = {"python": SpecifierSet(project["requires-python"])}
    for requirement in map(Requirement, project["dependencies"]):
        wanted[names.get(requirement.name, requirement.name)] = requirement.specifier
    found = dict(re.findall(r"- (\S+) ?(.*)\n", run[1]))
    assert {name: SpecifierSet(versions) for name, versions in found.items()} == wanted
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert all(" ".join(re.split(r"(?=>)", each)) in host[1] for each in build)
    assert f'version: "{moefast.__version__}"' in text
    ((name, target),) = project["scripts"].items()
    assert f"- {name} = {target}" in text
    assert f"\n  license: {project['license']}\n" in text
    assert [
        f"  license_file: {file}" in text and (ROOT / file).is_file() for file in project["license-files"]
    ] == [True]
    assert f'summary: "{project["description"]}"' in text


@pytest.mark.skipif(not (ROOT / "CITATION.cff").is_file(), reason="only in a checkout")
def test_the_citation_is_of_this_version_and_licence() -> None:
    import moefast

    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {moefast.__version__}" in lines
    assert f"license: {_project()['license']}" in lines


def test_extras_exist_that_extras_and_messages_name() -> None:
    extras = set(_project()["optional-dependencies"])
    named = set()
    for folder in (*ROOMS.values(), "docs"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".md"}:
                named |= set(re.findall(r"moefast\[([\w,]+)\]", path.read_text(encoding="utf-8")))
    for requirements in _project()["optional-dependencies"].values():
        for requirement in map(Requirement, requirements):
            if requirement.name == "moefast":
                named |= requirement.extras
    assert {name for each in named for name in each.split(",")} <= extras
    assert set(metadata.metadata("moefast").get_all("Provides-Extra") or ()) == extras


def _without(package: str, code: str) -> str:
    """What a program says that runs where a package is not installed."""
    text = f"import sys\nsys.modules[{package!r}] = None\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode != 0, "it runs without the package"
    return done.stderr


@pytest.mark.parametrize(
    ("package", "extra", "code"),
    [
        ("dask", "dask", "from moefast.cluster.workers import connect\nwith connect('local:1'): pass"),
        ("distributed", "dask", "from moefast.cluster.workers import connect\nwith connect('local:1'): pass"),
        ("lightgbm", "hybrid", "from moefast.experts.trees import Trees\nfrom moefast.experts.protocol import Inputs\n"
         "import numpy as np\nz = np.zeros((50, 3), 'f4')\n"
         "Trees.fit(Inputs(z, z[:, 0], np.zeros((50, 9), 'f4')), np.arange(50.0), seed=0)"),
        ("numba_cuda", "cuda", "from moefast.kernels.cuda.device import require_device\nrequire_device()"),
    ],
)  # fmt: skip
def test_what_needs_an_extra_says_so_where_it_is_missing(package, extra, code) -> None:
    said = _without(package, code)
    assert f"moefast[{extra}]" in said
    assert "ModuleNotFoundError" not in said.splitlines()[-1]


@pytest.mark.parametrize("engine", ["sklearn", "himalaya", "lightgbm", "torch"])
def test_engines_of_others_are_listed_with_what_is_missing(engine) -> None:
    package = {"sklearn": "sklearn"}.get(engine, engine)
    code = (
        "from moefast.benchmarks.adapter import TASKS, why_not\n"
        "from moefast.benchmarks.engines import choose\n"
        f"import sys\nfound = [why_not(e) for e in choose(TASKS, ()) if {engine!r} in e.name]\n"
        "sys.exit('; '.join(found) if found and all(found) else 0)"
    )
    assert "not installed" in _without(package, code)


def test_systems_that_are_not_posix_import_and_predict(tmp_path) -> None:
    """What Windows has not is blocked; its paths and its locks of open files are not tried by this."""
    code = f"""
import os, signal, sys
sys.modules.update(dict.fromkeys(("fcntl", "resource", "grp", "termios", "pty", "syslog")))
for name in ("fork", "getuid", "geteuid", "sched_getaffinity", "sysconf", "posix_fadvise", "getloadavg", "statvfs"):
    delattr(os, name)
for name in ("SIGPIPE", "SIGKILL", "SIGHUP", "SIGALRM", "SIGXFSZ"):
    delattr(signal, name)
sys.argv = ["moefast"]
from moefast.cli import cli
path = {str(tmp_path / "spectra.h5")!r}
cli(["simulate", path, "-n", "3", "--seed", "1", "-q"], standalone_mode=False)
cli(["predict", path, "-m", "z0", "-o", path + ".log_g.h5", "-q"], standalone_mode=False)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "spectra.h5.log_g.h5").is_file()


@pytest.mark.skipif(not (ROOT / "Containerfile").is_file(), reason="only in a checkout")
def test_container_file_has_commands_that_exist() -> None:
    from moefast.cli import cli

    text = (ROOT / "Containerfile").read_text()
    steps = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    version = re.search(r"^FROM \S+/python:(\d+\.\d+)-slim$", steps, re.MULTILINE)
    assert version is not None
    assert SpecifierSet(_project()["requires-python"]).contains(version[1])
    calls = re.findall(r"&& moefast (\w+) ([^&\n]+)", steps)
    assert [name for name, _ in calls] == ["simulate", "predict"]
    for name, words in calls:
        # Parsed, not run.
        with cli.commands[name].make_context(name, shlex.split(words)):
            pass
    assert 'ENTRYPOINT ["moefast"]' in steps
