"""The fit in two passes on a toy whose answer is known: what it gains, what it refuses, what it never depends on."""

import dataclasses
import functools
import sys
from typing import ClassVar

import numpy as np
import pytest
from made_view import SHARE_OF_LOST_PIXELS

from moefast.checkpoint import Checkpoint
from moefast.core.errors import BackendError, InputError, LabelError, MoefastError, WaveGridError
from moefast.core.grids import Grid, SnrGrid, assign_snr_bins, uniform
from moefast.core.metrics import r2
from moefast.core.random import add_noise, fold_of_rows
from moefast.experts import indices, normal_equations, protocol, trees
from moefast.experts.protocol import Expert, ExpertValues, expert
from moefast.experts.ridge import principal_subspace
from moefast.experts.trees import Trees
from moefast.fitting import Options, error_model, fit_mixture, gate, linear_experts, residuals, training_set
from moefast.fitting.families import check_installed, make_library
from moefast.fitting.first_pass import gather
from moefast.fitting.linear_experts import choose_rank, find_levels, held_out, mixture_of, solve
from moefast.fitting.sample import draw_faint, draw_sample
from moefast.fitting.training_set import TrainingSet
from moefast.gating.mlp import softmax
from moefast.gating.tower import VIEWS
from moefast.kernels import perceptron
from moefast.mixture import hat_weights
from moefast.spectra.quality import assess
from moefast.spectra.spectrum_set import open_spectra

GRID = uniform(3, 2)
QUICK = {"grid": uniform(2, 1), "n_levels": 4, "sample_draws": 1, "references": False}


def fitted(path, progress=None, **options):
    return fit_mixture(open_spectra(path), Options(**options), progress)


def rows_of(path, **options):
    return TrainingSet(open_spectra(path), Options(**options), lambda *_: None)


def first_pass(data):
    equations, _, times_good, _ = gather(data, None, "cpu")
    return solve(data, equations, times_good)


def few_steps(monkeypatch):
    for module, name in ((gate, "fit_gate"), (error_model, "fit_error_model")):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), hidden=4, steps=150))


@pytest.fixture
def quick(monkeypatch):
    """Few iterations of the networks, where their quality is not the question."""
    few_steps(monkeypatch)


@pytest.fixture(scope="module")
def quick_fit(train_file):
    """The quick fit of all training stars, which others are compared with."""
    with pytest.MonkeyPatch.context() as patch:
        few_steps(patch)
        return fitted(train_file, **QUICK)


@pytest.fixture(scope="module")
def whole(train_file):
    stages = {}

    def progress(stage, done, total):
        assert 0 <= done <= total  # 0 says that the stage begins
        assert stages.get(stage, (0, total)) <= (done, total)
        stages[stage] = (done, total)

    fit = fitted(train_file, progress, grid=GRID, sample_draws=1)
    assert stages == {
        name: (n, n)
        for name, n in {
            "mean spectrum": 512,
            "normal equations": 3000,
            "components": 2,
            "experts": 2 + 2 * 6,
            "noise levels": 3000,
            "gate sample": 3000,
            "gate": 1000,
            "error model": 1000,
            "simpler fits": 5,
        }.items()
    }
    return fit


def linear_r2(form, fit, toy, bins):
    """R² of a reference fit on noisy spectra."""
    mixture = fit.mixture
    flux = toy.noisy()
    x = (np.maximum(flux, 0) if form.clipped else flux) - mixture.reference
    values = np.einsum("np,pkm->nkm", x, form.weights, optimize=True) + form.intercepts
    if form.levels.size > 1:
        level = mixture.prepare(flux, toy.error).log_level
        hat = hat_weights(np.clip(level, form.levels[0], form.levels[-1]), form.levels)
        values = (values * hat[:, None]).sum(2)
    else:
        values = values[:, :, 0]
    chosen = values[:, 0] if values.shape[1] == 1 else values[np.arange(len(x)), bins]
    return r2(toy.labels["log_g"], np.clip(chosen, *mixture.label_range))


def score(fit, toy):
    return r2(toy.labels["log_g"], fit.mixture.predict(toy.noisy(), toy.error).log_g)


def test_each_step_of_the_method_is_worth_something(whole, test_toy):
    bins = GRID.assign(test_toy.labels["T_eff"], test_toy.labels["M_H"])
    snr = assign_snr_bins(assess(test_toy.noisy(), test_toy.error, None).snr_norm)
    found = {
        name: linear_r2(form, whole, test_toy, snr if name.startswith("snr") else bins)
        for name, form in whole.references.items()
    }
    mixture = score(whole, test_toy)
    assert 0 < found["published-ridge"] < found["global-ridge, average noise"] - 0.01
    assert found["global-ridge, average noise"] < found["global-ridge"] - 0.005
    assert found["global-ridge"] < found["oracle-ridge, average noise"] - 0.05
    assert found["global-ridge, average noise"] < found["snr-oracle, average noise"] - 0.002
    assert found["snr-oracle, average noise"] < found["global-ridge"] + 0.01
    assert found["global-ridge"] < mixture - 0.05
    # Cross-validated promises are kept on stars never seen.
    promised = whole.summary["cross_validation"]
    assert promised["r2"] == pytest.approx(mixture, abs=0.04)
    prediction = whole.mixture.predict(test_toy.noisy(), test_toy.error)
    oracle = r2(test_toy.labels["log_g"], prediction.expert_log_g[np.arange(1000), bins])
    assert promised["r2_true_bins"] == pytest.approx(oracle, abs=0.04)
    # Three hundred stars on one side, a thousand on the other: 0.03 is one standard error.
    assert promised["gate_accuracy"] == pytest.approx(np.mean(prediction.weights.argmax(1) == bins), abs=0.08)


def test_errors_are_calibrated_on_stars_never_seen(whole, test_toy):
    found = whole.mixture.predict(test_toy.noisy(), test_toy.error)
    ratio = np.abs(test_toy.labels["log_g"] - found.log_g) / found.log_g_err
    assert np.mean(ratio < 1) == pytest.approx(0.683, abs=0.06)
    assert np.mean(ratio < 2) == pytest.approx(0.954, abs=0.03)
    wrong = np.abs(test_toy.labels["log_g"] - found.log_g)
    sure = found.log_g_err < np.median(found.log_g_err)
    assert wrong[sure].mean() < 0.7 * wrong[~sure].mean()


