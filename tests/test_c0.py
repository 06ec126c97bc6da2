"""The measurement of the ruler: numbers are those of the recipes, shortcuts are exact, the document is the result."""

import json
from pathlib import Path

import numpy as np
import pytest
import small
from click.testing import CliRunner

import moefast
from moefast.benchmarks import c0, c0_report
from moefast.core.metrics import r2
from moefast.experts.normal_equations import NormalEquations
from moefast.protocol.milestones.evaluations import read_reports
from moefast.protocol.milestones.judge import judge
from moefast.simulate import REFERENCE_SETS, SimulatedSpectra

ROOT = Path(__file__).resolve().parents[1]

ROWS = {"test_10k": 500, "test_1k": 200}
PLAN = c0.Plan(1500, 300, 2, (None, 5), (1e-3, 1e-2, 0.1, 1.0), (0.1, 1.0, 10.0), (0.0, 0.1, 10.0))


@pytest.fixture(scope="module")
def source():
    """Reference sets in bins of four pixels, with fewer rows."""
    emulator = small.emulator()

    def make(name, part, rows=None):
        its = REFERENCE_SETS[name].parts[part]
        first, stop = rows or (0, ROWS[part])
        return SimulatedSpectra(stop - first, seed=its.seed, first_row=first, emulator=emulator)

    return make


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def found(source, folder):
    return c0.measure_set("z0", source, PLAN, lambda _: None, folder)


@pytest.mark.parametrize("recipe", ["published-ridge", "global-ridge"])
def test_numbers_are_those_of_the_recipe(found, source, recipe):
    test = c0.Stars.of(source("z0", "test_10k"))
    spectra = source("z0", "train", (1500, 3000))
    mixture = moefast.fit(spectra, recipe=recipe, seed=1, references=False)
    path = found["paths"][recipe]
    (bin_,) = mixture.manifest["fit"]["bins"].values()
    where = path["penalties"].index(bin_["alpha"])
    # The noise levels of global-ridge come from other rows here.
    tolerance = 1e-5 if recipe == "published-ridge" else 2e-3
    for d, seed in enumerate(PLAN.noise_seeds):
        log_g = mixture.mixture.predict(test.noisy(seed), test.error).log_g
        expected = r2(test.labels["log_g"], log_g)
        assert path["test_10k"][1][d][where] == pytest.approx(expected, abs=tolerance)
        if recipe == "published-ridge":
            assert found["recipes"][recipe]["test_10k"]["r2"][1][d] == path["test_10k"][1][d][where]


def test_penalties_are_chosen_on_held_out_stars_alone(found):
    for path in found["paths"].values():
        for k, held in enumerate(path["validation"]):
            assert path["chosen"][k] == path["penalties"][int(np.argmax(held))]
    assert found["paths"]["published-ridge"]["chosen"][0] == found["choices"][0]["penalty_chosen"]


def test_the_spread_is_over_all_seeds(found):
    one = found["recipes"]["published-ridge"]["test_1k"]
    values = np.array(one["r2"])
    assert values.shape == (2, 2)
    assert len(np.unique(values)) == 4
    assert one["half_spread"] == pytest.approx((values.max() - values.min()) / 2)
    assert one["stable"] == (one["half_spread"] <= 0.01)


def test_what_is_changed_changes_something(found):
    rows = {row["what"]: np.array(row["r2_published_penalty"]) for row in found["choices"]}
    published = rows.pop("as published")
    assert len(rows) == 10
    # Clipping to the range of labels cannot harm, and here nothing is predicted beyond it.
    assert (rows.pop("predictions not clipped to the range of labels") <= published + 1e-9).all()
    assert rows["noise in closed form"].mean() > published.mean() + 0.01
    assert rows["300 training stars instead of 1,500"].mean() < published.mean() - 0.01
    assert all(np.abs(values - published).max() > 1e-5 for values in rows.values())


