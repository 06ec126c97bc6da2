"""The emulator: grid, physics, derivatives, refusals."""

import numpy as np
import pytest

from moefast.errors import MoefastError
from moefast.simulate import LABELS, Emulator
from moefast.simulate.emulator import SCHEMA, coordinates


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
    labels = inside(37)
    whole = emulator.flux(labels)
    for first, stop in ((0, 1), (5, 13), (31, 37)):
        np.testing.assert_array_equal(emulator.flux(labels[first:stop]), whole[first:stop])
    out = np.empty_like(whole)
    assert emulator.flux(labels[::-1], out) is out
    np.testing.assert_array_equal(out, whole[::-1])
    assert emulator.flux(labels[:0]).shape == (0, 4096)


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


def test_refuses_bad_out_and_unknown_schema(emulator):
    with pytest.raises(MoefastError, match="out"):
        emulator.flux(inside(2), np.empty((2, 4096)))
    with pytest.raises(MoefastError, match=f"schema {SCHEMA}"):
        Emulator.from_arrays({"schema": np.array(99)})


def test_provenance_names_sources(emulator):
    text = " ".join(emulator.provenance.values())
    assert "MARCS" in text
    assert "lines.csv" in text
    assert "held" in " ".join(emulator.provenance)
