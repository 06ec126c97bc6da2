"""A posterior fitted to simulated stars: right with gaps, on any scale, with honest errors that betray nothing."""

from dataclasses import replace

import numpy as np
import pytest

from moefast.cli.fit import tell_model
from moefast.core.errors import InputError
from moefast.core.grids import PHYSICAL_GRID
from moefast.core.metrics import r2
from moefast.core.random import add_noise
from moefast.fitting import Options, correction, fit_mixture
from moefast.fitting.noisy_stars import GAP_KINDS, with_errors_of_others
from moefast.model import Model
from moefast.posterior import PosteriorMixture
from moefast.posterior.further_clouds import BLEND_SHARE
from moefast.predicting.columns import columns_of
from moefast.protocol.scenarios import SCENARIOS, _stars
from moefast.simulate.emulator import Emulator
from moefast.simulate.gaps import GAPS
from moefast.simulate.source import SimulatedSpectra
from moefast.spectra.quality import Flag

N_TEST = 600


@pytest.fixture(scope="module")
def fitted():
    options = Options(
        grid=PHYSICAL_GRID, families=("posterior",), references=False, n_clouds=60, n_tangents=3,
        slope_widths=(0.05, 0.03), calibrated=(0.5, 0.3, 0.1), sky_width=4.0, sample_draws=3, beyond=True,
        n_blends=48,
    )  # fmt: skip
    return fit_mixture(SimulatedSpectra.of_set("z0", rows=(0, 5000)), options)


@pytest.fixture(scope="module")
def model(fitted):
    training = {"log_g_std": 1.15, "labels": {"log_g": [1, 5], "T_eff": [3750, 6000], "M_H": [-2.5, 0.75]}}
    return Model.of_mixture(
        fitted.mixture, {}, recipe="posterior", grid=PHYSICAL_GRID, training=training, summary=fitted.summary
    )


@pytest.fixture(scope="module")
def stars():
    spectra = SimulatedSpectra.of_set("z0", part="validation", rows=(0, N_TEST))
    block = next(iter(spectra.blocks(N_TEST, array="noisy")))
    return block.flux, block.error, spectra.labels(("log_g",))["log_g"], spectra.wave


def test_a_fit_is_a_posterior_that_says_what_it_is(fitted):
    found, summary = fitted.mixture, fitted.summary
    assert isinstance(found, PosteriorMixture)
    assert (found.n_experts, found.n_foreign, found.blends, found.label_names[0]) == (9, 2, True, "log_g")
    assert found.n_nuisances == 2 + found.n_sky > 2
    share = np.exp(found.log_weights.astype(float))
    singles = slice(0, found.first[9])
    inside = found.labels[singles, 1] < 6000
    assert not inside.all()
    assert np.isclose(share[singles][inside].sum(), 1, atol=1e-5)
    assert np.isclose(share[found.first[9] : found.first[10]].sum(), BLEND_SHARE, atol=1e-6)
    checked = summary["cross_validation"]
    assert set(checked["coverage_by_gap"]) <= set(GAP_KINDS)
    assert summary["library"]["slope_widths"] == [0.05, 0.03]
    assert summary["library"]["calibrated"] == pytest.approx([0.5, 0.3, 0.1])


@pytest.mark.parametrize(
    ("gap", "least"), [("none", 0.6), ("telluric", 0.5), ("random 28 %", 0.5), ("Ca II alone", 0.4)]
)
def test_gaps_cost_information_and_no_calibration(fitted, stars, gap, least):
    flux, error, log_g, wave = stars
    lost = GAPS[gap](wave, np.arange(N_TEST), 3)
    found = fitted.mixture.predict(flux, error, lost)
    assert r2(log_g, found.log_g) > least
    apart = np.abs(found.log_g - log_g) / found.log_g_err
    # Three standard errors of a share of 600 stars.
    assert np.mean(apart < 1) == pytest.approx(0.68, abs=0.06)
    assert np.mean(apart < 1.96) == pytest.approx(0.95, abs=0.03)


@pytest.fixture(scope="module")
def linear():
    options = Options(
        grid=PHYSICAL_GRID, families=("posterior",), references=False, n_gravity_bins=4, n_tangents=6, sample_draws=3
    )  # fmt: skip
    return fit_mixture(SimulatedSpectra.of_set("z0", rows=(0, 5000)), options)


