"""The GPU benchmark runs from end to end at tiny sizes: accuracy, own engines, streaming, report."""

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from moefast.core.grids import uniform
from moefast.fitting import Options
from moefast.kernels.cuda import binning, draws, gram, products

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "gpu_normal_equations.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_normal_equations", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in (("SUM_THREADS", 4), ("COLUMNS", 4), ("LANES", 2)):
        monkeypatch.setattr(gram, name, value)
    for name in ("THREADS", "SCAN_THREADS"):
        monkeypatch.setattr(binning, name, 4)
    # Two shares of each of two groups, not the hundred that fill a device.
    monkeypatch.setattr(products, "ENOUGH_BLOCKS", 4)
    monkeypatch.setattr(module, "SMALL_ACCURACY", ((9, 5, 2),))
    monkeypatch.setattr(module, "SMALL_SPEED", ((6, 4, 1),))
    monkeypatch.setattr(module, "SMALL_STREAMED", (5, 3, 1))
    return module


PARTS = [word for part in ("accuracy", "speed", "streamed") for word in ("--part", part)]


@pytest.mark.usefixtures("numpy_products")
def test_the_first_pass(script, monkeypatch):
    monkeypatch.setattr(draws, "THREADS", 2)
    monkeypatch.setattr(script, "MADE", 5)
    options = Options(grid=uniform(1, 1), n_folds=2)
    found = script.first_pass(6, 7, 640, samples=1, n_compared=8, options=options)
    assert found["difference"] < script.GOAL
    assert {name: len(seconds) for name, seconds in found["seconds"].items()} == {"cuda": 1, "cpu": 1}


def test_the_report(script, tmp_path):
    out = tmp_path / "report.json"
    done = CliRunner().invoke(script.main, ["--small", "--samples", "1", "-o", str(out), *PARTS])
    report = json.loads(out.read_text())
    assert report["accuracy"][0]["worst_error"]["numba"] < script.GOAL
    assert report["speed"][0]["engines"]["numba"]["agrees"]
    assert len(report["speed"][0]["engines"]["numba"]["seconds"]) == 1
    assert report["speed"][0]["auto"]["method"] == "numba"
    assert report["streamed"]["rows_per_second"]["numba"][0] > 0
    assert "cublas" in report["methods_missing"]
    assert "TFLOP/s" in done.output
    assert done.exit_code == int(bool(report["methods_broken"]))


def test_a_wrong_product_is_a_failure(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "worst_error", lambda packed, exact: 2e-6)
    done = CliRunner().invoke(
        script.main, ["--small", "--samples", "1", "-o", str(tmp_path / "r.json"), *PARTS]
    )
    assert done.exit_code == 1
    assert "off by more than the goal of 1e-06: numba" in done.output
