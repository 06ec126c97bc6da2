"""The Fisher bound against closed forms and a dense inverse."""

from dataclasses import replace

import numpy as np
import pytest

from moefast.ceilings import fisher
from moefast.simulate import Settings, simulate_rows
from moefast.simulate.emulator import LABELS
from moefast.simulate.forward import ForwardModel


class Linear:
    """x = A θ + σ ε with five parameters: the bound is the diagonal of σ² (AᵀA)⁻¹."""

    def __init__(self, seed=0, p=60):
        self.matrix = np.random.default_rng(seed).standard_normal((5, p))
        self.matrix[1] += 2 * self.matrix[0]
        self.uniform = {name: (-1.0, 1.0 + i) for i, name in enumerate(LABELS)}
        self.calibration_shapes = None
        self.velocity_scatter = 0.0

    def derivatives(self, parameters):
        n = len(parameters["log_g"])
        return LABELS, np.broadcast_to(self.matrix, (n, *self.matrix.shape))


def test_linear_problem_without_prior():
    toy = Linear()
    sigma = np.linspace(0.5, 2.0, 60)
    names, matrices = fisher.information(toy, {"log_g": np.zeros(3)}, np.tile(sigma, (3, 1)))
    expected = np.linalg.inv((toy.matrix / sigma**2) @ toy.matrix.T)[1, 1]
    bare = fisher.prior_information(toy, names, labels=False)
    np.testing.assert_allclose(fisher.bounds(matrices, bare), expected, rtol=1e-8)


def test_linear_problem_with_prior():
    toy = Linear()
    names, matrices = fisher.information(toy, {"log_g": np.zeros(1)}, np.full((1, 60), 3.0))
    prior = fisher.prior_information(toy, names, labels=True)
    ranges = np.array([high - low for low, high in toy.uniform.values()])
    np.testing.assert_allclose(prior, 12 / ranges**2)
    expected = np.linalg.inv(toy.matrix @ toy.matrix.T / 9 + np.diag(12 / ranges**2))[1, 1]
    assert fisher.bounds(matrices, prior)[0] == pytest.approx(expected, rel=1e-8)


def test_unbiased_estimates_of_the_linear_problem_attain_the_bound():
    toy, rng = Linear(), np.random.default_rng(1)
    names, matrices = fisher.information(toy, {"log_g": np.zeros(1)}, np.ones((1, 60)))
    bound = fisher.bounds(matrices, fisher.prior_information(toy, names, labels=False))[0]
    noise = rng.standard_normal((20000, 60))
    estimates = np.linalg.lstsq(toy.matrix.T, noise.T, rcond=None)[0][1]
    assert estimates.var() == pytest.approx(bound, rel=5 * np.sqrt(2 / 20000))


def test_known_labels_cost_nothing():
    toy = Linear()
    names, matrices = fisher.information(toy, {"log_g": np.zeros(1)}, np.ones((1, 60)))
    del toy.uniform["T_eff"]
    known = fisher.bounds(matrices, fisher.prior_information(toy, names, labels=False))
    rest = [i for i in range(5) if i != 0]
    expected = np.linalg.inv((toy.matrix @ toy.matrix.T)[np.ix_(rest, rest)])[0, 0]
    assert known[0] == pytest.approx(expected, rel=1e-8)


def test_share_retained_falls_and_ends_at_the_bound():
    toy = Linear()
    names, matrices = fisher.information(toy, {"log_g": np.zeros(2)}, np.ones((2, 60)))
    bare = fisher.prior_information(toy, names, labels=False)
    shares = fisher.retained(matrices, names, bare, ("T_eff", "M_H", "C_M", "a_M"))
    assert (shares[:, 0] == 1).all()
    assert (np.diff(shares, axis=1) <= 1e-12).all()
    np.testing.assert_allclose(
        shares[:, -1] / fisher.bounds(matrices, bare) ** -1, 1 / matrices[:, 1, 1], rtol=1e-8
    )


def test_pixels_of_infinite_error_count_for_nothing():
    toy = Linear()
    error = np.ones((1, 60))
    error[0, 30:] = np.inf
    _, matrices = fisher.information(toy, {"log_g": np.zeros(1)}, error)
    half = toy.matrix[:, :30]
    np.testing.assert_allclose(matrices[0], half @ half.T)


def test_nuisances_cost_information_and_their_prior_limits_what_they_cost():
    settings = replace(Settings(), velocity_scatter=30.0, reddening=(0.0, 0.3), calibration=0.03)
    block = simulate_rows(0, 12, seed=2, settings=replace(Settings()))
    parameters = {name: block.params[name] for name in LABELS}
    parameters |= {name: np.zeros(12) for name in ("redshift", "ebv", "velocity")}
    bare, full = ForwardModel(Settings()), ForwardModel(settings)
    values = {}
    for key, forward in (("bare", bare), ("full", full)):
        names, matrices = fisher.information(forward, parameters, block.error)
        values[key] = fisher.bounds(matrices, fisher.prior_information(forward, names, labels=False))
    assert names[5:] == ("ebv", "velocity", *(f"calibration_{k}" for k in (1, 2, 3, 4)))
    assert (values["full"] > values["bare"]).all()
    assert (values["full"] < 10 * values["bare"]).all()


def test_more_noise_raises_the_bound_by_its_square():
    forward = ForwardModel(Settings())
    block = simulate_rows(0, 5, seed=4)
    parameters = {name: block.params[name] for name in LABELS}
    parameters |= {name: np.zeros(5) for name in ("redshift", "ebv", "velocity")}
    values = []
    for factor in (1.0, 3.0):
        names, matrices = fisher.information(forward, parameters, factor * block.error)
        values.append(fisher.bounds(matrices, fisher.prior_information(forward, names, labels=False)))
    np.testing.assert_allclose(values[1], 9 * values[0], rtol=1e-6)