def test_linear_experts_are_right_with_gaps_and_calibrated_over_them(linear, stars):
    flux, error, log_g, wave = stars
    assert linear.mixture.first.tolist() == [*range(0, 37, 4), 37]
    apart = []
    for gap, least in {"none": 0.65, "telluric": 0.6, "random 28 %": 0.6, "Ca II alone": 0.5}.items():
        found = linear.mixture.predict(flux, error, GAPS[gap](wave, np.arange(N_TEST), 3))
        assert r2(log_g, found.log_g) > least, gap
        apart.append(np.abs(found.log_g - log_g) / found.log_g_err)
    # Draws of a star with one noise and several gaps are one draw, nearly: three standard errors of 600 stars.
    assert np.mean(np.array(apart) < 1) == pytest.approx(0.68, abs=0.06)
    assert np.mean(np.array(apart) < 1.96) == pytest.approx(0.95, abs=0.03)


def test_the_scale_of_the_flux_changes_the_scale_alone(fitted, stars):
    flux, error, _, _ = (a[:50] for a in stars)
    plain = fitted.mixture.predict(flux, error)
    # A power of two is exact.
    found = fitted.mixture.predict(flux * np.float32(2.0**-40), error * np.float32(2.0**-40))
    np.testing.assert_array_equal(found.log_g, plain.log_g)
    np.testing.assert_allclose(found.scale, plain.scale * 2.0**-40, rtol=1e-12)


