"""The emulator: grid, physics, derivatives, refusals."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from moefast.core.errors import MoefastError
from moefast.simulate import LABELS, Emulator
from moefast.simulate.emulator import ROWS_PER_TILE, SCHEMA, coordinates, matern52, polynomial_terms


@pytest.fixture(scope="module")
def emulator():
    return Emulator.load()


def inside(n, seed=0):
    low, high = np.array(list(Emulator.load().limits.values())).T
    return low + (high - low) * np.random.default_rng(seed).uniform(0.02, 0.98, (n, 5))


def equivalent_width(wave, flux, centre, half_width=20.0):
    line = np.abs(wave - centre) < half_width
    side = ~line & (np.abs(wave - centre) < half_width + 10.0)
    return float(np.sum(1.0 - flux[line] / np.median(flux[side])) * (wave[1] - wave[0]))


def test_wave_grid_is_the_producers(emulator):
    np.testing.assert_allclose(emulator.wave_edges, np.linspace(7100.0, 8850.0, 4097), rtol=0, atol=1e-9)
    np.testing.assert_allclose(emulator.wave[[0, -1]], [7100.2136, 8849.7864], atol=1e-4)
    assert tuple(emulator.limits) == LABELS


def test_flux_is_positive_with_median_one(emulator):
    flux = emulator.flux(inside(500))
    assert flux.dtype == np.float32
    assert flux.shape == (500, 4096)
    assert flux.min() > 0.0
    deviation = np.abs(np.median(flux, axis=1) - 1.0)
    assert np.median(deviation) < 1e-3
    assert deviation.max() < 1e-2


def test_bits_do_not_depend_on_the_block(emulator):
    labels = inside(2 * ROWS_PER_TILE + 37)
    whole = emulator.flux(labels)
    for first, stop in ((0, 1), (5, 13), (1, 2 * ROWS_PER_TILE + 37), (ROWS_PER_TILE - 1, ROWS_PER_TILE + 1)):
        part = emulator.flux(labels[first:stop], first_row=first)
        np.testing.assert_array_equal(part, whole[first:stop])
    out = np.empty_like(whole)
    assert emulator.flux(labels, out, first_row=2**40 * ROWS_PER_TILE) is out
    np.testing.assert_array_equal(out, whole)
    assert emulator.flux(labels[:0]).shape == (0, 4096)


def test_the_number_of_threads_changes_nothing(emulator, monkeypatch):
    labels = inside(300)
    flux, slopes = emulator.flux(labels), emulator.derivatives(labels[:70])
    monkeypatch.setattr("moefast.core.threads.CORES", 5)
    np.testing.assert_array_equal(emulator.flux(labels), flux)
    np.testing.assert_array_equal(emulator.derivatives(labels[:70]), slopes)


def test_agrees_with_the_formula_in_float64(emulator, shipped_arrays):
    labels = inside(50, seed=3)
    data = shipped_arrays
    x = (coordinates(labels) - data["centre"]) / data["half_range"]
    distance = np.linalg.norm((x[:, None] - data["nodes"]) / data["scales"], axis=2)
    c = polynomial_terms(data["powers"], x) @ data["polynomial"] + matern52(distance) @ data["weights"]
    expected = data["mean"] + c @ data["basis"]
    np.testing.assert_allclose(emulator.coefficients(labels), c, rtol=0, atol=1e-8)
    np.testing.assert_allclose(emulator.padded_flux(labels), expected, rtol=0, atol=3e-6)
    np.testing.assert_allclose(
        emulator.mean + emulator.coefficients(labels) @ emulator.basis, expected, rtol=0, atol=1e-8
    )


def test_coefficients_from_several_threads(emulator):
    labels = inside(400, seed=4)
    expected = emulator.coefficients(labels)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(emulator.coefficients, [labels] * 8):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_the_margin_lies_beyond_the_pixels(emulator, wide):
    labels = inside(20, seed=5)
    m = wide.margin
    cut = slice(m, 4096 - m)
    assert (m, len(wide.mean), len(wide.wave)) == (32, 4096, 4096 - 64)
    np.testing.assert_array_equal(wide.wave, emulator.wave[cut])
    # Flux of order one as a sum of so many terms in single precision; BLAS adds them in another order where a product
    # is narrower, and in which one depends on the machine.
    rounding = len(wide.basis) * np.finfo(np.float32).eps / 2
    np.testing.assert_allclose(wide.padded_flux(labels), emulator.flux(labels), rtol=0, atol=rounding)
    np.testing.assert_allclose(wide.flux(labels), emulator.flux(labels)[:, cut], rtol=0, atol=rounding)
    slopes = wide.derivatives(labels, padded=True)
    np.testing.assert_allclose(slopes, emulator.derivatives(labels), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(wide.derivatives(labels), slopes[..., cut], rtol=1e-9, atol=1e-12)
    assert wide.sha256 != emulator.sha256


@pytest.mark.parametrize("label", range(5))
def test_derivatives_match_central_differences(emulator, label):
    labels = inside(12, seed=label)
    step = (8.0, 0.02, 0.02, 0.01, 0.01)[label]
    up, down = labels.copy(), labels.copy()
    up[:, label] += step
    down[:, label] -= step
    numeric = (emulator.flux(up).astype(float) - emulator.flux(down)) / (2 * step)
    analytic = emulator.derivatives(labels)[:, label]
    # Float32 flux limits the difference to 1e-7 / step, curvature to step^2.
    scale = np.abs(analytic).max(axis=1)
    assert np.all(np.abs(numeric - analytic).max(axis=1) < 0.03 * scale + 2e-7 / step)


def test_coordinates_are_finite_and_know_carbon_stars():
    x = coordinates(inside(2000))
    assert np.isfinite(x).all()
    oxygen_rich, carbon_rich = coordinates(
        np.array([[3800.0, 4.0, 0.0, 0.0, 0.0], [3800.0, 4.0, 0.0, 0.0, 0.5]])
    )
    assert oxygen_rich[5] > carbon_rich[5] + 1.0
    assert oxygen_rich[6] < carbon_rich[6] - 1.0


def test_calcium_triplet_weakens_from_giants_to_dwarfs(emulator):
    labels = np.array([[5000.0, log_g, 0.0, 0.0, 0.0] for log_g in (1, 2, 3, 4, 5)])
    width = [
        sum(equivalent_width(emulator.wave, flux, centre) for centre in (8544.44, 8664.52))
        for flux in emulator.flux(labels)
    ]
    assert width[0] > width[1] > width[2] > width[3]
    # Another group's grid gives 14.1, 10.8, 8.6, 7.6, 7.7 Å; continuum definitions differ by 1-2 Å.
    np.testing.assert_allclose(width, [14.1, 10.8, 8.6, 7.6, 7.7], rtol=0.25)


def test_lines_strengthen_with_metals_and_alpha(emulator):
    poor, rich, alpha = emulator.flux(
        np.array([[5000, 2, -2, 0, 0], [5000, 2, 0, 0, 0], [5000, 2, -2, 0.4, 0]], dtype=float)
    )
    wave = emulator.wave
    assert equivalent_width(wave, rich, 8544.44) > 2 * equivalent_width(wave, poor, 8544.44)
    assert equivalent_width(wave, alpha, 8544.44) > 1.1 * equivalent_width(wave, poor, 8544.44)


def test_titanium_oxide_in_cool_stars_only_and_cn_with_carbon(emulator):
    cool, hot, plain, carbon = emulator.flux(
        np.array(
            [[3800, 4.5, 0, 0, 0], [5000, 4.5, 0, 0, 0], [4500, 1.5, 0, 0, 0], [4500, 1.5, 0, 0, 0.3]], float
        )
    )
    band = (emulator.wave > 7127) & (emulator.wave < 7160)
    clear = (emulator.wave > 7480) & (emulator.wave < 7580)
    assert cool[band].mean() / cool[clear].mean() < 0.85 * hot[band].mean() / hot[clear].mean()
    cn = (emulator.wave > 7895) & (emulator.wave < 7990)
    below = (emulator.wave > 7780) & (emulator.wave < 7865)
    assert carbon[cn].mean() / carbon[below].mean() < plain[cn].mean() / plain[below].mean() - 0.01


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[5000.0, 2.0, 0.0, 0.0]], "shape"),
        ([[6500.0, 2.0, 0.0, 0.0, 0.0]], "T_eff of row 0 is 6500"),
        ([[5000.0, np.nan, 0.0, 0.0, 0.0]], "log_g"),
    ],
)
def test_refuses_bad_labels(emulator, labels, message):
    with pytest.raises(MoefastError, match=message):
        emulator.flux(np.array(labels))


def test_refuses_bad_out_and_unknown_schema(emulator, shipped_arrays):
    with pytest.raises(MoefastError, match="out"):
        emulator.flux(inside(2), np.empty((2, 4096)))
    with pytest.raises(MoefastError, match=f"schema {SCHEMA}"):
        Emulator.from_arrays({"schema": np.array(99)})
    arrays = shipped_arrays
    with pytest.raises(MoefastError, match="do not fit"):
        Emulator.from_arrays(arrays | {"wave_edges": arrays["wave_edges"][1:]})
    with pytest.raises(MoefastError, match="too short"):
        Emulator.from_arrays(arrays | {"scales": arrays["scales"] / 50})


def test_provenance_names_sources(emulator):
    text = " ".join(emulator.provenance.values())
    assert "MARCS" in text
    assert "lines.csv" in text
    assert "held" in " ".join(emulator.provenance)
