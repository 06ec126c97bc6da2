"""Perceptron, softmax and mixing against their references and scikit-learn's layers."""

import numpy as np
import pytest
from sklearn.neural_network import MLPRegressor
from tolerances import assert_close

from moefast.kernels import perceptron, soft_mix
from moefast.kernels.reference import perceptron_reference, soft_mix_reference


def layers(n_in, hidden, n_out, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(n_in, hidden), (hidden,), (hidden, n_out), (n_out,)]
    return tuple((scale * rng.standard_normal(shape)).astype(np.float32) for shape in shapes)


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 1009])
@pytest.mark.parametrize(("n_in", "hidden", "n_out"), [(14, 64, 9), (1, 1, 1), (17, 3, 2)])
def test_gate_and_perceptron_match_their_references(n, n_in, hidden, n_out):
    rng = np.random.default_rng(n)
    features = rng.standard_normal((n, n_in)).astype(np.float32)
    values = rng.uniform(1, 5, (n, n_out)).astype(np.float32)
    net = layers(n_in, hidden, n_out)
    assert_close(perceptron(features, *net), perceptron_reference(features, *net))
    gate, mixed = soft_mix(features, values, *net)
    expected_gate, expected_mixed = soft_mix_reference(features, values, *net)
    assert gate.dtype == mixed.dtype == np.float32
    # Logits of order 10 carry a float32 rounding of 1e-6 each into the exponential.
    assert_close(gate, expected_gate, factor=3)
    assert_close(mixed, expected_mixed, factor=3)
    assert_close(gate.sum(1), np.ones(n))


def test_the_reference_is_scikit_learns_perceptron():
    rng = np.random.default_rng(3)
    features = rng.standard_normal((50, 4))
    net = [a.astype(np.float64) for a in layers(4, 6, 3)]
    judge = MLPRegressor(hidden_layer_sizes=(6,), activation="tanh", max_iter=2, solver="lbfgs")
    with pytest.warns(Warning, match="lbfgs failed to converge"):
        judge.fit(features, rng.standard_normal((50, 3)))
    judge.coefs_, judge.intercepts_ = [net[0], net[2]], [net[1], net[3]]
    assert_close(perceptron_reference(features, *net), judge.predict(features))


def test_large_logits_neither_overflow_nor_lose_the_sum():
    features = np.array([[1.0], [-1.0], [0.0]], np.float32)
    w1, b1 = np.full((1, 1), 20, np.float32), np.zeros(1, np.float32)
    w2, b2 = np.array([[1e4, -1e4, 0]], np.float32), np.zeros(3, np.float32)
    values = np.array([[1, 2, 3]] * 3, np.float32)
    gate, mixed = soft_mix(features, values, w1, b1, w2, b2)
    assert_close(gate, [[1, 0, 0], [0, 1, 0], [1 / 3, 1 / 3, 1 / 3]])
    assert_close(mixed, [1, 2, 2])
    expected_gate, expected_mixed = soft_mix_reference(features, values, w1, b1, w2, b2)
    assert_close(gate, expected_gate)
    assert_close(mixed, expected_mixed)


def test_a_row_has_the_same_bits_alone_and_a_bad_row_keeps_to_itself():
    rng = np.random.default_rng(5)
    features = rng.standard_normal((65, 14)).astype(np.float32)
    values = rng.uniform(1, 5, (65, 9)).astype(np.float32)
    net = layers(14, 64, 9)
    gate, mixed = soft_mix(features, values, *net)
    out = perceptron(features, *net)
    features[20] = np.nan
    spoiled_gate, spoiled_mixed = soft_mix(features, values, *net)
    assert np.isnan(spoiled_mixed[20])
    for i in np.delete(np.arange(65), 20):
        one = slice(i, i + 1)
        alone_gate, alone_mixed = soft_mix(features[one], values[one], *net)
        np.testing.assert_array_equal(alone_gate, gate[one])
        np.testing.assert_array_equal(alone_mixed, mixed[one])
        np.testing.assert_array_equal(perceptron(features[one], *net), out[one])
        np.testing.assert_array_equal(spoiled_gate[one], gate[one])


def test_shapes_are_checked():
    net = layers(3, 4, 2)
    with pytest.raises(ValueError, match="features"):
        perceptron(np.zeros((5, 2), np.float32), *net)
    with pytest.raises(ValueError, match="features"):
        soft_mix(
            np.zeros((5, 3), np.float32), np.zeros((5, 2), np.float32), *net[:3], np.zeros(3, np.float32)
        )
    with pytest.raises(ValueError, match=r"values must have shape \(5, 2\)"):
        soft_mix(np.zeros((5, 3), np.float32), np.zeros((5, 3), np.float32), *net)