@pytest.fixture(scope="module")
def learnt():
    """Few clouds, and a network beside them."""
    options = Options(
        grid=PHYSICAL_GRID, families=("posterior",), references=False, n_clouds=40, n_tangents=2, n_coordinates=32,
        slope_widths=(0.05, 0.03), sample_draws=3, n_blends=10, correction_draws=25_000,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(correction, "LEAST_ROWS", 1000)
        return fit_mixture(SimulatedSpectra.of_set("z0", rows=(0, 5000)), options)


def test_a_correction_learns_what_clouds_leave_out(learnt, stars):
    flux, error, log_g, wave = stars
    summary = learnt.summary["correction"]
    assert (summary["kept"], summary["draws"], summary["stars"]) == (True, 15 * 1660, 1660)
    assert summary["gain_r2"] > 2 * summary["gain_r2_error"] > 0
    plain = replace(learnt.mixture, correction=())
    for gap in ("none", "telluric"):
        lost = GAPS[gap](wave, np.arange(N_TEST), 3)
        found, before = (one.predict(flux, error, lost) for one in (learnt.mixture, plain))
        assert r2(log_g, found.log_g) > r2(log_g, before.log_g) + 0.005, gap
        assert np.abs(found.log_g - before.log_g).max() <= before.log_g_err_raw.max()
        # Nothing else has changed.
        np.testing.assert_array_equal(found.labels, before.labels)
        np.testing.assert_array_equal(found.log_g_err_raw, before.log_g_err_raw)
    apart = np.abs(found.log_g - log_g) / found.log_g_err
    assert np.mean(apart < 1) == pytest.approx(0.68, abs=0.06)


def test_a_fit_says_what_became_of_its_correction(learnt, capsys):
    training = {"log_g_std": 1.15, "notes": []}
    model = Model.of_mixture(
        learnt.mixture, {}, recipe="posterior", grid=PHYSICAL_GRID, training=training, summary=learnt.summary
    )
    told = learnt.summary["correction"]
    gain = f"R² {told['measured_gain_r2']:+.4f} ± {told['measured_gain_r2_error']:.4f}"
    rows = {"used": 5000, "left_out": 0}
    for kept, words in (
        (
            True,
            f"a network corrects log g, learnt from 24,900 noisy draws of 1,660 stars: {gain} on stars that",
        ),
        (False, f"a network to correct log g was tried, does not help ({gain}), and is left out"),
    ):
        facts = learnt.summary | {
            "rows": rows,
            "seconds": 1.0,
            "backend": "cpu",
            "correction": told | {"kept": kept},
        }
        tell_model(facts, model, "model", quiet=False, as_json=False)
        assert words in capsys.readouterr().out
    tell_model(facts | {"correction": {}}, model, "model", quiet=False, as_json=False)
    assert "log g" not in capsys.readouterr().out


def test_a_correction_is_left_out_where_it_does_not_help_or_cannot_learn(fitted, monkeypatch):
    assert "correction" not in fitted.summary
    assert not fitted.mixture.correction
    assert correction.planned_draws(2_000_000, 66_667) == 29
    assert correction.planned_draws(2_000_000, 1000) == 0
    assert correction.planned_draws(0, 66_667) == 0
    monkeypatch.setattr(correction, "LEAST_ROWS", 1000)
    monkeypatch.setattr(correction, "STANDARD_ERRORS", 1e3)
    options = Options(
        grid=PHYSICAL_GRID, families=("posterior",), references=False, n_clouds=20, n_tangents=2, n_coordinates=8,
        sample_draws=1, correction_draws=1000,
    )  # fmt: skip
    found = fit_mixture(SimulatedSpectra.of_set("z0", rows=(0, 1500)), options)
    assert not found.summary["correction"]["kept"]
    assert not found.mixture.correction


def test_draws_of_a_correction_have_the_errors_of_other_stars(fitted):
    spectra = SimulatedSpectra.of_set("z0", rows=(0, 40))
    block = next(iter(spectra.blocks(40, array="flux")))
    rows, flux, error = (
        np.arange(40),
        block.flux * np.linspace(1, 3, 40, dtype=np.float32)[:, None],
        block.error,
    )
    error[:, :100] = np.where(np.arange(40)[:, None] == 7, 0, error[:, :100])
    found = with_errors_of_others(fitted.mixture, flux, error, rows, seed=1)
    level = flux @ fitted.mixture.reference
    other = [
        int(np.argmin(np.abs(found[i] / level[i] - error / level[:, None])[:, 100:].sum(1))) for i in rows
    ]
    assert sorted(other) == rows.tolist()
    assert (np.array(other) != rows).all()
    # Bad pixels are those of either star.
    np.testing.assert_array_equal(
        (found == 0).all(1) | (found[:, :100] == 0).all(1), np.isin(other, 7) | (rows == 7)
    )
    relative = error[other] / level[other, None] * level[:, None]
    np.testing.assert_allclose(found[:, 100:], relative[:, 100:], rtol=1e-4)
    np.testing.assert_array_equal(
        with_errors_of_others(fitted.mixture, flux[:1], error[:1], rows[:1], 1), error[:1]
    )


@pytest.mark.parametrize("made", ["fitted", "linear", "learnt"])
def test_errors_tell_nothing_of_log_g(made, stars, request):
    """σ holds the star's own photons; it may weigh the flux, never speak: here all stars have the same flux."""
    fitted = request.getfixturevalue(made)
    flux, error, log_g, _ = stars
    same = np.repeat(fitted.mixture.reference[None], N_TEST, axis=0)
    known = np.corrcoef(error.mean(1) / flux.mean(1), log_g)[0, 1] ** 2
    from_errors = fitted.mixture.predict(same, error)
    assert np.corrcoef(from_errors.log_g, log_g)[0, 1] ** 2 < 0.05
    # What a straight line, and a parabola, of all that a user sees makes of stars of the same flux, each with noise of
    # its own errors. Without noise even differences in the last digits would be read: standardised, they are all.
    noisy = fitted.mixture.predict(add_noise(same, error, 7, np.arange(N_TEST)), error)
    seen = np.column_stack([noisy.log_g, noisy.labels, np.log(noisy.log_g_err)])
    seen = (seen - seen.mean(0)) / seen.std(0)
    half = np.arange(N_TEST) % 2 == 0
    for columns in (seen, np.column_stack([seen, seen**2])):
        columns = np.column_stack([np.ones(N_TEST), columns])
        line = np.linalg.lstsq(columns[half], log_g[half], rcond=None)[0]
        assert r2(log_g[~half], columns[~half] @ line) < 0.05, f"the level of the errors alone: {known:.3f}"


def test_what_is_no_star_is_flagged(model, stars):
    flux, error, _, wave = stars
    unlike = np.uint32(Flag.UNLIKE_TRAINING)
    error = error[:200] / np.median(flux[:200], axis=1, keepdims=True)
    body = np.repeat(((wave / 7975) ** -2.5)[None], 200, axis=0).astype(np.float32)
    rows = np.arange(200)
    cases = {
        "no lines": add_noise(body, error, 5, rows),
        "noise": add_noise(np.zeros_like(body), error, 6, rows),
        "zeros": np.zeros_like(body),
        "constant": np.ones_like(body),
    }
    for name, x in cases.items():
        columns = columns_of(model, *model.mixture.score(x, error))
        assert np.mean(columns["flag"] > 0) > 0.7, name
    columns = columns_of(
        model, *model.mixture.score(flux[:200], error * np.median(flux[:200], axis=1)[:, None])
    )
    assert np.mean(columns["flag"] & unlike > 0) < 0.05


def test_stars_hotter_than_the_training_set_are_flagged(model):
    """Stars of 6250 to 6750 K, as one of the scenarios has them; without clouds beyond, half of them pass."""
    spectra = SCENARIOS["outside the labels"].make(next(_stars(150, Emulator.load())))
    columns = columns_of(model, *model.mixture.score(spectra.flux, spectra.error))
    flagged = columns["flag"] & np.uint32(Flag.OUT_OF_GRID) > 0
    assert np.mean(flagged) > 0.7
    silent = (columns["flag"] == 0) & (np.abs(columns["log_g"] - spectra.log_g) > 3 * columns["log_g_err"])
    assert np.mean(silent) < 0.04


def test_blends_are_known_and_their_errors_hold(fitted, model, stars):
    """Three tenths of the light are another star's, of stars three times as bright."""
    _, error, log_g, _ = stars
    spectra = SimulatedSpectra.of_set("z0", part="validation", rows=(0, N_TEST))
    clean = next(iter(spectra.blocks(N_TEST, array="flux"))).flux
    error = error / 3
    single = add_noise(clean, error, 5, np.arange(N_TEST))
    both = (0.7 * clean + 0.3 * np.roll(clean, 1, axis=0)).astype(np.float32)
    both = add_noise(both, error, 6, np.arange(N_TEST))
    never = fitted.mixture.log_weights.copy()
    never[fitted.mixture.first[9] : fitted.mixture.first[10]] = -50
    found, alone = (
        mixture.predict(both, error)
        for mixture in (fitted.mixture, replace(fitted.mixture, log_weights=never))
    )
    usual = fitted.mixture.predict(single, error)
    assert np.mean(found.blend) > 2 * np.mean(usual.blend)
    np.testing.assert_allclose(found.weights.sum(1) + found.foreign + found.blend, 1, atol=1e-6)
    assert r2(log_g, found.log_g) > r2(log_g, alone.log_g) + 0.02
    beyond = [np.mean(np.abs(one.log_g - log_g) > 3 * one.log_g_err) for one in (found, alone)]
    assert beyond[0] < 0.7 * beyond[1]
    assert np.mean(found.blend > 0.5) > 5 * np.mean(usual.blend > 0.5)
    np.testing.assert_array_equal(columns_of(model, *model.mixture.score(both, error))["blend"], found.blend)


def test_errors_too_small_are_flagged(model, stars):
    flux, error, _, _ = (a[:100] for a in stars)
    columns = columns_of(model, *model.mixture.score(flux, error / 2))
    assert (columns["flag"] & np.uint32(Flag.UNLIKE_TRAINING) > 0).all()


def test_bad_rows_spoil_no_neighbours(fitted, stars):
    flux, error, _, _ = (a[:40].copy() for a in stars)
    plain = fitted.mixture.predict(flux, error)
    flux[3], error[7], flux[11, 1:] = np.nan, 0, np.nan
    found = fitted.mixture.predict(flux, error)
    others = np.setdiff1d(np.arange(40), [3, 7, 11])
    for name in ("log_g", "log_g_err", "labels", "distance", "foreign"):
        np.testing.assert_array_equal(getattr(found, name)[others], getattr(plain, name)[others])
    assert np.isfinite(found.log_g[11])
    # One pixel says nothing of log g.
    assert found.log_g_err[11] > 0.9


def test_errors_of_one_value(fitted):
    """The same error in every pixel of every star, and noise that is as large."""
    spectra = SimulatedSpectra.of_set("z0", part="validation", rows=(0, N_TEST))
    clean = next(iter(spectra.blocks(N_TEST, array="flux"))).flux
    error = np.full_like(clean, 0.15)
    found = fitted.mixture.predict(add_noise(clean, error, 9, np.arange(N_TEST)), error)
    log_g = spectra.labels(("log_g",))["log_g"]
    assert r2(log_g, found.log_g) > 0.5
    assert np.mean(np.abs(found.log_g - log_g) < found.log_g_err) == pytest.approx(0.68, abs=0.08)


def test_all_calcium_lines_lost(fitted, stars):
    """The strongest lines are gone: less is known, and the errors say so."""
    flux, error, log_g, wave = stars
    lost = (np.abs(wave[:, None] - np.array([8500.4, 8544.4, 8664.5])) < 20).any(1)
    assert 0.04 < lost.mean() < 0.08
    plain = fitted.mixture.predict(flux, error)
    found = fitted.mixture.predict(flux, error, np.repeat(lost[None], N_TEST, axis=0))
    assert 0.4 < r2(log_g, found.log_g) < r2(log_g, plain.log_g)
    assert np.median(found.log_g_err) > np.median(plain.log_g_err)
    assert np.mean(np.abs(found.log_g - log_g) < found.log_g_err) == pytest.approx(0.68, abs=0.06)


def test_options_that_cannot_be(fitted):
    for wrong in (
        {"slope_widths": (0.0,)}, {"calibrated": (0.5, 0.1)}, {"slope_widths": (0.1,), "calibrated": (1.0, 0.1)},
        {"slope_widths": (0.1, 0.1), "calibrated": (0.5, 0.1)},
        {"slope_widths": (0.1,), "calibrated": (0.5, 0.0)}, {"n_clouds": 0}, {"n_blends": -1},
        {"families": ("linear", "posterior")},
    ):  # fmt: skip
        with pytest.raises(InputError):
            replace(Options(families=("posterior",)), **wrong)