def test_a_global_fit_is_a_mixture_of_one_with_calibrated_errors(train_file, test_toy, whole):
    fit = fitted(train_file, grid=uniform(1, 1), sample_draws=1)
    found = fit.mixture.predict(test_toy.noisy(), test_toy.error)
    assert (found.weights == 1).all()
    expected = linear_r2(whole.references["global-ridge"], whole, test_toy, None)
    assert score(fit, test_toy) == pytest.approx(expected, abs=0.01)
    ratio = np.abs(test_toy.labels["log_g"] - found.log_g) / found.log_g_err
    assert np.mean(ratio < 1) == pytest.approx(0.683, abs=0.06)
    assert np.abs(fit.mixture.error_model[0]).max() < 1e4
    reference = fit.mixture.predict_reference(test_toy.noisy(), test_toy.error)
    np.testing.assert_allclose(found.log_g_err, reference.log_g_err, rtol=1e-3)


PUBLISHED = {"grid": uniform(1, 1), "noise": "sampled", "clipped": True, "alpha": 0.1, "n_levels": 2}


@pytest.fixture(scope="module")
def published(train_file):
    return fitted(train_file, sample_draws=1, **PUBLISHED)


def test_the_published_ridge_is_the_reference_that_others_carry(published, whole, test_toy):
    assert list(published.references) == ["published-ridge"]
    own, carried = published.references["published-ridge"], whole.references["published-ridge"]
    assert own.clipped
    assert carried.clipped
    np.testing.assert_allclose(own.weights, carried.weights, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(published.mixture.pixel_weights[:, :, 0], own.weights[:, :, 0], rtol=1e-5)
    # The same expert at every noise level, and the same numbers as the reference gives.
    np.testing.assert_array_equal(
        published.mixture.pixel_weights[:, :, 0], published.mixture.pixel_weights[:, :, 1]
    )
    assert score(published, test_toy) == pytest.approx(linear_r2(own, published, test_toy, None), abs=1e-5)


def test_the_published_ridge_is_that_of_scikit_learn(published, train_toy, test_toy):
    linear_model = pytest.importorskip("sklearn.linear_model")
    noisy = add_noise(train_toy.flux, train_toy.error, 0, np.arange(3000))
    assert (noisy < 0).any()
    judge = linear_model.Ridge(alpha=0.1 * 3000).fit(
        np.maximum(noisy, 0).astype(np.float64), train_toy.labels["log_g"]
    )
    flux = test_toy.noisy() - np.float32(0.8)
    assert (flux < 0).mean() > 0.05
    found = published.mixture.predict(flux, test_toy.error).expert_log_g[:, 0]
    np.testing.assert_allclose(found, judge.predict(np.maximum(flux, 0).astype(np.float64)), atol=2e-4)


def test_the_published_ridge_knows_its_error(published, test_toy):
    found = published.mixture.predict(test_toy.noisy(), test_toy.error)
    ratio = np.abs(test_toy.labels["log_g"] - found.log_g) / found.log_g_err
    promised = published.summary["cross_validation"]
    assert promised["r2"] == pytest.approx(score(published, test_toy), abs=0.04)
    # A fit that explains a third of the variance errs like the box of labels, not like a Gaussian: see balanced_factor.
    assert np.mean(ratio < 1) == pytest.approx(promised["coverage_68"], abs=0.05)
    assert np.mean(ratio < 1.96) == pytest.approx(promised["coverage_95"], abs=0.03)
    assert 0.55 < promised["coverage_68"] < 0.683
    assert 0.95 < promised["coverage_95"] < 1


@pytest.mark.usefixtures("quick")
def test_a_given_penalty_in_closed_form_adds_the_mean_variance_of_each_bin(train_toy, train_file):
    fit = fitted(train_file, **(QUICK | {"alpha": 0.1}))
    assert fit.references == {}
    bins = QUICK["grid"].assign(train_toy.labels["T_eff"], train_toy.labels["M_H"])
    for k in range(2):
        x = train_toy.flux[bins == k].astype(np.float64) - fit.mixture.reference
        y, variance = train_toy.labels["log_g"][bins == k], train_toy.error[bins == k] ** 2
        centred = x - x.mean(0)
        system = centred.T @ centred + np.diag(variance.sum(0, dtype=np.float64) + 0.1 * len(x))
        weights = np.linalg.solve(system, centred.T @ y)
        for m in range(4):
            np.testing.assert_allclose(fit.mixture.pixel_weights[:, k, m], weights, rtol=1e-3, atol=1e-5)
            assert fit.mixture.expert_intercepts[k, m] == pytest.approx(
                y.mean() - weights @ x.mean(0), abs=1e-4
            )


def test_the_condition_of_a_given_penalty_is_a_bound(published, train_toy):
    noisy = np.maximum(add_noise(train_toy.flux, train_toy.error, 0, np.arange(3000)), 0).astype(np.float64)
    values = np.linalg.eigvalsh(np.cov(noisy.T, bias=True)) + 0.1
    (bin_,) = published.summary["bins"].values()
    assert bin_["alpha"] == 0.1
    assert bin_["n"] == 3000
    assert 0.9 * bin_["condition"] < values[-1] / values[0] <= bin_["condition"] * (1 + 1e-6)
    assert published.summary["solver"] == "Cholesky decomposition in 640 pixels"


def test_the_summary_says_what_was_done(whole):
    summary = whole.summary
    assert summary["rows"] == {"used": 3000, "left_out": 0}
    assert sum(b["n"] for b in summary["bins"].values()) == 3000
    assert list(summary["bins"]) == list(GRID.names)
    assert all(b["alpha"] in linear_experts.ALPHAS and b["condition"] >= 1 for b in summary["bins"].values())
    np.testing.assert_allclose(np.diff(np.log(summary["noise_levels"]), 2), 0, atol=1e-12)
    assert summary["chi2_limit"] > 1
    assert summary["discarded_variance"] < 1e-2


def test_spectra_like_the_training_set_have_chi2_one(whole, test_toy):
    chi2 = whole.mixture.predict(test_toy.noisy(), test_toy.error).chi2
    assert np.median(chi2) == pytest.approx(1, abs=0.03)
    assert np.mean(chi2 > whole.summary["chi2_limit"]) < 0.01
    strange = test_toy.noisy() + 0.5 * np.sign(np.sin(np.arange(640)))
    assert np.median(whole.mixture.predict(strange, test_toy.error).chi2) > 2 * whole.summary["chi2_limit"]


@pytest.mark.usefixtures("quick")
class TestBits:
    def arrays(self, fit):
        for item in dataclasses.fields(fit.mixture):
            value = getattr(fit.mixture, item.name)
            if item.name in {"library", "others", "tower", "heads", "residuals"}:
                continue
            yield from [(item.name, v) for v in value] if isinstance(value, tuple) else [(item.name, value)]

    def assert_same(self, one, two):
        for (name, a), (_, b) in zip(self.arrays(one), self.arrays(two), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
        assert one.summary == two.summary

    def test_the_same_seed_gives_the_same_model(self, train_file, quick_fit):
        self.assert_same(quick_fit, fitted(train_file, **QUICK))

    def test_another_seed_gives_another_gate(self, train_file, quick_fit):
        one, two = quick_fit, fitted(train_file, seed=1, **QUICK)
        assert not np.array_equal(one.mixture.gate[0], two.mixture.gate[0])
        np.testing.assert_allclose(one.mixture.knots, two.mixture.knots)

    @pytest.mark.parametrize("noise", ["closed-form", "sampled"])
    def test_experts_do_not_depend_on_the_blocks(self, train_file, monkeypatch, noise):
        monkeypatch.setattr(normal_equations, "BUFFER_ROWS", 1000)
        one = fitted(train_file, noise=noise, **QUICK)
        monkeypatch.setattr(training_set, "BLOCK_ROWS", 333)
        two = fitted(train_file, noise=noise, **QUICK)
        for name in ("reference", "noise_shape", "expert_weights", "expert_intercepts", "columns", "knots"):
            np.testing.assert_array_equal(
                getattr(one.mixture, name), getattr(two.mixture, name), err_msg=name
            )
        # A sampled row's place in its matrix product differs, and with it the last bit of its features.
        np.testing.assert_allclose(two.mixture.gate[0], one.mixture.gate[0], rtol=0.02, atol=0.02)

    def test_shards_are_one_set(self, train_toy, quick_fit, tmp_path):
        shards = [
            train_toy.write(tmp_path / f"part_{i}.h5", rows=slice(a, b))
            for i, (a, b) in enumerate([(0, 700), (700, 701), (701, 3000)])
        ]
        one, two = quick_fit, fitted(shards, **QUICK)
        np.testing.assert_array_equal(one.mixture.expert_weights, two.mixture.expert_weights)

    def test_only_a_sample_is_read_twice(self, train_file):
        seen = {}

        def progress(stage, done, total):
            seen[stage] = (done, total)

        fit = fitted(train_file, progress, sample_rows=1100, **QUICK)
        assert seen["gate sample"] == (1024, 1024)
        assert seen["normal equations"] == (3000, 3000)
        assert 0 < fit.summary["cross_validation"]["rows"] < 1024

    @pytest.mark.parametrize("noise", ["closed-form", "sampled", "observed"])
    def test_every_way_to_treat_noise_learns_the_same(self, train_toy, test_toy, tmp_path, noise):
        path = train_toy.write(tmp_path / "noisy.h5", arrays={"noisy": train_toy.noisy(seed=5)})
        fit = fitted(path, noise=noise, **(QUICK | {"grid": uniform(1, 1)}))
        assert fit.summary["rows"]["used"] == 3000
        limit = {"closed-form": 0.30, "sampled": 0.25, "observed": 0.25}[noise]
        assert score(fit, test_toy) > limit

    def test_sampled_noise_is_not_the_stored_noise(self, train_toy, tmp_path):
        path = train_toy.write(tmp_path / "noisy.h5", arrays={"noisy": train_toy.noisy(seed=5)})
        one, two = fitted(path, noise="sampled", **QUICK), fitted(path, noise="observed", **QUICK)
        assert not np.array_equal(one.mixture.expert_weights, two.mixture.expert_weights)

    def test_noise_level_scales_the_errors(self, train_toy, train_file, tmp_path):
        louder = train_toy.write(tmp_path / "louder.h5", arrays={"error": 2 * train_toy.error})
        one, two = fitted(train_file, noise_level=2.0, **QUICK), fitted(louder, **QUICK)
        self.assert_same(one, two)

    def test_bad_pixels_and_rows_are_left_out(self, train_toy, quick_fit, test_toy, tmp_path):
        flux, error = train_toy.flux.copy(), train_toy.error.copy()
        rng = np.random.default_rng(0)
        flux[rng.random(flux.shape) < 0.002] = np.nan
        error[rng.random(flux.shape) < 0.002] = 0
        flux[[5, 2999]] = np.inf
        path = train_toy.write(tmp_path / "bad.h5", arrays={"flux": flux, "error": error})
        fit = fitted(path, **(QUICK | {"sample_draws": 3}))
        assert fit.summary["rows"] == {"used": 2998, "left_out": 2}
        assert all(np.isfinite(a).all() for _, a in self.arrays(fit))
        assert score(fit, test_toy) == pytest.approx(score(quick_fit, test_toy), abs=0.03)

    def test_a_pixel_bad_in_every_row_costs_only_itself(self, train_toy, quick_fit, test_toy, tmp_path):
        error = train_toy.error.copy()
        error[:, 300:304] = 0
        error[::2, 310] = np.nan
        fit = fitted(train_toy.write(tmp_path / "gap.h5", arrays={"error": error}), **QUICK)
        # Half of the rows tell the noise of a pixel as well as all of them.
        assert fit.mixture.noise_shape[310] == pytest.approx(quick_fit.mixture.noise_shape[310], rel=0.1)
        assert score(fit, test_toy) == pytest.approx(score(quick_fit, test_toy), abs=0.03)

    @pytest.mark.parametrize(
        ("array", "value"), [("error", 1e3), ("error", 1e10), ("flux", 1e6), ("flux", -1e10)]
    )
    def test_one_absurd_value_spoils_nothing(self, train_toy, quick_fit, test_toy, tmp_path, array, value):
        absurd = getattr(train_toy, array).copy()
        absurd[1234, 77] = value
        fit = fitted(train_toy.write(tmp_path / "absurd.h5", arrays={array: absurd}), **QUICK)
        assert score(fit, test_toy) == pytest.approx(score(quick_fit, test_toy), abs=0.01)
        assert fit.summary["chi2_limit"] == pytest.approx(quick_fit.summary["chi2_limit"], rel=0.05)

    def test_a_set_of_one_noise_level_fits(self, train_toy, test_toy, tmp_path):
        error = np.broadcast_to(train_toy.error[0], train_toy.error.shape)
        fit = fitted(train_toy.write(tmp_path / "same.h5", arrays={"error": error}), **QUICK)
        assert all(np.abs(a).max() < 1e5 for name, a in self.arrays(fit) if name in {"gate", "error_model"})
        found = fit.mixture.predict(test_toy.noisy(), test_toy.error)
        assert np.isfinite(found.log_g_err).all()

    def test_experts_never_saw_the_rows_they_are_judged_by(self, make_toy, tmp_path):
        toy = make_toy(500, 3)
        shuffled = np.random.default_rng(0).permutation(toy.labels["log_g"])
        noisy = toy.noisy()
        path = toy.write(tmp_path / "shuffled.h5", log_g=shuffled, arrays={"flux": noisy})
        fit = fitted(path, noise="observed", n_components=256, **(QUICK | {"grid": uniform(1, 1)}))
        # There is nothing to learn, and yet the rows of the fit itself seem to be explained.
        own = fit.mixture.predict(noisy, toy.error).expert_log_g[:, 0]
        assert r2(shuffled, own) > 0.1
        assert fit.summary["cross_validation"]["r2"] < 0.02

    def test_cross_fitted_values_are_those_of_a_fit_without_the_fold(self, train_file, monkeypatch):
        # The penalty is chosen with all folds; one choice leaves the weights alone to be looked at.
        monkeypatch.setattr(linear_experts, "ALPHAS", (0.01,))

        def sample_of(data):
            solved = first_pass(data)
            assert solved.experts.alphas == [0.01, 0.01]
            return draw_sample(data, mixture_of(data, solved), solved.experts)

        sample = sample_of(rows_of(train_file, **QUICK))
        np.testing.assert_array_equal(np.unique(sample.rows), np.arange(3000))
        folds = fold_of_rows(sample.rows, 3, 0)
        # Shifting the labels of one fold must move the values of the other folds only.
        shifted = rows_of(train_file, **QUICK)
        shifted.y = np.where(shifted.folds == 1, shifted.y + 1, shifted.y)
        moved = sample_of(shifted).values["linear"] - sample.values["linear"]
        assert np.abs(moved[folds == 1]).max() < 1e-6
        assert np.abs(moved[folds != 1]).mean() > 0.2


@pytest.mark.parametrize("noise", ["closed-form", "sampled"])
def test_as_few_components_as_the_best_r2_needs(train_file, noise):
    """Clean spectra span few directions, and a fit to few noisy rows is better without the last of its directions."""
    data = rows_of(train_file, **QUICK, noise=noise)
    equations = gather(data, None, "cpu").equations
    pooled = equations.pooled().moments()
    shape = pooled.variance
    levels = find_levels(data, shape)
    small = equations.transform(principal_subspace(pooled, shape).basis)

    def loss(rank):
        leading = small.transform(np.eye(small.n_pixels, rank))
        return sum(held_out(data.options, leading, k, levels, (0.0,))[0] for k in range(2))

    rank = choose_rank(data.options, small, levels)
    assert 0 < rank <= small.n_pixels
    step, most = linear_experts.RANK_STEP, linear_experts.RANK_LOSS
    ranks = [*range(step, small.n_pixels, step), small.n_pixels]
    least = min(loss(r) for r in ranks)
    total = small.moments().sum_yy
    assert (loss(rank) - least) / total <= most
    assert all((loss(r) - least) / total > most for r in ranks if r < rank)
    if noise == "sampled":
        assert rank < small.n_pixels
        assert loss(rank) < loss(small.n_pixels)


def test_a_given_number_of_components_is_kept(train_file, quick):
    fit = fitted(train_file, **QUICK, n_components=7)
    assert fit.mixture.columns.shape == (640, 7)
    assert fit.mixture.n_basis == 7


def test_constant_labels_are_refused(train_toy, tmp_path):
    path = train_toy.write(tmp_path / "constant.h5", log_g=np.full(3000, 4.4))
    with pytest.raises(LabelError, match="log_g is the same in every row"):
        fitted(path)


def test_numbers_that_no_star_has_are_left_out(train_toy, tmp_path):
    log_g, t_eff = train_toy.labels["log_g"].copy(), train_toy.labels["T_eff"].copy()
    log_g[[17, 400]] = np.nan, -9999
    t_eff[[401, 402]] = 0, 1e200
    marked = fitted(train_toy.write(tmp_path / "marked.h5", log_g=log_g, T_eff=t_eff))
    assert marked.summary["rows"] == {"used": 2996, "left_out": 4, "unlabelled": 4}
    # The same as with those rows without a good pixel.
    error = train_toy.error.copy()
    error[[17, 400, 401, 402]] = np.nan
    without = fitted(train_toy.write(tmp_path / "without.h5", arrays={"error": error}))
    assert marked.mixture.label_range == without.mixture.label_range
    assert marked.summary["cross_validation"] == without.summary["cross_validation"]


def test_an_empty_bin_is_refused_by_name(train_file):
    grid = Grid((3750.0, 6000.0, 7000.0, 8000.0), (-2.0, 0.5))
    with pytest.raises(
        InputError, match=r"6000-7000K/.*7000-8000K/.*hold fewer than two rows outside a fold"
    ):
        fitted(train_file, grid=grid)


def test_a_set_without_a_usable_row_is_refused(train_toy, tmp_path):
    path = train_toy.write(tmp_path / "bad.h5", arrays={"error": np.zeros_like(train_toy.error)})
    with pytest.raises(InputError, match="no usable row"):
        fitted(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": "imagined"}, "noise must be one of"),
        ({"noise_level": 0.0}, "noise level must be positive"),
        ({"noise_level": float("nan")}, "noise level must be positive"),
        ({"noise": "observed", "noise_level": 2.0}, "have the noise they have"),
        ({"clipped": True}, "clip sampled or observed flux"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"alpha": float("nan")}, "alpha must be positive"),
        ({"n_folds": 1}, "at least two folds"),
        ({"n_levels": 1}, "two noise levels"),
        ({"n_components": 0}, "at least one component"),
        ({"n_gate": 0}, "at least one component, also for the gate"),
        ({"sample_rows": 511}, "512 sample rows"),
    ],
)
def test_options_are_checked(change, message):
    with pytest.raises(InputError, match=message):
        Options(**change)


