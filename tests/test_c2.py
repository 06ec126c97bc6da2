"""The measurement of gates: views and weights are what they are called, the document is the result."""

import json
from pathlib import Path

import numpy as np
import pytest
import small
from click.testing import CliRunner

from moefast.benchmarks import c2
from moefast.core.grids import SNR_NORM_NAMES
from moefast.simulate import REFERENCE_SETS, SimulatedSpectra

ROOT = Path(__file__).resolve().parents[1]
PLAN = c2.Plan(1500, 600, 2, 700, 60, 60, 20)


@pytest.fixture(scope="module")
def source():
    """Reference sets in bins of four pixels."""
    emulator = small.emulator()

    def make(name, part, rows=None):
        its = REFERENCE_SETS[name].parts[part]
        first, stop = rows
        settings = REFERENCE_SETS[name].settings
        return SimulatedSpectra(
            stop - first, seed=its.seed, first_row=first, emulator=emulator, settings=settings
        )

    return make


@pytest.fixture(scope="module")
def found(source):
    return c2.measure_set("z0", source, PLAN, lambda _: None)


def test_every_gate_is_scored_in_every_bin(found):
    assert sum(found["n_by_snr_norm"]) == PLAN.validation
    assert found["n_noisy"] == PLAN.gate * PLAN.draws
    for name, gate in found["gates"].items():
        assert len(gate["r2_by_snr_norm"]) == len(SNR_NORM_NAMES), name
        assert gate["rho_interval"][0] <= gate["rho"] <= gate["rho_interval"][1], name
        np.testing.assert_allclose(np.sum(gate["weights_by_true_bin"], 1), 1, atol=1e-5, err_msg=name)
    r2 = {name: one["r2"] for name, one in found["references"].items()}
    assert r2["global ridge"] < r2["true bins"]
    for name in ("classification, hard", "regression, hard"):
        np.testing.assert_allclose(found["gates"][name]["entropy"], 0, atol=1e-12)


def test_all_weight_goes_to_the_largest():
    gate = np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])
    np.testing.assert_array_equal(c2.hard(gate), [[0, 1, 0], [1, 0, 0]])


def test_what_only_changes_faint_stars_changes_no_other(found):
    base = found["gates"]["regression: lines, 48 components"]
    for name, gate in found["gates"].items():
        if "gain_in_x" in gate and "dual" not in name:
            assert gate["r2_by_snr_norm"][1:] == base["r2_by_snr_norm"][1:], name


def test_the_command_writes_numbers_tables_and_picture(found, tmp_path, monkeypatch):
    monkeypatch.setattr(c2, "measure_set", lambda *_: found)
    done = CliRunner().invoke(c2.main, ["--quick", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "out" / "c2.json").read_text())
    assert set(result["sets"]) == {"z0", "survey"}
    for table in c2.tables(result).values():
        assert table in (tmp_path / "out" / "c2.md").read_text()
    assert (tmp_path / "out" / "c2.png").read_bytes().startswith(b"\x89PNG")


def test_the_document_shows_the_stored_result():
    text = (ROOT / "docs" / "studies" / "c2.md").read_text()
    stored = sorted((ROOT / "benchmarks" / "results").glob("*c2*.json"))
    assert stored
    result = json.loads(stored[-1].read_text())
    for what, table in c2.tables(result).items():
        assert table in text, what
    assert (ROOT / "docs" / "studies" / "c2.png").stat().st_size < 250_000
