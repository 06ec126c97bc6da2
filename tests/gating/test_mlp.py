"""The perceptron: its gradients, its folded form, and toys whose answer is known."""

import numpy as np
import pytest
from tolerances import assert_close

from moefast.gating import mlp
from moefast.gating.mlp import Perceptron, fit_error_model, fit_gate, softmax
from moefast.kernels.reference import perceptron_reference


def held(n):
    return np.arange(n) % 5 == 0


def random_net(n_in=14, hidden=8, n_out=3, seed=0):
    rng = np.random.default_rng(seed)
    return Perceptron(
        rng.normal(2, 1, n_in),
        rng.uniform(0.1, 3, n_in),
        rng.standard_normal((n_in, hidden)) / 3,
        rng.standard_normal(hidden),
        rng.standard_normal((hidden, n_out)),
        rng.standard_normal(n_out),
    )


def test_folded_layers_take_raw_features():
    net = random_net()
    features = np.random.default_rng(1).normal(2, 2, (200, 14))
    assert_close(perceptron_reference(features, *net.folded()), net(features))


def test_softmax_survives_large_logits():
    gate = softmax(np.array([[1e4, 0, -1e4], [-1e4, -1e4, -1e4], [1.0, 2.0, 3.0]]))
    assert_close(gate[:2], [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]])
    assert_close(gate[2], np.exp([1, 2, 3]) / np.exp([1, 2, 3]).sum())