def test_the_factor_of_the_errors_serves_both_intervals():
    rng = np.random.default_rng(0)
    for ratio, exact in (
        (np.abs(rng.standard_normal(20000)) * 0.7, 0.7),
        (np.abs(rng.uniform(-1, 1, 20000)), None),
    ):
        factor = error_model.balanced_factor(ratio)
        inner, outer = np.mean(ratio <= factor), np.mean(ratio <= 1.959964 * factor)
        if exact:
            assert factor == pytest.approx(exact, rel=0.02)
        else:
            # A box has no tails: too many within 1.96 σ, too few within 1 σ, in the same measure.
            assert inner < 0.6827
            assert outer > 0.95
            assert (0.6827 - inner) / 2 == pytest.approx(outer - 0.95, abs=0.005)


def test_a_wave_grid_without_the_lines_is_refused_at_once(train_toy, tmp_path):
    elsewhere = dataclasses.replace(train_toy, wave=train_toy.wave - 1500)
    with pytest.raises(WaveGridError, match=r"blue\.h5: spectrumdataset/wave: .*no pixel in"):
        fitted(elsewhere.write(tmp_path / "blue.h5"))


def test_observed_spectra_are_noisy_in_every_file_or_in_none(train_toy, train_file, tmp_path):
    noisy = train_toy.write(tmp_path / "noisy.h5", arrays={"noisy": train_toy.noisy()})
    with pytest.raises(InputError, match=r"train\.h5: dataset/arrays/noisy/value is missing"):
        fitted([noisy, train_file], noise="observed")


