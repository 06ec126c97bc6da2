"""Stars that look like a user's spectra have their pixels, noise, gaps and signal-to-noise ratios."""

import numpy as np
import pytest
from astropy.io import fits
from click.testing import CliRunner
from survey_files import write_desi, write_pfs_many

from moefast.cli import cli
from moefast.core.errors import InputError, MoefastError, WaveGridError
from moefast.core.grids import PHYSICAL_GRID
from moefast.fitting import Options, fit_mixture
from moefast.model import Model
from moefast.predicting.files import predict
from moefast.simulate import Emulator, Observed, Settings, SimulatedSpectra, simulate_rows
from moefast.simulate.observed import simulate_observed
from moefast.simulate.spectrograph import Spectrograph
from moefast.spectra.quality import Flag
from moefast.spectra.shard import Shard
from moefast.spectra.telluric import telluric_pixels

WAVE_R, WAVE_Z = 5760 + 0.8 * np.arange(2326), 7520 + 0.8 * np.arange(2881)
N = 40


def spectra_on(wave, seed=3):
    """Flux, errors and masks of stars whose noise has a shape of its own, at SNR 3 to 30."""
    rng = np.random.default_rng(seed)
    shape = 1 + 0.5 * np.sin(wave / 40) ** 2 + (np.abs(wave - 7750) < 5)
    snr = np.exp(rng.uniform(np.log(3), np.log(30), N))
    flux = np.ones((N, len(wave))) * 7.0
    error = flux * shape / np.median(shape) / snr[:, None]
    mask = rng.random((N, len(wave))) < 0.02
    return flux, error, mask


@pytest.fixture(scope="module")
def desi(tmp_path_factory):
    path = tmp_path_factory.mktemp("like") / "coadd.fits"
    arms, masks = {}, {}
    for arm, wave in (("R", WAVE_R), ("Z", WAVE_Z)):
        flux, error, masks[arm] = spectra_on(wave)
        arms[arm] = (wave, flux, error)
    write_desi(path, arms, mask=masks)
    with fits.open(path, mode="append") as file:
        for arm, wave, power in (("R", WAVE_R, 4400), ("Z", WAVE_Z, 4600)):
            sigma = wave / power / 2.354820045 / 0.8
            offset = np.arange(-5, 6)[:, None]
            bands = np.exp(-0.5 * (offset / sigma) ** 2)
            # Normalised, and as wide as it should be in spite of the few pixels.
            bands /= bands.sum(0)
            file.append(fits.ImageHDU(np.repeat(bands[None], N, 0).astype("f4"), name=f"{arm}_RESOLUTION"))
    return path


@pytest.fixture(scope="module")
def observed(desi):
    return Observed.of_files(desi)


def test_the_grid_is_the_files_as_far_as_the_emulator_reaches(observed):
    expected = np.concatenate([WAVE_R, WAVE_Z[WAVE_R[-1] + 0.4 < WAVE_Z]])
    inside = (expected > 7101) & (expected < 8849)
    assert set(expected[inside].round(6)) <= set(observed.wave.round(6)) <= set(expected.round(6))
    assert np.all(np.diff(observed.wave) > 0)
    assert Emulator.load().wave_edges[0] - 4 < observed.wave[0]
    assert observed.wave[-1] < Emulator.load().wave_edges[-1] + 4


def test_the_resolution_is_that_of_the_file_at_most_the_emulators(observed, desi):
    fwhm = observed.spectrograph.fwhm
    blue, red = observed.wave < WAVE_R[-1], observed.wave > WAVE_R[-1] + 1
    np.testing.assert_allclose(observed.wave[blue] / fwhm[blue], 4400, rtol=0.01)
    np.testing.assert_allclose(observed.wave[red] / fwhm[red], 4600, rtol=0.01)
    assert "as the file has it" in observed.name
    wider = Observed.of_files(desi, resolution="3000")
    np.testing.assert_allclose(wider.wave / wider.spectrograph.fwhm, 3000)
    # A line of a simulated star is as wide as that.
    centre = 8000.0
    fine = wider.spectrograph.fine_wave
    line = np.exp(-0.5 * ((fine - centre) / (centre / 5000 / 2.354820045)) ** 2)[None].astype("f4")
    seen = wider.spectrograph.observe(line)[0]
    near = np.abs(wider.wave - centre) < 10
    variance = (seen * (wider.wave - centre) ** 2)[near].sum() / seen[near].sum() - 0.8**2 / 12
    assert 2.354820045 * np.sqrt(variance) == pytest.approx(centre / 3000, rel=0.03)