@pytest.mark.parametrize("which", ["gate", "error model"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_gradients_are_those_of_finite_differences(which, decay, monkeypatch):
    monkeypatch.setattr(mlp, "PIECE_ROWS", 16)
    rng = np.random.default_rng(4)
    n, n_out = 50, (3 if which == "gate" else 1)
    layers = mlp.Layers(4, 5, n_out)
    y = rng.standard_normal(n)
    loss = mlp._gate_loss(rng.standard_normal((n, 3)), y) if which == "gate" else mlp._error_loss(y)
    x, rows = rng.standard_normal((n, 4)).astype(np.float32), rng.permutation(n)[:37]

    def value(theta):
        return mlp.penalised_loss(theta, layers, x, rows, loss, decay, gradient=False)[0]

    for _ in range(3):
        theta = 0.7 * rng.standard_normal(4 * 5 + 5 + 5 * n_out + n_out)
        found, gradient = mlp.penalised_loss(theta, layers, x, rows, loss, decay)
        assert found == value(theta)
        direction = rng.standard_normal((20, theta.size))
        # The loss is float32: steps of 1e-2 leave rounding of 1e-5 and, by Richardson's rule, no curvature.
        slopes = [
            [(value(theta + h * d) - value(theta - h * d)) / (2 * h) for d in direction] for h in (0.01, 0.02)
        ]
        numerical = (4 * np.array(slopes[0]) - np.array(slopes[1])) / 3
        np.testing.assert_allclose(direction @ gradient, numerical, atol=2e-3 * np.linalg.norm(gradient))


def test_the_loss_is_the_mean_over_rows_plus_the_penalty():
    rng = np.random.default_rng(0)
    values, y, x = rng.uniform(1, 5, (30, 3)), rng.uniform(1, 5, 30), rng.standard_normal((30, 14))
    net = random_net()
    layers = mlp.Layers(14, 8, 3)
    theta = layers.pack(net.w1, net.b1, net.w2, net.b2)
    for a, b in zip(layers.unpack(theta), (net.w1, net.b1, net.w2, net.b2), strict=True):
        np.testing.assert_array_equal(a, b)
    rows = np.arange(0, 30, 2)
    out = perceptron_reference(x, net.w1, net.b1, net.w2, net.b2)
    penalty = 0.05 * (np.sum(net.w1**2) + np.sum(net.w2**2))
    mixed = (softmax(out) * values).sum(1)
    found, _ = mlp.penalised_loss(theta, layers, x.astype(np.float32), rows, mlp._gate_loss(values, y), 0.1)
    assert_close(found, np.mean((mixed - y)[rows] ** 2) + penalty, made_in=np.float32)
    layers = mlp.Layers(14, 8, 1)
    theta = layers.pack(net.w1, net.b1, net.w2[:, :1], net.b2[:1])
    expected = np.mean((out[:, 0] + 0.5 * y**2 * np.exp(-2 * out[:, 0]))[rows]) + 0.05 * (
        np.sum(net.w1**2) + np.sum(net.w2[:, :1] ** 2)
    )
    found, _ = mlp.penalised_loss(theta, layers, x.astype(np.float32), rows, mlp._error_loss(y), 0.1)
    assert_close(found, expected, made_in=np.float32)


def two_experts(n, seed=0):
    """Experts that are right in one half of the feature space each and wrong by about 1 dex in the other."""
    rng = np.random.default_rng(seed)
    features = rng.uniform(-1, 1, (n, 3)) * [1, 10, 0.1] + [0, 5, 0]
    y = rng.uniform(1, 5, n)
    wrong = rng.normal(0, 1, n)
    left = features[:, 0] < 0
    noise = rng.normal(0, 0.2, (n, 2))
    values = y[:, None] + noise + np.column_stack([np.where(left, 0, wrong), np.where(left, wrong, 0)])
    oracle = np.where(left, values[:, 0], values[:, 1])
    return features, values, y, oracle


def test_a_gate_learns_which_expert_is_right_where():
    features, values, y, _ = two_experts(4000)
    net = fit_gate(features, values, y, held(4000), hidden=16, max_iterations=200)
    features, values, y, oracle = two_experts(4000, seed=1)
    gate = softmax(net(features))
    error = np.mean(((gate * values).sum(1) - y) ** 2)
    best = np.mean((oracle - y) ** 2)
    assert best < 0.2 * np.mean((values.mean(1) - y) ** 2)
    assert error < 1.08 * best
    assert np.mean(gate.argmax(1) == (features[:, 0] >= 0)) > 0.97


def heteroscedastic(n, seed):
    rng = np.random.default_rng(seed)
    features = rng.uniform(-1, 1, (n, 4)) + 3
    sigma = 0.1 * np.exp(0.8 * (features[:, 0] - 3) + 0.5 * np.sin(3 * (features[:, 1] - 3)))
    return features, sigma, sigma * rng.standard_normal(n)


def test_the_error_model_recovers_a_known_sigma():
    features, _, residual = heteroscedastic(12_000, 0)
    net = fit_error_model(features, residual, held(12_000), hidden=8, max_iterations=100)
    features, sigma, _ = heteroscedastic(2000, 1)
    ratio = np.exp(net(features)[:, 0]) / sigma
    assert sigma.max() > 5 * sigma.min()
    assert np.sqrt(np.mean((ratio - 1) ** 2)) < 0.05
    assert np.quantile(np.abs(ratio - 1), 0.95) < 0.10


def test_an_error_model_of_exact_predictions_is_small_and_finite():
    net = fit_error_model(np.random.default_rng(0).standard_normal((50, 2)), np.zeros(50), held(50), hidden=3)
    assert (np.exp(net(np.zeros((1, 2)))) < 0.01).all()


def test_the_same_seed_gives_the_same_net_and_another_seed_another():
    features, values, y, _ = two_experts(500)
    options = {"hidden": 4, "max_iterations": 20}
    one, two = (fit_gate(features, values, y, held(500), **options) for _ in range(2))
    other = fit_gate(features, values, y, held(500), seed=1, **options)
    for name in ("mean", "scale", "w1", "b1", "w2", "b2"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert not np.array_equal(one.w1, other.w1)


def test_the_net_kept_is_the_best_on_the_rows_held_back():
    rng = np.random.default_rng(0)
    # Pure noise: more iterations fit it, and the rows held back must notice.
    features, values, y = (
        rng.standard_normal((150, 10)),
        rng.standard_normal((150, 3)),
        rng.standard_normal(150),
    )
    back = held(150)

    def error(net, rows):
        return np.mean(((softmax(net(features)) * values).sum(1) - y)[rows] ** 2)

    short = [fit_gate(features, values, y, back, decay=0, max_iterations=m) for m in (1, 2, 5, 200)]
    errors = [error(net, back) for net in short]
    assert errors == sorted(errors, reverse=True)
    assert error(short[-1], back) < 1.05 * error(short[0], back)


@pytest.mark.parametrize("value", [np.log(1e-4), 0.1, 0.0, -300.1])
@pytest.mark.parametrize("spread", [0.0, 1e-7])
def test_a_constant_feature_is_ignored_in_float32_too(value, spread):
    features, values, y, _ = two_experts(1000)
    rng = np.random.default_rng(0)
    constant = value * (1 + spread * rng.standard_normal(1000))
    with_constant = np.column_stack([features, constant])
    net = fit_gate(with_constant, values, y, held(1000), hidden=6, max_iterations=50)
    expected = net(with_constant)
    folded = [a.astype(np.float32) for a in net.folded()]
    assert max(np.abs(a).max() for a in folded) < 1e4
    assert_close(
        perceptron_reference(with_constant.astype(np.float32), *folded),
        expected,
        made_in=np.float32,
        factor=10,
    )
    with_constant[:, 3] += 5
    assert_close(net(with_constant), expected)


@pytest.mark.parametrize("back", [np.zeros(20, bool), np.ones(20, bool)])
def test_rows_on_both_sides_are_needed(back):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="rows to fit and rows held back"):
        fit_gate(rng.standard_normal((20, 2)), rng.standard_normal((20, 2)), rng.standard_normal(20), back)
    with pytest.raises(ValueError, match="rows to fit and rows held back"):
        fit_error_model(rng.standard_normal((20, 2)), rng.standard_normal(20), back)


@pytest.mark.parametrize("max_iterations", [3, 200])
def test_steps_are_told_to_the_last(max_iterations):
    rng = np.random.default_rng(0)
    features, y = rng.standard_normal((200, 3)), rng.standard_normal(200)
    told = []

    def progress(done, total):
        told.append((done, total))

    options = {"hidden": 2, "max_iterations": max_iterations}
    net = fit_error_model(features, y, held(200), progress=progress, **options)
    assert told[0] == (1, max_iterations)
    assert told[-1] == (max_iterations, max_iterations)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    silent = fit_error_model(features, y, held(200), **options)
    np.testing.assert_array_equal(net.w1, silent.w1)