def test_statistics_that_do_not_fit_are_refused(train_file, monkeypatch):
    monkeypatch.setattr("moefast.fitting.first_pass.physical_memory", lambda: 10_000_000)
    with pytest.raises(InputError, match=r"this machine has 0\.0 GB\. Fit a coarser grid"):
        fitted(train_file)


def test_spectra_that_differ_in_one_direction_give_a_gate_with_one_component(train_toy, test_toy, tmp_path):
    flux = 1 + 0.1 * np.outer(train_toy.labels["log_g"], np.sin(np.arange(640)))
    fit = fitted(train_toy.write(tmp_path / "line.h5", arrays={"flux": flux.astype(np.float32)}), **QUICK)
    assert (fit.mixture.n_basis, fit.mixture.n_gate) == (1, 1)
    same = 1 + 0.1 * np.outer(test_toy.labels["log_g"], np.sin(np.arange(640)))
    found = fit.mixture.predict(same.astype(np.float32), test_toy.error)
    assert r2(test_toy.labels["log_g"], found.log_g) > 0.9


@pytest.mark.usefixtures("quick")
def test_a_fold_without_rows_of_a_bin_does_not_stop_the_fit(make_toy, tmp_path):
    toy = make_toy(60, 4)
    bins = QUICK["grid"].assign(toy.labels["T_eff"], toy.labels["M_H"])
    counts = np.zeros((2, 16), int)
    np.add.at(counts, (bins, fold_of_rows(np.arange(60), 16)), 1)
    assert (counts == 0).any()
    fit = fitted(toy.write(tmp_path / "few.h5"), n_folds=16, **QUICK)
    assert np.isfinite(fit.mixture.predict(toy.noisy(), toy.error).log_g).all()


