"""Every stage of a fit is told in what it counts."""

import ast
from importlib.resources import files

from moefast.core.progress import SAMPLED, STEP_STAGES, unit_of


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
