"""The study of experts per bin: each family is what it says, a run goes on, the document is the result."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small
from click.testing import CliRunner
from tolerances import assert_close

from moefast.benchmarks import c1, c1_experts, c1_report
from moefast.core.metrics import r2
from moefast.core.random import fold_of_rows
from moefast.experts.normal_equations import NormalEquations
from moefast.experts.ridge import NoisePath
from moefast.simulate import REFERENCE_SETS, SimulatedSpectra

ROOT = Path(__file__).resolve().parents[1]
PLAN = c1_experts.Plan(
    few=900,
    stars=1800,
    pixels=1500,
    per_bin=120,
    validation=600,
    draws=1,
    cnn_stars=200,
    cnn_seconds=0.2,
    trees=5,
)
QUICK = ("linear", "drawn-few", "drawn-all", "template", "stacked", "trees-on-flux", "cnn")


@pytest.fixture(scope="module")
def source():
    emulator = small.emulator()

    def make(name, part, rows=None):
        its = REFERENCE_SETS[name].parts[part]
        return SimulatedSpectra(rows[1] - rows[0], seed=its.seed, first_row=rows[0], emulator=emulator)

    return make


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("c1") / "z0"


@pytest.fixture(scope="module")
def measured(source, folder):
    return c1.measure("z0", source, PLAN, folder, lambda _: None, QUICK)


@pytest.fixture(scope="module")
def summary(measured):
    return c1_report.summarise("z0", *measured)


def toy(n=1500, r=5, seed=0):
    """Stars whose labels are linear in z within each half of T_eff; little noise."""
    rng = np.random.default_rng(seed)
    t_eff, m_h, log_g = rng.uniform(3750, 6000, n), rng.uniform(-2, 0.5, n), rng.uniform(1, 5, n)
    z = rng.standard_normal((n, r)).astype(np.float32)
    z[:, 0] += np.where(t_eff < 4000, 1, -1) * (log_g - 3)
    level = rng.normal(-1, 0.2, n)
    half = n // 2
    noisy = z + np.exp(level)[:, None] * rng.standard_normal(z.shape)
    train, held = slice(0, half), slice(half, n)
    return c1_experts.Data(
        Path(), np.arange(3.0), np.zeros(3), np.ones(3), np.eye(3, r, dtype=np.float32), z[train],
        noisy[None, train].astype(np.float32), np.zeros((1, half, 2), np.float32), level[train], t_eff[train],
        log_g[train], m_h[train], noisy[held].astype(np.float32), np.zeros((n - half, 2), np.float32), level[held],
        np.full(n - half, 3.0), t_eff[held], log_g[held], m_h[held],
    )  # fmt: skip


# --- parts ---------------------------------------------------------------------------------------------------


def test_indices_of_a_continuum_are_zero_and_of_a_line_its_mean_depth():
    wave = np.linspace(7100.2, 8849.8, 4096)
    columns = c1_experts.index_columns(wave)
    flat = np.ones(wave.size)
    sloped = 1 + 1e-4 * (wave - 8000)
    lines = c1_experts.LINES + c1_experts.MORE_LINES
    n = len(lines)
    assert columns.shape == (4096, 2 * n + len(c1_experts.BANDS))
    found = c1_experts.indices((flat @ columns)[None])
    assert found.shape == (1, n + len(c1_experts.BANDS) - 1)
    assert np.abs(found).max() < 1e-12
    assert np.abs(c1_experts.indices((sloped @ columns)[None])[0, :n]).max() < 1e-3
    magnesium = next(i for i, line in enumerate(lines) if line.name == "MgI_8809")
    low, high = lines[magnesium].window
    flat[(wave >= low) & (wave < high)] = 0.7
    found = c1_experts.indices((flat @ columns)[None])[0, :n]
    assert found[magnesium] == pytest.approx(0.3, abs=1e-6)
    assert np.abs(np.delete(found, magnesium)).max() < 0.1


def test_continuum_below_zero_stays_finite():
    lines = c1_experts.LINES + c1_experts.MORE_LINES
    found = c1_experts.indices(np.full((3, 2 * len(lines) + len(c1_experts.BANDS)), -1.0))
    assert np.isfinite(found).all()


def test_line_windows_lie_on_the_grid_and_apart_from_their_sidebands():
    for line in c1_experts.LINES + c1_experts.MORE_LINES:
        assert line.blue[1] <= line.window[0] < line.centre < line.window[1] <= line.red[0], line.name
        assert line.blue[0] > 7100.2
        assert line.red[1] < 8849.8


def test_lines_of_hydrogen_follow_rydberg():
    for line in c1_experts.MORE_LINES:
        if line.name.startswith("Pa_"):
            upper = int(line.name[3:])
            assert line.centre == pytest.approx(1e8 / (109677.58 * (1 / 9 - 1 / upper**2)), abs=0.1)


@pytest.mark.parametrize("n", [40, 90])
def test_the_dual_path_is_ridge(n):
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(n)
    x = rng.standard_normal((n, 60)).astype(np.float32) + 2
    y = x[:, :4].sum(1) + rng.standard_normal(n)
    alphas, folds = np.array([1e-3, 0.1, 10.0]), fold_of_rows(np.arange(n), c1_experts.N_FOLDS)
    mean, w, alpha = c1_experts.dual_path(x, y, alphas, folds)
    losses = []
    for one in alphas:
        loss = 0.0
        for f in range(c1_experts.N_FOLDS):
            held = folds == f
            judge = linear_model.Ridge(alpha=one * (~held).sum()).fit(x[~held].astype(float), y[~held])
            loss += ((y[held] - judge.predict(x[held].astype(float))) ** 2).sum()
        losses.append(loss)
    assert alpha == alphas[int(np.argmin(losses))]
    judge = linear_model.Ridge(alpha=alpha * n).fit(x.astype(float), y)
    assert_close((x - mean) @ w + y.mean(), judge.predict(x.astype(float)), made_in=np.float32, factor=10)


def test_experts_per_level_are_solutions_at_the_knots():
    data = toy()
    n = len(data.log_g)
    fit = c1_experts.Levelled.fit(data, n, data.bins, 9)
    for k, m in ((0, 0), (4, 3), (8, 7)):
        rows = data.bins == k
        totals = NormalEquations(np.zeros(data.z.shape[1]))
        totals.add(data.z[rows], data.log_g[rows])
        path = NoisePath(totals.moments())
        solutions = [path.solve(np.exp(data.knots[m]), alpha) for alpha in c1_experts.ALPHAS]
        assert any(
            np.allclose(fit.weights[k, m], w) and np.isclose(fit.intercepts[k, m], c) for w, c in solutions
        )
    # At a knot the star gets that knot's answer.
    at = np.full(4, data.knots[3])
    cells = np.array([0, 4, 4, 8])
    expected = [
        z @ fit.weights[k, 3] + fit.intercepts[k, 3] for z, k in zip(data.v_z[:4], cells, strict=True)
    ]
    assert_close(fit.predict(data.v_z[:4], at, cells), np.array(expected))


def test_out_of_fold_predictions_do_not_know_the_star():
    data = toy()
    n = len(data.log_g)
    before = c1_experts.Levelled.fit(data, n, data.bins, 9).out_of_fold(data, data.noisy[0], n)
    spoiled = data.log_g.copy()
    mine = np.flatnonzero(data.folds == 1)
    spoiled[mine] = 40.0
    after = c1_experts.Levelled.fit(replace(data, log_g=spoiled), n, data.bins, 9).out_of_fold(
        data, data.noisy[0], n
    )
    # The penalty is chosen with all folds; here the smallest is the best either way or changes next to nothing.
    assert np.abs(after[mine] - before[mine]).max() < 0.3
    assert np.abs(np.delete(after - before, mine)).max() > 1


def test_a_bin_is_split_where_that_gains():
    data = toy(15_000)
    cells, v_cells, n_cells = c1_experts.adaptive(data, len(data.log_g))
    # The response changes sign at 4000 K, inside the three cool bins.
    parents = {int(cell): {int(b) for b in data.bins[cells == cell]} for cell in range(n_cells)}
    assert all(len(bins) == 1 for bins in parents.values())
    split = {next(iter(bins)) for cell, bins in parents.items() if cell >= 9}
    assert split >= {0, 1, 2}
    assert {int(cell) for cell in v_cells} <= set(range(n_cells))
    fits = [
        c1_experts.Levelled.fit(data, len(data.log_g), *which) for which in ((data.bins, 9), (cells, n_cells))
    ]
    whole, parted = (
        r2(data.v_log_g, fit.predict(data.v_z, data.v_level, which))
        for fit, which in zip(fits, (data.v_bins, v_cells), strict=True)
    )
    assert parted > whole + 0.03


def test_ridge_on_columns_is_ridge():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(4)
    x, v_x = rng.normal(3, 2, (300, 6)), rng.normal(3, 2, (50, 6))
    y = x @ rng.standard_normal(6) + rng.standard_normal(300)
    found = c1_experts.ridge_on(x, y, v_x, fold_of_rows(np.arange(300), c1_experts.N_FOLDS))
    plain = linear_model.LinearRegression().fit(x, y).predict(v_x)
    assert np.abs(found - plain).max() < 0.1
    assert not np.array_equal(found, plain)


def test_one_comparison_can_hide_what_another_shows():
    """Covered stars against all, the mean of bins against pooled: with the same predictions the order turns."""
    rng = np.random.default_rng(0)
    n = 6000
    bins, covered = rng.choice(2, n, p=[0.8, 0.2]), rng.random(n) < 0.8
    y = rng.uniform(1, 5, n)
    noise = rng.standard_normal(n) * np.where(bins == 0, 1.0, 0.3) * np.where(covered, 1.0, 1.5)
    found = c1_report.conventions(y, bins, covered, {"hybrid": y + 0.95 * noise, "base": y + noise})
    for both in found.values():
        assert both["hybrid"] > both["base"]
    assert found["pooled, all"]["hybrid"] < found["pooled, covered"]["base"]
    assert found["pooled, all"]["hybrid"] < found["mean of bins, all"]["base"]


# --- the whole -----------------------------------------------------------------------------------------------


def test_every_family_predicts_every_star(measured):
    data, predictions, seconds = measured
    for family in ("linear", "drawn-few", "drawn-all", "template"):
        assert seconds[family] >= 0
    assert {c1_experts.BASE, c1_experts.SAMPLED, "template, all", "linear, 7 x 7, few"} <= set(predictions)
    for family, values in predictions.items():
        assert values.shape == data.v_log_g.shape, family
        assert np.isfinite(values).all(), family
        assert values.min() >= data.log_g.min(), family
        assert values.max() <= data.log_g.max(), family
    assert r2(data.v_log_g, predictions[c1_experts.BASE]) > 0.5


def test_what_is_kept_is_not_made_again(measured, source, folder, monkeypatch):
    def refuse(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(c1, "FAMILIES", dict.fromkeys(c1.FAMILIES, refuse))
    monkeypatch.setattr(c1_experts, "components", refuse)
    _, again, _ = c1.measure("z0", source, PLAN, folder, lambda _: None, ["linear"])
    assert again.keys() == measured[1].keys()
    for family, values in again.items():
        assert np.array_equal(values, measured[1][family]), family
    with pytest.raises(ValueError, match="another plan"):
        c1.measure("z0", source, replace(PLAN, few=901), folder, lambda _: None, QUICK)


def test_validation_stars_are_not_training_stars(measured):
    data = measured[0]
    assert not np.isin(data.v_log_g, data.log_g).any()


def test_the_hybrid_is_nowhere_worse_than_its_base(summary):
    for choice in summary["choices"].values():
        base = summary["experts"][choice["base"]]
        for k, family in enumerate(choice["families"]):
            gain = choice["bins"][k][0] - base["bins"][k][0]
            assert gain > 0 if family != choice["base"] else gain == 0
        assert choice["gain"][0] >= 0
        assert choice["conventions"]["pooled, all"]["hybrid"] == choice["overall"][0]


def test_the_command_writes_numbers_tables_and_pictures(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(c1, "measure", lambda *_: measured)
    done = CliRunner().invoke(c1.main, ["--quick", "-o", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "c1.json").read_text())
    assert set(result["sets"]) == set(c1.SETS)
    for table in c1_report.tables(result).values():
        assert table in (tmp_path / "c1.md").read_text()
    for name in ("c1", "c1-map", "c1-gain"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_document_shows_the_stored_result():
    text = (ROOT / "docs" / "studies" / "c1.md").read_text()
    stored = sorted((ROOT / "benchmarks" / "results").glob("*c1*.json"))
    assert stored
    result = json.loads(stored[-1].read_text())
    for what, table in c1_report.tables(result).items():
        assert table in text, what
    for name in ("c1", "c1-map", "c1-gain"):
        assert (ROOT / "docs" / "studies" / f"{name}.png").stat().st_size < 200_000