@pytest.fixture(scope="module")
def templates(train_file):
    return fitted(train_file, grid=GRID, sample_draws=1, families=("template",))


def test_a_library_of_templates_is_better_than_linear_experts_and_its_evidence_is_the_gate(
    templates, whole, test_toy
):
    mixture, bins = templates.mixture, GRID.assign(test_toy.labels["T_eff"], test_toy.labels["M_H"])
    found = mixture.predict(test_toy.noisy(), test_toy.error)
    assert r2(test_toy.labels["log_g"], found.log_g) > score(whole, test_toy) + 0.01
    assert mixture.families == ["template"] * mixture.n_experts
    assert templates.summary["library"]["clouds"] == len(mixture.clouds[0].keys)
    promised = max(templates.summary["library"]["r2_held_out"].values())
    assert promised == pytest.approx(score(templates, test_toy), abs=0.04)
    # By Bayes' rule alone, weights are probabilities of bins: they say how often they are right.
    w1, b1, w2, b2 = mixture.gate
    alone = dataclasses.replace(mixture, gate=(w1, b1, 0 * w2, 0 * b2))
    weights = alone.predict(test_toy.noisy(), test_toy.error).weights
    assert weights.max(1).mean() == pytest.approx(np.mean(weights.argmax(1) == bins), abs=0.05)
    ratio = np.abs(test_toy.labels["log_g"] - found.log_g) / found.log_g_err
    assert np.mean(ratio < 1) == pytest.approx(0.683, abs=0.06)
    # The posterior's own width is already close to the calibrated error.
    raw = np.abs(test_toy.labels["log_g"] - found.log_g) / found.log_g_err_raw
    assert 0.6 < np.mean(raw < 1) < 0.75


def test_compiled_code_and_contract_of_a_library_agree(templates, test_toy):
    spectra = test_toy.noisy()[:300], test_toy.error[:300]
    found, expected = templates.mixture.predict(*spectra), templates.mixture.predict_reference(*spectra)
    for name, tolerance in {"log_g": 1e-4, "expert_log_g": 1e-3, "weights": 2e-4, "log_g_err": 1e-3}.items():
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), atol=tolerance, err_msg=name
        )


def test_stars_of_the_sample_are_not_in_the_library(train_file, monkeypatch):
    taken = {}

    class Stopped(Exception):
        pass

    def look(self, mixture, stage, stretches, *, noisy):
        taken[stage] = {row for a, b in stretches for row in range(a, b)}
        raise Stopped

    monkeypatch.setattr(TrainingSet, "inputs", look)
    data = rows_of(train_file, families=("template",), sample_rows=600)
    with pytest.raises(Stopped):
        make_library(data, None)
    sample = {row for a, b in data.sample_stretches() for row in range(a, b)}
    assert not taken["templates"] & sample
    assert len(taken["templates"]) + len(sample) == 3000
    few = {row for a, b in data.other_stretches(700) for row in range(a, b)}
    assert few < taken["templates"]
    assert 400 < len(few) < 900


def test_every_bin_of_a_hybrid_has_the_best_family(train_file, test_toy, templates):
    fit = fitted(train_file, grid=GRID, sample_draws=1, families=("linear", "template", "trees"))
    chosen = fit.summary["families"]
    assert {entry["family"] for entry in chosen.values()} <= {"linear", "template", "trees"}
    for entry in chosen.values():
        gain, family = entry["gain"], entry["family"]
        assert gain["linear"] == 0
        assert gain[family] == max(0 if g < entry["standard_error"][f] else g for f, g in gain.items())
    # A library beats a plane where lines bend.
    assert sum(entry["family"] == "template" for entry in chosen.values()) >= 4
    assert score(fit, test_toy) > score(templates, test_toy) - 0.01
    form = fit.references["oracle-ridge, sampled"]
    bins = GRID.assign(test_toy.labels["T_eff"], test_toy.labels["M_H"])
    oracle = fit.mixture.prepare(test_toy.noisy(), test_toy.error).linear_log_g[np.arange(1000), bins]
    assert linear_r2(form, fit, test_toy, bins) < r2(test_toy.labels["log_g"], oracle)


