"""Every stage of a fit is told in what it counts; progress is shown where somebody looks on."""

import ast
import sys
import types
from importlib.resources import files

import pytest

from moefast.core.progress import SAMPLED, STEP_STAGES, row_progress, stage_progress, unit_of


def _stages(kinds):
    """Names of stages given to methods of these names, or to `partial(…progress, NAME)`, in the code of a fit."""
    found = set()
    for path in files("moefast.fitting").iterdir():
        if path.name.endswith(".py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                called = ast.unparse(node.func).rpartition(".")[2]
                names = [item.value for item in node.args if isinstance(item, ast.Constant)]
                if called == "partial" and not ast.unparse(node.args[0]).endswith("progress"):
                    continue
                if called in kinds:
                    found |= {name for name in names if isinstance(name, str)}
    return found


def test_stages_that_go_through_steps_are_known():
    steps = _stages({"steps", "partial"})
    assert {"experts", "gate", "network"} <= steps
    assert steps == STEP_STAGES


def test_stages_that_read_spectra_count_spectra():
    spectra = _stages({"blocks"})
    assert "normal equations" in spectra
    assert not spectra & STEP_STAGES


def test_a_repeated_fit_counts_what_the_first_did():
    assert unit_of("network") == unit_of("experts" + SAMPLED) == "steps"
    assert unit_of("normal equations") == unit_of("normal equations" + SAMPLED) == "spectra"


class Notebook:
    """What a notebook shows: outputs that can be changed."""

    def __init__(self):
        self.outputs = []

    def display(self, data, *, raw, display_id):
        assert raw
        assert display_id
        self.outputs.append(data["text/plain"])
        number = len(self.outputs) - 1

        class Handle:
            def update(_, changed, *, raw):
                self.outputs[number] = changed["text/plain"]

        return Handle()


@pytest.fixture
def notebook(monkeypatch):
    """As if IPython ran this in a notebook."""
    shown = Notebook()
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    ipython.display = types.ModuleType("IPython.display")
    ipython.display.display = shown.display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)
    return shown


def test_a_notebook_shows_one_line_for_each_stage(notebook, capsys):
    with stage_progress(None) as report:
        for stage in ("statistics", "gate"):
            for done in range(3):
                report(stage, done, 2)
    assert [line.split(" (")[0] for line in notebook.outputs] == [
        "statistics: 2 of 2 spectra",
        "gate: 2 of 2 steps",
    ]
    assert capsys.readouterr() == ("", "")


def test_nothing_is_shown_that_was_not_asked_for(notebook, monkeypatch, capsys):
    with row_progress(False, "predict") as report:
        report(1, 2)
    told = []
    with row_progress(lambda done, total: told.append((done, total)), "predict") as report:
        report(1, 2)
    assert told == [(1, 2)]
    monkeypatch.delitem(sys.modules, "IPython")
    with row_progress(None, "predict") as report:
        report(1, 2)
    assert notebook.outputs == []
    assert capsys.readouterr() == ("", "")


def test_an_interactive_interpreter_on_a_terminal_shows_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    with row_progress(None, "predict") as report:
        report(0, 20)
        report(20, 20)
    assert capsys.readouterr().err.startswith(
        "\rpredict: 0 of 20 spectra (0 %)\rpredict: 20 of 20 spectra (100 %)"
    )
