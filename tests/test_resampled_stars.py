"""Simulated stars in motion, put back to rest: log g, and whatever is fitted to lines, keeps its calibrated error."""

from __future__ import annotations

import numpy as np
import pytest

from moefast.kernels.resample import pixel_edges, resample
from moefast.model import Model
from moefast.simulate import Emulator, simulate_rows
from moefast.simulate.nuisance import LIGHT_SPEED, doppler

N = 800


@pytest.fixture(scope="module")
def at_rest():
    emulator = Emulator.load()
    block = simulate_rows(0, N, seed=77)
    labels = np.stack([block.params[name] for name in ("T_eff", "log_g", "M_H", "a_M", "C_M")], axis=1)
    padded = emulator.padded_flux(labels, np.empty((N, len(emulator.mean)), np.float32), first_row=0)
    noise = np.random.default_rng(5).standard_normal(block.flux.shape)
    return emulator.wave, block, padded, noise


def put_back(at_rest, velocity):
    """Stars that move before the same detector and sky, brought to rest."""
    wave, block, padded, noise = at_rest
    moved = doppler(padded, velocity, wave) + block.error * noise
    starts = np.arange(N + 1) * len(wave)
    bad = np.zeros(moved.size, bool)
    factor = 1 + velocity / LIGHT_SPEED
    return resample(wave, moved.ravel(), block.error.ravel(), bad, starts, factor, pixel_edges(wave))[:3]


def test_log_g_keeps_its_error_after_shifts_by_fractions_of_a_pixel(at_rest):
    """Half a pixel is 8 km/s; sky lines, which do not move along, stay where the model expects them."""
    mixture = Model.load("z0").mixture
    _, block, _, noise = at_rest
    still = mixture.predict(block.flux + (block.error * noise).astype(np.float32), block.error)
    moved = mixture.predict(*put_back(at_rest, np.random.default_rng(6).uniform(-8, 8, N)))
    truth = block.params["log_g"]
    shares = [np.mean(np.abs(found.log_g - truth) < found.log_g_err) for found in (still, moved)]
    assert shares[0] == pytest.approx(0.683, abs=0.03)
    assert shares[1] == pytest.approx(0.683, abs=0.03)
    assert shares[1] == pytest.approx(shares[0], abs=0.015)
    scatter = [np.sqrt(np.mean((found.log_g - truth) ** 2)) for found in (still, moved)]
    assert scatter[1] == pytest.approx(scatter[0], rel=0.03)


@pytest.mark.parametrize("largest", [8.0, 300.0])
def test_components_fitted_at_each_pixel_s_own_error_are_calibrated(largest, at_rest):
    """ẑ = (PᵀAP)⁻¹ PᵀA (x − m): the pulls have unit scatter, with sky lines wherever they come to lie."""
    block = at_rest[1]
    flux, error, mask = put_back(at_rest, np.random.default_rng(7).uniform(-largest, largest, N))
    mean = block.flux.mean(0, dtype=np.float64)
    clean = block.flux - mean
    basis = np.linalg.svd(clean[:300], full_matrices=False)[2][:12].T
    pulls = []
    for i in range(300, 550):
        weight = np.where(mask[i], 0, 1 / error[i].astype(np.float64) ** 2)
        truth = basis.T @ clean[i]
        beyond = clean[i] - basis @ truth
        seen = np.where(mask[i], 0, flux[i] - mean - beyond)
        inverse = np.linalg.inv((basis * weight[:, None]).T @ basis)
        pulls.append((inverse @ (basis.T @ (weight * seen)) - truth) / np.sqrt(np.diag(inverse)))
    # 3000 pulls: their scatter is known to 1.3 %.
    assert np.std(pulls) == pytest.approx(1, abs=0.04)
    assert np.mean(np.abs(pulls) < 1) == pytest.approx(0.683, abs=0.03)