@pytest.fixture(scope="module")
def regression(train_file):
    """The experts of `templates` behind a gate that was fitted without their evidence."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "fit_gate", functools.partial(gate.fit_gate, steps=1000))
        return fitted(
            train_file, grid=GRID, sample_draws=1, families=("template",), evidence=False, references=False
        )


def test_a_gate_by_regression_has_the_same_experts_and_no_evidence(regression, templates, test_toy):
    spectra, truth = (test_toy.noisy(), test_toy.error), test_toy.labels["log_g"]
    found, other = (fit.mixture.predict(*spectra) for fit in (regression, templates))
    np.testing.assert_array_equal(found.expert_log_g, other.expert_log_g)
    assert regression.mixture.families == ["template-means"] * 6
    assert np.any(regression.mixture.gate[2])
    # The weights are those of the gate's own perceptron, and of nothing else.
    prepared = regression.mixture.prepare(*spectra)
    weights = softmax(perceptron(prepared.features, regression.mixture.gate))
    np.testing.assert_allclose(found.weights, weights, atol=1e-4)
    few = tuple(array[:300] for array in spectra)
    expected = regression.mixture.predict_reference(*few)
    np.testing.assert_allclose(found.log_g[:300], expected.log_g, atol=1e-3)
    np.testing.assert_allclose(found.weights[:300], expected.weights, atol=2e-3)
    # It has learnt to tell bins: even weights would be as bad as this.
    even = r2(truth, np.clip(found.expert_log_g.mean(1), *regression.mixture.label_range))
    assert r2(truth, found.log_g) > even + 0.1


def test_bayes_rule_of_the_same_experts_is_the_gate_of_a_library(regression, templates, test_toy):
    spectra = test_toy.noisy(), test_toy.error
    w1, b1, w2, b2 = templates.mixture.gate
    alone = dataclasses.replace(templates.mixture, gate=(w1, b1, 0 * w2, 0 * b2)).predict(*spectra).log_g
    for fit in (regression, templates):
        np.testing.assert_allclose(fit.mixture.by_evidence(*spectra), alone, atol=1e-3)


def test_mixtures_without_a_library_have_no_evidence(quick_fit, test_toy):
    assert quick_fit.mixture.by_evidence(test_toy.noisy(), test_toy.error) is None


def test_families_of_metal_poor_bins_are_tried_there_alone(train_file, quick, monkeypatch):
    grid = Grid((3750.0, 6000.0), (-2.5, -1.0, 0.75))
    monkeypatch.setattr(indices, "fit_trees", functools.partial(indices.fit_trees, n_trees=20))
    fit = fitted(
        train_file, **(QUICK | {"grid": grid}), families=("linear",), metal_poor_families=("trees-indices",)
    )
    poor, rich = (fit.summary["families"][name] for name in grid.names)
    assert set(poor["gain"]) == set(poor["r2"]) == {"linear", "trees-indices"}
    assert set(rich["gain"]) == set(rich["r2"]) == {"linear"}
    assert rich["family"] == "linear"
    assert -1 < poor["r2"]["trees-indices"] < 1


@pytest.mark.usefixtures("quick")
def test_families_that_see_pixels_are_fitted_bin_by_bin(train_file, test_toy, monkeypatch):
    """Trees on flux and a network stand beside the linear experts, and what they say of the sample is their own."""
    asked, trained = {}, {}

    @expert
    @dataclasses.dataclass(frozen=True)
    class Pixel(Expert):
        """Log g from the mean of the flux over all pixels, fitted to clean stars."""

        slope: np.ndarray
        intercept: np.ndarray
        family: ClassVar[str] = "pixel"

        @property
        def needs_flux(self):
            return True

        def evaluate(self, inputs):
            assert inputs.x.shape == (len(inputs.z), test_toy.flux.shape[1])
            asked[len(asked)] = len(inputs.x)
            return ExpertValues((inputs.x.mean(1) * self.slope + self.intercept)[:, None].astype(np.float32))

        @classmethod
        def fit_clean(cls, stars, y, *, seed):
            trained[len(trained)] = len(y)
            assert stars.flux.shape == stars.error.shape == (len(y), test_toy.flux.shape[1])
            assert stars.noise_shape.shape == stars.reference.shape == (test_toy.flux.shape[1],)
            # Clean flux: twice the same rows would be the same.
            assert (stars.error > 0).all()
            slope, intercept = np.polyfit(stars.flux.mean(1), y, 1)
            return cls(np.float32([slope]), np.float32([intercept]))

    monkeypatch.setattr(
        trees, "fit_trees", functools.partial(trees.fit_trees, n_trees=20, least_stars=10, threads=1)
    )
    try:
        fit = fitted(train_file, **QUICK, families=("linear", "whitened", "trees-flux", "pixel"))
    finally:
        del protocol._FAMILIES["pixel"]
    said = fit.summary["families"]
    assert len(said) == 2
    for entry in said.values():
        assert set(entry["gain"]) == {"linear", "whitened", "trees-flux", "pixel"}
        # A mean over pixels, and twenty trees, know less than a plane in the components.
        assert entry["gain"]["pixel"] < 0
        assert entry["gain"]["trees-flux"] < 0
    # Each star of a bin that is not in the sample trains, each of the sample is asked of the expert of its own bin.
    data = rows_of(train_file, **QUICK, families=("linear", "trees-flux"))
    n_sample = sum(b - a for a, b in data.sample_stretches())
    assert sum(trained.values()) == 3000 - n_sample
    assert sum(asked.values()) == n_sample


def test_what_a_family_needs_is_known_before_the_first_row(monkeypatch):
    check_installed(("linear", "template", "whitened"))
    monkeypatch.setattr(Trees, "requires", ("no_such_module",))
    with pytest.raises(MoefastError, match=r"trees are fitted by no_such_module.*pip install no_such_module"):
        check_installed(("linear", "trees"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tower": "colour"}, "a second tower sees one of"),
        ({"tower": "quality", "tower_limit": 0.0}, "positive snr_norm"),
        ({"first_tower": False}, "needs a second one without a limit"),
        ({"tower": "quality", "families": ("template",)}, "for linear experts"),
        (
            {"families": ("forest",)},
            "expected linear, alone or with any of .*template, trees.*; found forest",
        ),
        ({"families": ()}, "or one of template, heads, posterior alone; found none"),
        ({"families": ("template", "trees")}, "found template, trees"),
        ({"families": ("template",), "noise": "sampled"}, "noise in closed form"),
        ({"families": ("linear", "trees"), "noise": "observed"}, "fit phys-moe"),
        ({"families": ("template",), "alpha": 0.1}, "noise in closed form"),
        ({"families": ("template",), "metal_poor_families": ("trees",)}, "beside linear"),
        ({"families": ("linear", "trees"), "metal_poor_families": ("trees",)}, "not among those of all bins"),
        ({"metal_poor_families": ("heads",)}, "must be of"),
        ({"grid": uniform(3, 1), "metal_poor_families": ("trees",)}, "needs a bin that ends at"),
        ({"metal_poor_families": ("trees",), "noise": "observed"}, "fit phys-moe"),
        ({"evidence": False, "families": ("heads",)}, "the gate of heads is its own"),
        ({"evidence": False, "first_tower": False, "tower": "quality"}, "needs its first tower"),
    ],
)
def test_families_that_cannot_be_are_refused(options, match):
    with pytest.raises(InputError, match=match):
        Options(**options)


# --- residuals -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_forests_find_what_one_linear_expert_gets_wrong_and_every_region_stays_as_good(
    train_file, test_toy, quick_fit
):
    fit = fitted(train_file, **QUICK, residuals=("linear", "ridge", "trees"))
    said = fit.summary["residuals"]
    # A linear expert has nothing to lean on.
    assert {"trees"} <= {entry["residual"] for entry in said["kept"].values()} <= {"ridge", "trees"}
    assert sum(place.added for place in fit.mixture.experts) == len(said["kept"]) > 0
    assert said["all"]["gain"] > 2 * said["all"]["standard_error"]
    for name, region in said["regions"].items():
        assert region["gain"] >= -max(2 * region["standard_error"], 1e-3 * region["before"]), name
    assert score(fit, test_toy) > score(quick_fit, test_toy) + 0.003
    # The error model knows of them.
    found = fit.mixture.predict(test_toy.noisy(), test_toy.error)
    ratio = np.abs(test_toy.labels["log_g"] - found.log_g) / found.log_g_err
    assert np.mean(ratio < 1) == pytest.approx(0.683, abs=0.07)
    spectra = test_toy.noisy()[:300], test_toy.error[:300]
    found, expected = fit.mixture.predict(*spectra), fit.mixture.predict_reference(*spectra)
    apart = np.abs(found.expert_log_g - expected.expert_log_g)
    # A forest may send a star whose component lies on a threshold to another leaf.
    assert np.mean(apart < 1e-4) > 0.97
    without = dataclasses.replace(
        fit.mixture, experts=tuple(p for p in fit.mixture.experts if not p.added)
    ).predict(*spectra)
    np.testing.assert_array_equal(without.expert_log_g, quick_fit.mixture.predict(*spectra).expert_log_g)


@pytest.mark.usefixtures("quick")
def test_residuals_that_help_nowhere_are_left_out_and_the_fit_says_so(train_file, test_toy, monkeypatch):
    never = functools.partial(residuals.choose_residuals, margin=1e9)
    monkeypatch.setattr(residuals, "choose_residuals", never)
    options = {"grid": GRID, "sample_draws": 1, "families": ("template",), "references": False}
    fit = fitted(train_file, **options, residuals=("ridge",))
    assert not any(place.added for place in fit.mixture.experts)
    assert fit.summary["residuals"]["kept"] == {}
    np.testing.assert_array_equal(
        fit.mixture.predict(test_toy.noisy(), test_toy.error).log_g,
        fitted(train_file, **options).mixture.predict(test_toy.noisy(), test_toy.error).log_g,
    )


@pytest.mark.usefixtures("quick")
def test_residuals_of_weak_stars_are_fitted_to_be_zero_elsewhere(train_file, train_toy, monkeypatch):
    asked = []

    def look(name, seen, wrong, weight, seed):
        asked.append(wrong)
        return fit_ridge(name, seen, wrong, weight, seed)

    fit_ridge = residuals._fit_residual
    monkeypatch.setattr(residuals, "_fit_residual", look)
    monkeypatch.setattr(residuals, "FAINT", 0.0)
    rich = np.mean(train_toy.labels["M_H"] >= -1)
    assert 0.2 < rich < 0.8
    for focus, share in ((False, 0.0), (True, rich)):
        asked.clear()
        fitted(train_file, **QUICK, residuals=("ridge",), residual_focus=focus)
        assert np.mean(np.concatenate(asked) == 0) == pytest.approx(share, abs=0.05)
    asked.clear()
    monkeypatch.setattr(residuals, "FAINT", np.inf)
    fitted(train_file, **QUICK, residuals=("ridge",), residual_focus=True)
    assert np.all(np.concatenate(asked) != 0)


def test_unknown_residuals_are_refused():
    with pytest.raises(InputError, match="residuals must be of linear, ridge, trees"):
        Options(residuals=("network",))
    with pytest.raises(InputError, match="only where there are residuals"):
        Options(residual_focus=True)


# --- a second tower of the gate --------------------------------------------------------------------------------------

TOWER = {"tower": "features", "tower_limit": 5.0}


@pytest.fixture
def decided(monkeypatch):
    """Small towers, and what is decided about them."""
    monkeypatch.setattr(gate, "TOWER_STEPS", 150)
    monkeypatch.setattr(gate, "TOWER_HIDDEN", 4)
    monkeypatch.setitem(VIEWS, "quality", dataclasses.replace(VIEWS["quality"], hidden=4))

    def decide(better):
        monkeypatch.setattr(gate, "_is_better", lambda *_: better)

    return decide


def snr_norm_of(toy, flux):
    return np.linalg.norm(flux, axis=1) / np.linalg.norm(toy.error, axis=1)


@pytest.mark.parametrize("noise", ["closed-form", "sampled", "observed"])
@pytest.mark.usefixtures("quick")
def test_a_tower_with_a_limit_leaves_brighter_stars_alone(train_file, test_toy, quick_fit, decided, noise):
    decided(True)
    plain = quick_fit if noise == "closed-form" else fitted(train_file, **QUICK, noise=noise)
    fit = fitted(train_file, **QUICK, **TOWER, noise=noise)
    assert not plain.summary["cross_validation"]["tower_learnt"]
    assert fit.summary["cross_validation"]["tower_learnt"]
    assert (fit.mixture.tower.sees, fit.mixture.tower.limit) == ("features", 5)
    flux = test_toy.noisy()
    found, expected = (f.mixture.predict(flux, test_toy.error) for f in (fit, plain))
    snr_norm = snr_norm_of(test_toy, flux)
    beyond = snr_norm >= 5
    assert 100 < beyond.sum() < 900
    np.testing.assert_array_equal(found.log_g[beyond], expected.log_g[beyond])
    assert (found.log_g[snr_norm < 4.9] != expected.log_g[snr_norm < 4.9]).mean() > 0.9


@pytest.mark.usefixtures("quick")
def test_a_tower_that_is_no_better_is_left_out(train_file, decided):
    decided(False)
    for options in (TOWER, {"tower": "quality"}):
        fit = fitted(train_file, **QUICK, **options)
        assert fit.mixture.tower is None
        assert not fit.summary["cross_validation"]["tower_learnt"]


@pytest.mark.usefixtures("quick")
def test_a_tower_for_stars_that_there_are_not_is_left_out(train_file, decided):
    decided(True)
    fit = fitted(train_file, **QUICK, tower="features", tower_limit=0.5)
    assert fit.mixture.tower is None


@pytest.mark.usefixtures("quick")
def test_experts_by_snr_norm_and_a_gate_on_the_quality_features_alone(train_file, train_toy, decided):
    decided(False)
    edges = (5.0, 8.0, 14.0)
    fit = fitted(train_file, **QUICK | {"grid": SnrGrid(edges)}, tower="quality", first_tower=False)
    expected = np.hypot(np.linalg.norm(train_toy.flux, axis=1) / np.linalg.norm(train_toy.error, axis=1), 1)
    counts = np.bincount(SnrGrid(edges).assign(expected), minlength=4)
    assert [one["n"] for one in fit.summary["bins"].values()] == counts.tolist()
    assert (fit.mixture.gate[2] == 0).all()
    assert (fit.mixture.tower.sees, fit.mixture.tower.limit) == ("quality", np.inf)


@pytest.mark.usefixtures("quick")
def test_a_tower_is_fitted_on_a_view_of_ones_own(train_file, test_toy, decided, monkeypatch):
    decided(True)
    monkeypatch.setitem(VIEWS, "own", SHARE_OF_LOST_PIXELS)
    fit = fitted(train_file, **QUICK, tower="own")
    assert (fit.mixture.tower.sees, fit.mixture.tower.n_features) == ("own", SHARE_OF_LOST_PIXELS.n_features)
    assert np.isfinite(fit.mixture.predict(test_toy.noisy(), test_toy.error).log_g).all()


def test_a_gate_on_the_quality_features_knows_how_noisy_a_star_is(train_file, test_toy):
    fit = fitted(
        train_file,
        grid=SnrGrid((5.0, 8.0, 14.0)),
        sample_draws=1,
        references=False,
        tower="quality",
        first_tower=False,
    )
    found = fit.mixture.predict(test_toy.noisy(), test_toy.error)
    # The first expert was fitted on the noisiest stars, the last on those with the least noise.
    order = np.argsort(found.log_level)
    assert found.weights[order[-200:], 0].mean() > found.weights[order[:200], 0].mean() + 0.1


def test_faint_stars_are_made_of_all_stars_with_the_errors_of_faint_ones(train_file, train_toy, decided):
    data = rows_of(train_file, **QUICK, **TOWER)
    solved = first_pass(data)
    mixture = mixture_of(data, solved)
    found = draw_faint(data, mixture, solved.experts)
    n = mixture.n_gate
    assert found.seen.shape == (len(found.rows), 9 + n + 1)
    assert found.values.shape == found.logits.shape == (len(found.rows), 2)
    assert found.seen.dtype == found.logits.dtype == np.float32
    clean = np.hypot(np.linalg.norm(train_toy.flux, axis=1) / np.linalg.norm(train_toy.error, axis=1), 1)
    faint = clean <= 5
    assert 0.02 < faint.mean() < 0.5
    # Most stars are bright, and all of them take part.
    assert len(np.unique(found.rows)) > 0.9 * len(clean)
    shape = mixture.noise_shape.astype(np.float64)
    level = 0.5 * np.log((train_toy.error.astype(np.float64) ** 2 / shape).mean(1))
    assert found.seen[:, -1].min() > level[faint].min() - 1e-3
    again = draw_faint(data, mixture, solved.experts)
    np.testing.assert_array_equal(found.seen, again.seen)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tower": "error"}, "sees one of"),
        ({"tower": "quality", "tower_limit": 0.0}, "positive snr_norm"),
        ({"first_tower": False}, "needs a second one"),
        ({"first_tower": False, "tower": "quality", "tower_limit": 2.0}, "needs a second one"),
        ({"tower": "quality", "families": ("template",)}, "are for linear experts"),
        ({"grid": SnrGrid(), "families": ("template",)}, "are for linear experts"),
    ],
)
def test_towers_that_cannot_be_are_refused(options, match):
    with pytest.raises(InputError, match=match):
        Options(**options)


# --- networks --------------------------------------------------------------------------------------------------------


class _Untouched:
    """A set of spectra of which nothing but labels may be read."""

    def __init__(self, spectra):
        self._spectra = spectra

    def __getattr__(self, name):
        assert name != "blocks"
        return getattr(self._spectra, name)


@pytest.mark.parametrize(
    "lack",
    ["torch", *(pytest.param(lack, marks=pytest.mark.torch) for lack in ("safetensors", "memory", "device"))],
)
def test_what_a_network_lacks_is_known_before_the_first_pass(train_file, tmp_path, monkeypatch, lack):
    options = Options(families=("heads",), trunk="vit", sample_rows=600)
    checkpoint, device, error, match = None, "cpu", MoefastError, lack
    if lack == "torch":
        monkeypatch.setitem(sys.modules, "torch", None)
    if lack == "safetensors":
        checkpoint = Checkpoint(tmp_path)
        monkeypatch.setattr("moefast.trunks.training.find_spec", lambda name: None)
    if lack == "memory":
        monkeypatch.setattr("moefast.fitting.network.physical_memory", lambda: 1000)
        error, match = InputError, "training stars in memory"
    if lack == "device":
        device, error, match = "cuda", BackendError, "sees no GPU"
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(error, match=match):
        fit_mixture(_Untouched(open_spectra(train_file)), options, None, checkpoint, device)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"families": ("linear", "heads")}, "heads, posterior alone; found linear, heads"),
        ({"families": ("heads",), "trunk": "rnn"}, "a trunk is one of pca-mlp, cnn, vit"),
        ({"families": ("heads",), "size": "huge"}, "its size one of small, base"),
        ({"families": ("heads",), "steps": 0}, "its steps positive"),
        ({"families": ("heads",), "noise": "observed"}, "networks need clean training spectra"),
    ],
)
def test_networks_that_cannot_be_are_refused(options, match):
    with pytest.raises(InputError, match=match):
        Options(**options)
