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


@pytest.mark.parametrize("which", ["gate", "gate with given logits", "error model"])
def test_gradients_are_those_of_finite_differences(which):
    rng = np.random.default_rng(4)
    n, n_out = 50, (1 if which == "error model" else 3)
    y, given = rng.standard_normal(n), rng.standard_normal((n, 3))
    if which == "error model":
        loss = mlp._error_loss(y)
    else:
        loss = mlp._gate_loss(rng.standard_normal((n, 3)), y, given if "given" in which else None)
    rows = rng.permutation(n)[:37]
    x = rng.standard_normal((37, 4))
    shapes = ((4, 5), (5,), (5, n_out), (n_out,))

    def value(layers):
        return mlp.descend(layers, x, loss, rows)[0]

    for _ in range(3):
        layers = tuple(0.7 * rng.standard_normal(shape) for shape in shapes)
        slopes = mlp.descend(layers, x, loss, rows)[1]
        scale = np.sqrt(sum(np.sum(slope**2) for slope in slopes))
        for _ in range(20):
            direction = [rng.standard_normal(shape) for shape in shapes]
            up, down = (
                value(tuple(a + h * d for a, d in zip(layers, direction, strict=True))) for h in (1e-5, -1e-5)
            )
            along = sum(np.sum(slope * d) for slope, d in zip(slopes, direction, strict=True))
            np.testing.assert_allclose((up - down) / 2e-5, along, atol=1e-6 * scale)


def test_the_loss_is_the_sum_over_rows():
    rng = np.random.default_rng(0)
    values, y, x = rng.uniform(1, 5, (30, 3)), rng.uniform(1, 5, 30), rng.standard_normal((30, 14))
    given = rng.standard_normal((30, 3))
    net = random_net()
    rows = np.arange(0, 30, 2)
    out = perceptron_reference(x, net.w1, net.b1, net.w2, net.b2)
    layers = (net.w1, net.b1, net.w2, net.b2)
    for added in (None, given):
        mixed = (softmax(out if added is None else out + added) * values).sum(1)
        found, _ = mlp.descend(layers, x[rows], mlp._gate_loss(values, y, added), rows)
        assert_close(found, np.sum((mixed - y)[rows] ** 2), made_in=np.float32)
    layers = (net.w1, net.b1, net.w2[:, :1], net.b2[:1])
    expected = np.sum((out[:, 0] + 0.5 * y**2 * np.exp(-2 * out[:, 0]))[rows])
    found, _ = mlp.descend(layers, x[rows], mlp._error_loss(y), rows)
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
    net = fit_gate(features, values, y, held(4000), hidden=16, decay=0, steps=2000)
    features, values, y, oracle = two_experts(4000, seed=1)
    gate = softmax(net(features))
    error = np.mean(((gate * values).sum(1) - y) ** 2)
    best = np.mean((oracle - y) ** 2)
    assert best < 0.2 * np.mean((values.mean(1) - y) ** 2)
    assert error < 1.08 * best
    assert np.mean(gate.argmax(1) == (features[:, 0] >= 0)) > 0.97


def test_given_logits_are_added_to_those_of_the_gate():
    features, values, y, oracle = two_experts(2000)
    right = 8 * np.where(features[:, :1] < 0, [1, -1], [-1, 1])
    blind = np.random.default_rng(1).standard_normal((2000, 2))

    def error(given):
        net = fit_gate(blind, values, y, held(2000), given=given, hidden=4, steps=300)
        return np.mean(((softmax(net(blind) + (0 if given is None else given)) * values).sum(1) - y) ** 2)

    best = np.mean((oracle - y) ** 2)
    assert error(right) < 1.01 * best
    assert error(None) > 4 * best


def heteroscedastic(n, seed):
    rng = np.random.default_rng(seed)
    features = rng.uniform(-1, 1, (n, 4)) + 3
    sigma = 0.1 * np.exp(0.8 * (features[:, 0] - 3) + 0.5 * np.sin(3 * (features[:, 1] - 3)))
    return features, sigma, sigma * rng.standard_normal(n)


def test_the_error_model_recovers_a_known_sigma():
    features, _, residual = heteroscedastic(12_000, 0)
    net = fit_error_model(features, residual, held(12_000), hidden=8, decay=0, steps=2000)
    features, sigma, _ = heteroscedastic(2000, 1)
    ratio = np.exp(net(features)[:, 0]) / sigma
    assert sigma.max() > 5 * sigma.min()
    assert np.sqrt(np.mean((ratio - 1) ** 2)) < 0.08
    assert np.quantile(np.abs(ratio - 1), 0.95) < 0.15


def test_an_error_model_of_exact_predictions_is_small_and_finite():
    net = fit_error_model(np.random.default_rng(0).standard_normal((50, 2)), np.zeros(50), held(50), hidden=3)
    assert (np.exp(net(np.zeros((1, 2)))) < 0.01).all()


def test_the_same_seed_gives_the_same_net_and_another_seed_another():
    features, values, y, _ = two_experts(500)
    options = {"hidden": 4, "steps": 20}
    one, two = (fit_gate(features, values, y, held(500), **options) for _ in range(2))
    other = fit_gate(features, values, y, held(500), seed=1, **options)
    for name in ("mean", "scale", "w1", "b1", "w2", "b2"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert not np.array_equal(one.w1, other.w1)


def test_the_net_kept_is_the_best_on_the_rows_held_back():
    rng = np.random.default_rng(0)
    # Pure noise: the longer it is fitted the worse for others, and the rows held back must notice.
    features, values, y = (
        rng.standard_normal((150, 10)),
        rng.standard_normal((150, 3)),
        rng.standard_normal(150),
    )
    back = held(150)

    def error(net):
        return np.mean(((softmax(net(features)) * values).sum(1) - y)[back] ** 2)

    kept = fit_gate(features, values, y, back, decay=0, steps=1000)
    # Where the rows held back are those fitted, the last net is the best.
    twice = [np.concatenate([a[~back], a[~back]]) for a in (features, values, y)]
    last = fit_gate(*twice, np.repeat([True, False], (~back).sum()), decay=0, steps=1000)
    assert error(last) > 1.2 * error(kept)
    assert error(kept) < 1.05 * np.mean((values.mean(1) - y)[back] ** 2)


@pytest.mark.parametrize("value", [np.log(1e-4), 0.1, 0.0, -300.1])
@pytest.mark.parametrize("spread", [0.0, 1e-7])
def test_a_constant_feature_is_ignored_in_float32_too(value, spread):
    features, values, y, _ = two_experts(1000)
    rng = np.random.default_rng(0)
    constant = value * (1 + spread * rng.standard_normal(1000))
    with_constant = np.column_stack([features, constant])
    net = fit_gate(with_constant, values, y, held(1000), hidden=6, steps=50)
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


@pytest.mark.parametrize("steps", [3, 200])
def test_steps_are_told_to_the_last(steps):
    rng = np.random.default_rng(0)
    features, y = rng.standard_normal((200, 3)), rng.standard_normal(200)
    told = []

    def progress(done, total):
        told.append((done, total))

    options = {"hidden": 2, "steps": steps}
    net = fit_error_model(features, y, held(200), progress=progress, **options)
    assert told[0] == (1, steps)
    assert told[-1] == (steps, steps)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    silent = fit_error_model(features, y, held(200), **options)
    np.testing.assert_array_equal(net.w1, silent.w1)
