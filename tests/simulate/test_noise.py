"""The noise model: its formula, its sky against the exposure time calculator, its signal-to-noise ratios."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import quad

from moefast.core.errors import MoefastError
from moefast.simulate import Exposure, Instrument, NoiseModel, Sky, simulate_rows
from moefast.simulate.figures import calculator_model, read_calculator
from moefast.simulate.noise import (
    PHOTONS_AB0,
    RAYLEIGH,
    SKY_GROUPS,
    SkyFactors,
    airglow_lines,
    telluric_transmission,
)

CALCULATOR = Path(__file__).resolve().parents[3] / "shared" / "data" / "pfs_mr_etc.txt"
EDGES = 7100.0 + np.arange(4097) * (1750.0 / 4096)


@pytest.fixture(scope="module")
def model():
    return NoiseModel(EDGES)


@pytest.fixture(scope="module")
def calculator():
    if not CALCULATOR.exists():
        pytest.skip("the exposure time calculator's output is not in shared/data")
    return read_calculator(CALCULATOR)


def spectra(n, seed=0):
    rng = np.random.default_rng(seed)
    flux = rng.uniform(0.4, 1.2, (n, 4096)).astype(np.float32)
    return flux, rng.uniform(15.0, 25.0, n), rng.uniform(0.5, 1.5, n)


def test_errors_follow_the_formula(model):
    flux, mag, seeing = spectra(7)
    flux[3, 100:200] *= -1
    error, snr = model.error(flux, mag, seeing, noise_level=1.5)
    mean = flux.astype(float) @ model.band_weight
    electrons = (model.electrons_per_flux(mag, seeing) / mean)[:, None] * model.response
    variance = np.maximum(flux, 0) / electrons + model.sky_variance / electrons**2
    np.testing.assert_allclose(error, 1.5 * np.sqrt(variance), rtol=2e-6)
    np.testing.assert_allclose(snr, np.median(flux / error, axis=1), rtol=1e-6)
    assert error.dtype == np.float32
    assert snr.dtype == np.float64


@pytest.mark.parametrize("mag", [0.0, 38.0])
def test_no_magnitude_overflows(model, mag):
    flux, _, seeing = spectra(2)
    error, snr = model.error(flux, np.full(2, mag), seeing)
    assert np.all(np.isfinite(error) & (error > 0))
    assert np.all(np.isfinite(snr) & (snr > 0))


def test_rows_are_the_same_in_any_block(model):
    flux, mag, seeing = spectra(67)
    error, snr = model.error(flux, mag, seeing)
    for first, stop in ((0, 1), (5, 37), (66, 67)):
        part = model.error(flux[first:stop], mag[first:stop], seeing[first:stop])
        np.testing.assert_array_equal(part[0], error[first:stop])
        np.testing.assert_array_equal(part[1], snr[first:stop])
    assert model.error(flux[:0], mag[:0], seeing[:0])[0].shape == (0, 4096)


def test_the_scale_of_the_flux_does_not_matter(model):
    flux, mag, seeing = spectra(3)
    error, snr = model.error(flux, mag, seeing)
    scaled, same = model.error(8.0 * flux, mag, seeing)
    np.testing.assert_allclose(scaled, 8.0 * error, rtol=1e-6)
    np.testing.assert_allclose(same, snr, rtol=1e-6)


def test_bright_stars_have_photon_noise():
    model = NoiseModel(EDGES, sky=Sky(residual=0.0))
    longer = NoiseModel(EDGES, sky=Sky(residual=0.0), exposure=Exposure(900.0, 48))
    flux = np.ones((2, 4096), np.float32)
    _, snr = model.error(flux, np.array([12.0, 13.0]), np.array([0.8, 0.8]))
    assert snr[0] / snr[1] == pytest.approx(10**0.2, rel=0.01)
    faint = np.array([22.0, 23.0]), np.array([0.8, 0.8])
    np.testing.assert_allclose(longer.error(flux, *faint)[1], 2 * model.error(flux, *faint)[1], rtol=1e-3)


def test_the_error_of_sky_subtraction_is_not_averaged_out():
    one, sixteen = (NoiseModel(EDGES, exposure=Exposure(900.0, count)) for count in (1, 16))
    brightest = one.sky_electrons.argmax()
    assert one.sky_electrons[brightest] > 1e4
    ratio = sixteen.sky_variance[brightest] / one.sky_variance[brightest]
    assert 16 * 5 < ratio < 16**2


def test_public_arrays_are_read_only(model):
    assert model.band_weight.sum() == pytest.approx(1.0)
    for values in (model.response, model.sky_variance, model.sky_electrons, model.band_weight):
        assert values.dtype == np.float64
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 1.0


def test_the_fibre_holds_the_integral_of_the_profile():
    tool = Instrument(telescope_fwhm=0.0)
    beta = 4.765
    core = 0.8 / (2 * math.sqrt(2 ** (1 / beta) - 1))

    def light(radius):
        return quad(lambda r: 2 * math.pi * r * (1 + (r / core) ** 2) ** -beta, 0, radius)[0]

    assert tool.fibre_fraction(np.array(0.8)) == pytest.approx(
        light(tool.fibre_diameter / 2) / light(math.inf), rel=1e-6
    )
    fraction = Instrument().fibre_fraction(np.array([0.01, 0.5, 0.75, 1.5]))
    assert np.all(np.diff(fraction) < 0)


def test_airglow_lines_are_where_others_saw_them():
    wave, intensity = airglow_lines()
    assert np.all(np.diff(wave) >= 0)
    assert intensity.min() >= 0.3
    air = wave / 1.0002745
    # Osterbrock et al. (1996, PASP 108, 277), Å in air: strong OH lines of six bands.
    for observed in (
        7276.405,
        7340.885,
        7750.640,
        7821.503,
        7913.708,
        7993.332,
        8344.602,
        8430.174,
        8827.096,
    ):
        nearest = np.abs(air - observed).argmin()
        assert abs(air[nearest] - observed) < 0.06
        assert intensity[nearest] > 30


def test_the_sky_keeps_the_photons_of_its_lines():
    tool = Instrument(efficiency_curvature=0.0, scattered=0.0)
    dark, bright = (NoiseModel(EDGES, instrument=tool, sky=Sky(lines=lines)) for lines in (0.0, 1.0))
    electrons = (bright.sky_electrons - dark.sky_electrons).sum()
    wave, intensity = airglow_lines()
    inside = (wave > EDGES[0]) & (wave < EDGES[-1])
    collected = tool.area * tool.efficiency * tool.vignetting * 12 * 900.0
    expected = collected * math.pi * (tool.fibre_diameter / 2) ** 2 * RAYLEIGH * intensity[inside].sum()
    assert electrons == pytest.approx(expected, rel=2e-3)
    narrow = NoiseModel(np.linspace(7960.0, 7961.0, 3), instrument=tool, sky=Sky(lines=0.0))
    continuum = collected * math.pi * (tool.fibre_diameter / 2) ** 2 * PHOTONS_AB0 / 7960.5
    assert narrow.sky_electrons.sum() == pytest.approx(
        continuum * 10 ** (-0.4 * (Sky().continuum - Sky().continuum_slope * 0.0145)), rel=1e-4
    )


def test_telluric_bands_take_light_of_the_star(model):
    wave = 0.5 * (EDGES[1:] + EDGES[:-1])
    transmission = telluric_transmission(wave)
    assert transmission.max() == 1.0
    assert 0.25 < transmission.min() < 0.35
    clear = model.response / (model.instrument.throughput(wave) * wave)
    np.testing.assert_allclose(clear / clear.max(), transmission, rtol=1e-9)


def test_sky_and_detector_follow_the_exposure_time_calculator(calculator):
    ours = calculator_model(calculator.wave_edges).sky_variance
    ratio = ours / calculator.variance
    low, median, high = np.percentile(ratio, [5, 50, 95])
    assert low > 0.85
    assert 0.97 < median < 1.03
    assert high < 1.15
    assert np.corrcoef(np.log(ours), np.log(calculator.variance))[0, 1] > 0.99


def test_the_calculator_has_our_detector_and_our_formula(calculator):
    # One exposure of 1200 s of its own sky, through our terms; its 1 % is coherent over three exposures.
    tool = calculator_model(calculator.wave_edges).instrument
    beside = np.pad(calculator.sky, 1)
    brightest = np.max([beside[:-2], beside[1:-1], beside[2:]], axis=0)
    detector = tool.trace_rows * (tool.read_noise**2 + tool.dark * 1200.0)
    formula = calculator.sky + 3 * (0.01 * brightest) ** 2 + detector + tool.scattered * calculator.sky.mean()
    np.testing.assert_allclose(formula[1:-1], calculator.variance[1:-1], rtol=2e-3)


def test_the_response_to_a_star_follows_the_calculator(calculator):
    # Counts per unit f_nu; the calculator's source is a galaxy of 0.3 arcsec, of which 0.418 enters the fibre.
    ours = calculator_model(calculator.wave_edges)
    wave = 0.5 * (calculator.wave_edges[1:] + calculator.wave_edges[:-1])
    inside = ours.band_weight > 0
    pivot2 = wave[inside].sum() / np.sum(1.0 / wave[inside])
    per_f_nu = ours.response * pivot2 / wave**2 / 3.631e-20
    ratio = 0.418 * per_f_nu / calculator.counts_per_f_nu
    low, median, high = np.percentile(ratio, [10, 50, 90])
    assert low > 0.93
    assert 0.98 < median < 1.02
    assert high < 1.07


def test_signal_to_noise_is_the_published_one():
    block = simulate_rows(0, 4000, seed=5)
    percentiles = np.percentile(block.params["snr"], [5, 25, 50, 75, 95])
    np.testing.assert_allclose(percentiles, [3.71, 5.29, 8.21, 12.53, 17.22], rtol=0.1)
    snr_norm = np.linalg.norm(block.flux, axis=1) / np.linalg.norm(block.error, axis=1)
    assert 2.6 < np.median(snr_norm) < 3.2
    assert 0.7 < snr_norm.min() < 1.3
    assert 8.0 < snr_norm.max() < 11.0


def test_arguments_are_checked(model):
    flux, mag, seeing = spectra(2)
    with pytest.raises(MoefastError, match=r"flux.*4096"):
        model.error(flux[:, :-1], mag, seeing)
    with pytest.raises(MoefastError, match="flux"):
        model.error(flux, mag[:1], seeing[:1])
    with pytest.raises(MoefastError, match="wave_edges"):
        NoiseModel(np.linspace(4000.0, 5000.0, 100))
    with pytest.raises(MoefastError, match="exposure"):
        Exposure(0.0, 1)


# --- a sky of another brightness ---------------------------------------------------------------------------


def ones(n):
    return SkyFactors(np.ones(n), np.ones((n, len(SKY_GROUPS))))


@pytest.fixture(scope="module")
def stars():
    """Twenty stars of z0 with the factors of a random sky."""
    block = simulate_rows(0, 20, seed=4)
    return block, SkyFactors.draw(np.arange(20), seed=9)


def test_the_parts_are_the_sky(model):
    parts = model.continuum_electrons + model.line_electrons.sum(axis=0)
    np.testing.assert_allclose(parts, model.sky_electrons, rtol=1e-12)
    assert (model.line_electrons.sum(axis=1) > 0).all()
    np.testing.assert_allclose(
        model.scaled_sky_variance(ones(2)), np.tile(model.sky_variance, (2, 1)), rtol=1e-12
    )


def test_a_sky_as_it_was_changes_nothing(stars, model):
    block, _ = stars
    found, _ = model.error(block.flux, block.params["mag"], block.params["seeing"], factors=ones(20))
    np.testing.assert_allclose(found, block.error, rtol=1e-6)


def test_errors_under_another_sky_are_those_of_a_model_with_that_sky(stars, model):
    """All lines three times and the continuum twice as bright: a noise model of its own says what must come out."""
    block, _ = stars
    brighter = NoiseModel(EDGES, sky=Sky(continuum=Sky().continuum - 2.5 * np.log10(2.0), lines=3.0))
    expected, _ = brighter.error(block.flux, block.params["mag"], block.params["seeing"])
    factors = SkyFactors(np.full(20, 2.0), np.full((20, len(SKY_GROUPS)), 3.0))
    found, _ = model.error(block.flux, block.params["mag"], block.params["seeing"], factors=factors)
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_one_group_moves_its_own_lines_only(stars, model):
    block, _ = stars
    factors = ones(20)
    group = SKY_GROUPS.index("OH 6-2")
    factors.lines[:, group] = 4.0
    found, _ = model.error(block.flux, block.params["mag"], block.params["seeing"], factors=factors)
    ratio = found / block.error
    dark = model.line_electrons[group] == 0
    # The scattered light of the brighter lines reaches every pixel.
    assert ratio[:, dark].max() < 1.03
    assert ratio[:, model.line_electrons[group].argmax()].min() > 1.5


def test_factors_belong_to_a_row_and_have_their_scatter():
    many = SkyFactors.draw(np.arange(4000), seed=2)
    some = SkyFactors.draw(np.array([3999, 5]), seed=2)
    np.testing.assert_array_equal(some.lines, many.lines[[3999, 5]])
    np.testing.assert_array_equal(some.continuum, many.continuum[[3999, 5]])
    assert np.log(many.continuum).std() == pytest.approx(0.3, rel=0.05)
    assert np.log(many.lines).std(axis=0) == pytest.approx(np.full(len(SKY_GROUPS), 0.5), rel=0.06)
    correlation = np.corrcoef(np.log(np.column_stack([many.continuum, many.lines])).T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.08