def test_clipping_in_closed_form_is_the_limit_of_many_draws():
    rng = np.random.default_rng(0)
    flux = np.array([[-1.0, 0.0, 0.3, 1.0, 5.9, 6.1, -8.0]], np.float32)
    error = np.array([[1.0, 0.5, 1.0, 2.0, 1.0, 1.0, 1.0]], np.float32)
    draws = np.maximum(flux + error * rng.standard_normal((400_000, 7)), 0)
    mean, variance = c0.rectified(flux, error)
    np.testing.assert_allclose(mean[0], draws.mean(0), atol=0.01)
    np.testing.assert_allclose(variance[0], draws.var(0), atol=0.02)
    assert (variance >= 0).all()


@pytest.mark.parametrize("how", ["scale", "centre", "closed"])
def test_shortcuts_are_fits_of_mapped_spectra(how):
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((400, 30)) @ rng.standard_normal((30, 30)) + 3).astype(np.float32)
    y = x[:, :5].sum(1) + rng.standard_normal(400)
    variance = rng.uniform(0.5, 2, x.shape).astype(np.float32)
    reference = x[0].astype(np.float64)
    equations = NormalEquations(reference)
    equations.add(x, y, variance)
    scale = rng.uniform(0.5, 2, 30)
    options = {"scale": {"scale": scale}, "centre": {"centre": True}, "closed": {"closed": True}}[how]
    fits = c0.path(equations.finish().moments(), (0.01, 1.0), **options)
    predicted = (x - reference) @ fits.weights + fits.intercepts
    mapped = x.astype(np.float64)
    if how == "scale":
        mapped = mapped * scale
    if how == "centre":
        mapped = mapped - mapped.mean(1, keepdims=True)
    for i, alpha in enumerate((0.01, 1.0)):
        if how == "closed":
            # Noise in closed form is a ridge penalty of its own size in each pixel.
            root = np.sqrt(variance.mean(0, dtype=np.float64) + alpha)
            judge = linear_model.Ridge(alpha=400).fit(mapped / root, y)
            expected = judge.predict(mapped / root)
        else:
            expected = linear_model.Ridge(alpha=alpha * 400).fit(mapped, y).predict(mapped)
        np.testing.assert_allclose(predicted[:, i], expected, rtol=1e-4, atol=1e-3)


def test_too_small_a_penalty_scores_nothing_and_stops_nothing():
    equations = NormalEquations(np.zeros(40))
    equations.add(np.ones((10, 40), np.float32), np.arange(10.0))
    fits = c0.path(equations.finish().moments(), (1e-30, 1.0))
    assert np.isnan(fits.weights[:, 0]).all()
    assert np.isfinite(fits.weights[:, 1]).all()
    assert r2(np.arange(3.0), fits.intercepts[[0, 0, 0]]) == 0


def test_a_path_without_the_published_penalty_is_refused():
    with pytest.raises(ValueError, match="lacks the published penalty"):
        c0.at_published((1e-3, 1.0))


def test_evaluations_are_read_by_milestones(found, folder):
    reports = read_reports([folder])
    assert len(reports) == 3
    (section,) = judge(reports).sections
    row = next(row for row in section.milestones if row.id == "C0")
    own = found["recipes"]["published-ridge"]["test_10k"]["r2"]
    assert row.ours.value == pytest.approx(np.mean([own[0][0], own[0][1], own[1][0]]))


def test_the_command_writes_numbers_tables_and_picture(found, tmp_path, monkeypatch):
    monkeypatch.setattr(c0, "measure_set", lambda *_: found)
    done = CliRunner().invoke(c0.main, ["--quick", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "out" / "c0.json").read_text())
    assert result["environment"]["cores"] >= 1
    assert set(result["sets"]) == {"z0", "survey"}
    for table in c0_report.tables(result).values():
        assert table in (tmp_path / "out" / "c0.md").read_text()
    assert (tmp_path / "out" / "c0.png").read_bytes().startswith(b"\x89PNG")


def test_the_document_shows_the_stored_result():
    text = (ROOT / "docs" / "studies" / "c0.md").read_text()
    stored = sorted((ROOT / "benchmarks" / "results").glob("*c0*.json"))
    assert stored
    result = json.loads(stored[-1].read_text())
    for what, table in c0_report.tables(result).items():
        assert table in text, what
    assert f"{result['train']:,} " in text
    assert (ROOT / "docs" / "studies" / "c0.png").stat().st_size < 200_000