def test_gaps_and_noise_are_those_of_rows_of_the_file(observed):
    assert observed.error.shape == observed.lost.shape == (N, len(observed.wave))
    absorbed = telluric_pixels(observed.wave)
    assert observed.lost[:, absorbed].all()
    assert observed.lost[:, ~absorbed].mean() == pytest.approx(0.02, abs=0.01)
    block = simulate_observed(0, 500, seed=5, observed=observed)
    row = block.params["observed_row"]
    np.testing.assert_array_equal(block.mask, observed.lost[row])
    # The shape of the errors is the row's, the level follows the signal-to-noise ratio.
    ratio = block.error / observed.error[row]
    np.testing.assert_allclose(ratio / ratio[:, :1], 1, rtol=1e-5)
    assert len(np.unique(row)) > 0.9 * N


def test_signal_to_noise_ratios_are_distributed_as_in_the_file(observed):
    snr = simulate_observed(0, 4000, seed=5, observed=observed, noisy=False).params["snr"]
    known = np.sort(observed.snr)
    assert 0.02 <= observed.scatter <= 0.3
    # Two samples of so many rows: the distance that chance exceeds in one case of a thousand, blur added.
    place = np.searchsorted(np.sort(snr), known) / len(snr)
    assert np.abs(place - (np.arange(N) + 0.5) / N).max() < 1.95 / np.sqrt(N) * 0.5
    assert np.median(snr) == pytest.approx(np.median(known), rel=0.25)
    np.testing.assert_allclose(known[[0, -1]], [3, 30], rtol=0.3)


def test_stars_that_move_fast_are_observed_like_any_row(observed):
    settings = Settings(velocity_scatter=5, fast_share=0.35, fast_scatter=40)
    params = simulate_observed(0, 3000, seed=5, observed=observed, settings=settings, noisy=False).params
    fast = np.abs(params["velocity"]) > 20
    assert 0.15 < fast.mean() < 0.3
    place = params["observed_row"] / len(observed.snr)
    # Four standard errors of the mean of uniform numbers.
    assert np.mean(place[fast]) == pytest.approx(np.mean(place), abs=4 * np.sqrt(1 / 12 / fast.sum()))


def test_errors_say_nothing_of_the_labels(observed):
    one, other = (
        simulate_observed(0, 50, seed=5, observed=observed, settings=settings, noisy=False)
        for settings in (Settings(), Settings(log_g=(1, 1.1), t_eff=(3800, 3900)))
    )
    np.testing.assert_array_equal(one.error, other.error)
    assert np.abs(one.flux - other.flux).max() > 0.1


def test_noise_is_as_large_as_the_errors_say(observed):
    block = simulate_observed(0, 300, seed=5, observed=observed)
    apart = ((block.noisy - block.flux) / block.error)[~block.mask]
    assert np.std(apart) == pytest.approx(1, abs=0.01)
    level = np.array([np.median(flux[~bad]) for flux, bad in zip(block.flux, block.mask, strict=True)])
    np.testing.assert_allclose(level, 1, rtol=1e-5)


def test_stars_are_those_of_the_survey_and_independent_of_their_block(observed):
    whole = simulate_observed(0, 300, seed=5, observed=observed, settings=Settings(velocity_scatter=20))
    part = simulate_observed(131, 140, seed=5, observed=observed, settings=Settings(velocity_scatter=20))
    for name in ("flux", "error", "noisy", "mask"):
        np.testing.assert_array_equal(getattr(whole, name)[131:140], getattr(part, name))
    plain = simulate_rows(0, 300, seed=5, settings=Settings(velocity_scatter=20), noisy=False)
    for name in ("T_eff", "log_g", "velocity"):
        np.testing.assert_array_equal(plain.params[name], whole.params[name])
    # On the emulator's own pixels the flux is the survey's, to the last bit but for its level.
    own = Observed(
        Spectrograph(Emulator.load(), Emulator.load().wave), np.ones((1, 4096), "f4"), np.zeros((1, 4096), bool),
        np.ones(1), "own", "", [], [],
    )  # fmt: skip
    same = simulate_observed(0, 20, seed=5, observed=own, settings=Settings(velocity_scatter=20), noisy=False)
    ratio = same.flux / plain.flux[:20]
    np.testing.assert_allclose(ratio / ratio[:, :1], 1, rtol=4 * np.finfo("f4").eps)


def test_sky_and_rows_without_a_star_do_not_count(tmp_path):
    wave = np.linspace(7101, 8849, 3000)
    flux, error, _ = spectra_on(wave)
    kinds = np.ones(N, int)
    kinds[3], flux[5] = 2, -flux[5]
    error[7] = np.nan
    path = write_pfs_many(tmp_path / "pfs.fits", wave, flux, error, target_type=kinds)
    found = Observed.of_files(path)
    assert len(found.snr) == N - 3
    assert any(f"3 of {N} rows" in note for note in found.notes)
    assert any("does not tell its resolution" in note for note in found.notes)
    np.testing.assert_allclose(found.wave, wave, rtol=1e-9)
    with pytest.raises(InputError, match=r"pfs0\.fits: none of 40 rows looked at is a star"):
        Observed.of_files(
            write_pfs_many(tmp_path / "pfs0.fits", wave, -flux, error, target_type=np.full(N, 2))
        )


