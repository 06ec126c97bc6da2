"""The study of a metal-poor head: networks differ in it alone, gains are paired."""

import numpy as np
import pytest

from moefast.benchmarks.studies import metal_poor_head as study
from moefast.core.grids import PHYSICAL_GRID
from moefast.core.metrics import r2
from moefast.experts.protocol import Inputs
from moefast.trunks import training


@pytest.fixture(scope="module")
def stars():
    """Two components tell T_eff and [M/H]; a third tells log g, with another sign where stars are metal-poor."""
    torch = pytest.importorskip("torch")
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    n = 600
    t_eff, m_h, log_g = rng.uniform(3750, 6000, n), rng.uniform(-2.5, 0.5, n), rng.uniform(1, 5, n)
    sign = np.where(m_h < -1, -1, 1)
    z = np.column_stack([t_eff / 1000 - 5, 2 * m_h + 2, (log_g - 3) * sign]).astype(np.float32)
    level, lines = np.full(n, -3, np.float32), np.zeros((n, 9), np.float32)
    poor = PHYSICAL_GRID.metal_poor
    scales = training.scales_of(log_g, level, rng.normal(size=(99, 9)), np.array([-4.0, -2.0]), poor)
    covariance = 0.01 * np.eye(15)
    yield study.Stars(
        training.StarsInComponents(
            torch, "cpu", z, np.ones((n, 12), np.float32), level, covariance, np.ones(4, np.float32), 0.05
        ),
        training.Labels(log_g, np.column_stack([t_eff, m_h]), PHYSICAL_GRID.assign(t_eff, m_h)),
        training.Judges({"z": z, "lines": lines, "log_level": level[:, None]}, log_g),
        scales | {"variance": z.var(0)}, Inputs(z, level, lines), log_g, m_h,
    )  # fmt: skip
    torch.set_num_threads(usual)


@pytest.mark.torch
@pytest.mark.parametrize("head", ["added", "own weight"])
def test_networks_differ_in_the_metal_poor_head_alone(stars, head):
    log_g, weights = study.with_head(stars, head, 0, 50)
    assert r2(stars.truth, log_g) > 0.5
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    poor = stars.m_h < -1
    if head == "own weight":
        # The tenth expert is one for the metal-poor.
        assert weights.shape == (len(poor), 10)
        assert weights[poor, -1].mean() > 3 * weights[~poor, -1].mean()
    else:
        assert weights.shape == (len(poor), 9)


def test_gains_are_those_of_r2_and_paired():
    rng = np.random.default_rng(1)
    truth, noise = rng.uniform(1, 5, 4000), rng.standard_normal(4000)
    one, other = [truth + s * noise for s in (0.5, 0.6)], [truth + s * noise for s in (0.4, 0.5)]
    value, error = study.gain(truth, one, other)
    expected = np.mean([r2(truth, b) - r2(truth, a) for a, b in zip(one, other, strict=True)])
    assert value == pytest.approx(expected)
    alone = np.std(np.mean([noise**2 * 0.25, noise**2 * 0.36], axis=0)) / np.sqrt(4000) / truth.var()
    assert 0 < error < 0.5 * alone
    assert study.gain(truth, one, one) == (0, 0)
