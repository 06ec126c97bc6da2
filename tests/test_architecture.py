"""The order of the house: every floor imports lower floors only, and nothing imports in a circle.

All imports are read from the source, those inside functions and under TYPE_CHECKING included: an import that is put off
until a function runs is still a dependency.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOMES = {
    "moefast": ROOT / "moefast",
    "moefast.kernels": ROOT / "kernels",
    "moefast.export": ROOT / "export",
    "moefast.benchmarks": ROOT / "benchmarks",
}
"""Where each part of the installed package lies in a checkout."""

FLOORS = (
    ("moefast.core",),
    ("moefast.ops", "moefast.pages"),
    # The references of kernels are readers of descriptions.
    ("moefast.kernels",),
    ("moefast.backend", "moefast.checkpoint", "moefast.spectra"),
    ("moefast.experts", "moefast.gating", "moefast.simulate"),
    ("moefast.forward", "moefast.trunks"),
    ("moefast.mixture",),
    ("moefast.posterior",),
    ("moefast.ceilings", "moefast.export", "moefast.peers"),
    # The folder of a model verifies its ONNX file, so it stands above the export of the mixture.
    ("moefast.model",),
    ("moefast.fitting", "moefast.predicting"),
    ("moefast.recipes",),
    ("moefast.inspection", "moefast.protocol"),
    # Runs of all of these on many machines.
    ("moefast.cluster",),
    # The public names: `moefast.load`, `fit`, `predict`, `evaluate`.
    ("moefast",),
    ("moefast.benchmarks", "moefast.doctor"),
    ("moefast.cli",),
    # What calls the commands.
    ("moefast.benchmarks.faults", "moefast.__main__"),
)
"""From the ground up. A room imports itself and lower floors; rooms of one floor know nothing of each other."""

EXCEPTIONS: dict[tuple[str, str], str] = {}
"""(importer, imported): the reason. May only shrink: one that is no longer needed fails a test."""


def _source(home: Path, package: str) -> dict[str, Path]:
    """Module names and files of a folder."""
    found = {}
    for path in sorted(home.rglob("*.py")):
        parts = path.relative_to(home).with_suffix("").parts
        name = ".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))
        found[name] = path
    return found


def _modules() -> dict[str, Path]:
    return {name: path for package, home in HOMES.items() for name, path in _source(home, package).items()}


def imported_by(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """Every module of the house that a module imports, wherever in the file."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # What is imported is a module where there is one of that name, else something in the module named first.
            found |= {full if (full := f"{base}.{alias.name}") in modules else base for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            found |= {str(node.args[0].value)} if isinstance(node.args[0], ast.Constant) else set()
    return {one for one in found if one in modules and one != name}


def _by_name(node: ast.AST) -> bool:
    """Whether this imports a module whose name is only known when it runs."""
    if not isinstance(node, ast.Call) or not node.args:
        return False
    return ast.unparse(node.func).endswith("import_module") and not isinstance(node.args[0], ast.Constant)


def named_by(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules, and packages whose modules, a file names in a text, if it imports what some text says.

    Such are registries of what imports them in turn: they may lead in a circle, but not up.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not any(map(_by_name, ast.walk(tree))):
        return set()
    texts = {
        node.value.rstrip(".")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return {text for text in texts if text in modules and text != name}


@pytest.fixture(scope="module")
def modules():
    if not HOMES["moefast.kernels"].is_dir():
        pytest.skip("only in a checkout")
    return _modules()


@pytest.fixture(scope="module")
def imports(modules):
    return {name: imported_by(name, path, modules) for name, path in modules.items()}


def room_of(module: str) -> str:
    """The room that a module belongs to: the longest name in `FLOORS` that its own begins with."""
    rooms = [room for floor in FLOORS for room in floor]
    fitting = [
        room for room in rooms if module == room or (room != "moefast" and module.startswith(f"{room}."))
    ]
    assert fitting, f"{module} belongs to no floor; add it to FLOORS where its imports allow"
    return max(fitting, key=len)


def floor_of(module: str) -> int:
    room = room_of(module)
    return next(i for i, floor in enumerate(FLOORS) if room in floor)


def violations(imports: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Imports that lead up, or across to another room of the same floor."""
    return {
        (one, other)
        for one, others in imports.items()
        for other in others
        if room_of(one) != room_of(other) and floor_of(other) >= floor_of(one)
    }


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, over however many others: the strongly connected sets of more than one."""
    reachable: dict[str, set[str]] = {}
    for start, first in imports.items():
        seen: set[str] = set()
        todo = list(first)
        while todo:
            one = todo.pop()
            if one not in seen:
                seen.add(one)
                todo += imports.get(one, ())
        reachable[start] = seen
    together = {
        frozenset(other for other in others if one in reachable[other])
        for one, others in reachable.items()
        if one in others
    }
    return sorted(sorted(group) for group in together)


def test_every_import_leads_down(imports):
    unexpected = violations(imports) - EXCEPTIONS.keys()
    assert not unexpected, "\n".join(f"{one} imports {other}" for one, other in sorted(unexpected))


def test_what_is_imported_by_name_leads_down(modules):
    named = {name: named_by(name, path, modules) for name, path in modules.items()}
    assert {"moefast", "moefast.experts.protocol", "moefast.spectra.layouts.registry"} <= {
        name for name, others in named.items() if others
    }
    unexpected = violations(named) - EXCEPTIONS.keys()
    assert not unexpected, "\n".join(f"{one} names {other}" for one, other in sorted(unexpected))


def test_exceptions_are_needed_and_have_a_reason(imports):
    assert all(len(reason.split()) > 3 for reason in EXCEPTIONS.values())
    spare = EXCEPTIONS.keys() - violations(imports)
    assert not spare, f"no longer needed, remove from EXCEPTIONS: {sorted(spare)}"


def test_nothing_imports_in_a_circle(imports):
    assert circles(imports) == []


def test_every_room_of_the_floors_exists(modules):
    assert {room for floor in FLOORS for room in floor} <= modules.keys()


def test_imports_are_found_wherever_they_stand(tmp_path):
    """Lazy, relative, aliased, guarded and plain imports: the reader must see all of them."""
    home = tmp_path / "house"
    (home / "attic").mkdir(parents=True)
    (home / "__init__.py").write_text("")
    (home / "cellar.py").write_text("")
    (home / "garage.py").write_text("")
    (home / "kitchen.py").write_text("import house.cellar as c\n")
    (home / "attic" / "__init__.py").write_text("from .. import kitchen\n")
    (home / "attic" / "roof.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from house.cellar import Wine\n"
        "def f():\n    from . import __doc__\n    from ..kitchen import cook\n"
        "def g():\n    import importlib\n    importlib.import_module('house.garage')\n"
    )
    (home / "plugs.py").write_text(
        "from importlib import import_module\n"
        "PLUGS = {'tap': 'house.kitchen'}\n"
        "def f(name):\n    import_module(PLUGS[name])\n    import_module(f'house.attic.{name}')\n"
    )
    modules = _source(home, "house")
    assert named_by("house.plugs", modules["house.plugs"], modules) == {"house.kitchen", "house.attic"}
    assert named_by("house.attic.roof", modules["house.attic.roof"], modules) == set()
    found = {name: imported_by(name, path, modules) for name, path in modules.items()}
    assert found["house.kitchen"] == {"house.cellar"}
    assert found["house.attic"] == {"house.kitchen"}
    assert found["house.attic.roof"] == {"house.attic", "house.cellar", "house.garage", "house.kitchen"}


def test_the_rules_can_be_broken():
    up = {"moefast.kernels.cpu": {"moefast.spectra.shard"}, "moefast.spectra.shard": {"moefast.kernels.cpu"}}
    assert violations(up) == {("moefast.kernels.cpu", "moefast.spectra.shard")}
    assert violations({"moefast.gating.mlp": {"moefast.experts.ridge"}}) != set()
    assert violations({"moefast.protocol.report": {"moefast.core.errors"}}) == set()
    assert circles(up) == [sorted(up)]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    with pytest.raises(AssertionError, match="belongs to no floor"):
        violations({"moefast.shed": {"moefast.core.errors"}})