def test_files_elsewhere_are_refused_and_bad_ones_left_out(tmp_path, desi):
    wave = np.linspace(4000, 6900, 3000)
    flux, error, _ = spectra_on(wave)
    blue = write_desi(tmp_path / "blue.fits", {"B": (wave, flux, error)})
    with pytest.raises(
        WaveGridError, match=r"blue\.fits: has 4000.0 to 6900.0 Å, and no pixels between 7096"
    ):
        Observed.of_files(blue)
    broken = tmp_path / "a.fits"
    broken.write_bytes(desi.read_bytes()[:100_000])
    found = Observed.of_files([broken, desi])
    assert len(found.snr) == N
    assert "a.fits" in str(found.failures[0].error)
    with pytest.raises(InputError, match=r"a\.fits: truncated"):
        Observed.of_files(broken)
    with pytest.raises(MoefastError, match="beyond the detector allow"):
        SimulatedSpectra(5, seed=1, observed=found, settings=Settings(velocity_scatter=100))


def test_the_commands_write_and_refuse(tmp_path, desi):
    out = tmp_path / "out.h5"
    run = CliRunner().invoke(
        cli,
        ["simulate", str(out), "-n", "30", "--seed", "4", "--like", str(desi), "--resolution", "3.5A"],
    )
    assert run.exit_code == 0, run.output
    assert "like coadd.fits, resolution 3.5A" in run.output
    shard, expected = Shard(out), Observed.of_files(desi, resolution="3.5A")
    np.testing.assert_array_equal(shard.wave, expected.wave)
    block = simulate_observed(0, 30, seed=4, observed=expected)
    np.testing.assert_array_equal(shard.read("noisy", 0, 30), block.noisy)
    np.testing.assert_array_equal(shard.read("mask", 0, 30), block.mask)
    for options, words in (
        (["--resolution", "4000"], "--like names"),
        (["--like", str(desi), "--mag", "20", "21"], "--mag"),
        (["--like", str(desi), "--set", "z0", "--part", "test_1k"], "--like"),
    ):
        run = CliRunner().invoke(
            cli, ["simulate", str(tmp_path / "x.h5"), *(["-n", "3", "--seed", "1"] if "--set" not in options else []),
                  *options]
        )  # fmt: skip
        assert run.exit_code == 2
        assert words in run.output
    run = CliRunner().invoke(cli, ["fit", str(out), "-o", str(tmp_path / "m"), "--like", str(desi)])
    assert run.exit_code == 2
    assert "--simulate N" in run.output


def test_a_model_for_an_arm_without_the_gates_lines_predicts_its_file(tmp_path):
    """The R arm alone: no Ca II, no Na I, another resolution."""
    wave = 5760 + 0.8 * np.arange(2326)
    flux, error, mask = spectra_on(wave)
    path = write_desi(tmp_path / "r.fits", {"R": (wave, flux, error / 3)}, mask={"R": mask})
    observed = Observed.of_files(path, resolution="4000", telluric="keep")
    spectra = SimulatedSpectra.like(observed, 2000, whole=True)
    assert "mask" not in spectra.arrays
    assert next(iter(spectra.gaps)) == "as observed"
    options = Options(
        grid=PHYSICAL_GRID,
        families=("posterior",),
        references=False,
        n_clouds=30,
        n_tangents=3,
        sample_draws=2,
    )
    fitted = fit_mixture(spectra, options)
    assert fitted.summary["cross_validation"]["coverage_by_gap"].keys() <= {
        "as observed", "none", "random", "block", "edges"
    }  # fmt: skip
    training = {"log_g_std": 1.15, "labels": {"log_g": [1, 5], "T_eff": [3750, 6000], "M_H": [-2.5, 0.75]}}
    model = Model.of_mixture(
        fitted.mixture, {}, recipe="posterior", grid=PHYSICAL_GRID, training=training, summary=fitted.summary
    ).save(tmp_path / "model")
    # Stars of the same kind, in a file of the survey.
    block = simulate_observed(50_000, 50_040, seed=71_001, observed=observed)
    where = np.searchsorted(wave, observed.wave - 0.1)
    flux[:], error[:], mask[:] = 1, 1, True
    flux[:, where], error[:, where], mask[:, where] = block.noisy, block.error, block.mask
    stars = write_desi(tmp_path / "stars.fits", {"R": (wave, flux, error)}, mask={"R": mask})
    found = predict(stars, model, telluric="keep")
    assert np.isfinite(found.columns["log_g"]).all()
    apart = np.abs(found.columns["log_g"] - block.params["log_g"]) / found.columns["log_g_err"]
    assert 0.4 < np.mean(apart < 1) < 0.9
    assert np.mean((found.columns["flag"] & int(Flag.UNLIKE_TRAINING)) != 0) < 0.3
