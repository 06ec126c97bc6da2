"""R² against training stars: small sizes, every method, and the picture."""

import json

import pytest
from click.testing import CliRunner

from moefast.benchmarks import scaling


@pytest.fixture(scope="module")
def found():
    return scaling.measure("z0", [600, 1200], "small", 40, judges=300, basis_rows=1500)


@pytest.mark.torch
def test_more_stars_do_no_harm_and_something_is_learnt(found):
    for curve in found["curves"].values():
        few, many = (curve[n]["r2"] for n in ("600", "1200"))
        assert many > 0.4
        # 300 judges know R² to 0.04.
        assert many > few - 0.08


def test_results_are_drawn_without_being_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "measure", None)
    curve = {"1000": {"r2": 0.5, "seconds": 1}, "9000": {"r2": 0.6, "seconds": 9}}
    (tmp_path / "found.json").write_text(json.dumps({"set": "z0", "curves": {"LightGBM": curve}}))
    done = CliRunner().invoke(
        scaling.main, ["--from", str(tmp_path / "found.json"), "--picture", str(tmp_path / "drawn.png")]
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
