"""From projected spectra to log g: the compiled mixture against its reference and scikit-learn; neighbours; NaN."""

from dataclasses import fields, replace

import numpy as np
import pytest
from sklearn.neural_network import MLPRegressor
from tolerances import assert_close

from moefast.kernels import Given, Mixed, Mixing, Projected, soft_mix
from moefast.kernels.reference import perceptron_reference, soft_mix_reference

C, LINES = 11, 4
NAMES = Mixed._fields


def layers(n_in, hidden, n_out, seed=0, scale=0.3):
    rng = np.random.default_rng(seed)
    shapes = ((n_in, hidden), (hidden,), (hidden, n_out), (n_out,))
    return tuple((scale * rng.standard_normal(shape)).astype(np.float32) for shape in shapes)


def mixing(n_experts=9, n_levels=8, hidden=64, **changes):
    rng = np.random.default_rng(1)
    features = 2 * LINES + 1 + 4 + 1
    plan = Mixing(
        knots=np.linspace(-1, 2, n_levels).astype(np.float32),
        expert_weights=rng.normal(0, 0.3, (n_experts, n_levels, C)).astype(np.float32),
        intercepts=rng.normal(3, 0.3, (n_experts, n_levels)).astype(np.float32),
        n_basis=C - 2,
        n_leading=4,
        line_offsets=rng.uniform(0.5, 1.5, 3 * LINES).astype(np.float32),
        line_widths=rng.uniform(10, 20, LINES).astype(np.float32),
        least_continuum=0.05,
        least_spread=1e-4,
        gate=layers(features, hidden, n_experts, 2),
        error_model=layers(features + 3, 8, 1, 3, scale=0.1),
        label_range=(1.0, 5.0),
    )
    return replace(plan, **changes)


def projected(n, plan, seed=0):
    rng = np.random.default_rng(seed)
    k, m, c = plan.expert_weights.shape

    def f32(values):
        return values.astype(np.float32)

    return Projected(
        f32(rng.standard_normal((n, c))), f32(0.2 * rng.standard_normal((n, 3 * LINES))),
        f32(rng.uniform(0.01, 0.5, (n, m * k))), f32(rng.uniform(-2, 3, n)), f32(rng.uniform(20, 40, n)),
        f32(rng.uniform(10, 20, n)), f32(np.ones(n)), f32(np.ones(n)), np.ones(n, np.int32), np.zeros(n, np.uint32),
    )  # fmt: skip


def others(n, k, seed=0):
    """Log g, noise and logits of other experts, some of which say nothing."""
    rng = np.random.default_rng(seed)
    values, noise = rng.uniform(1, 5, (n, k)), rng.uniform(0.05, 0.5, (n, k))
    logits = rng.normal(0, 2, (n, k))
    values[rng.random((n, k)) < 0.4] = np.nan
    noise[np.isnan(values)] = np.nan
    logits[:, 1:][rng.random((n, k - 1)) < 0.3] = -np.inf
    return Given(*(a.astype(np.float32) for a in (values, noise, logits)))


def wide(rows):
    values = {field.name: getattr(rows, field.name) for field in fields(rows)}
    return Projected(**{n: v.astype(np.float64) if v.dtype == np.float32 else v for n, v in values.items()})


def take(rows, which):
    return Projected(*(getattr(rows, field.name)[which] for field in fields(rows)))


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 257, 1031])
@pytest.mark.parametrize(("n_experts", "n_levels", "hidden"), [(9, 8, 64), (1, 2, 1), (5, 3, 17)])
def test_matches_the_reference(n, n_experts, n_levels, hidden):
    plan = mixing(n_experts, n_levels, hidden)
    rows = projected(n, plan)
    found, expected = soft_mix(rows, plan), soft_mix_reference(wide(rows), plan)
    for name in NAMES:
        assert getattr(found, name).dtype == np.float32
        # Logits of order 10 carry a float32 rounding of 1e-6 each into the exponential.
        assert_close(getattr(found, name), getattr(expected, name), factor=3)
    assert_close(found.weights.sum(1), np.ones(n))


@pytest.mark.parametrize("n", [0, 1, 33, 1031])
@pytest.mark.parametrize(("n_experts", "n_levels", "hidden"), [(9, 8, 64), (1, 2, 1), (5, 3, 17)])
def test_matches_the_reference_with_other_experts(n, n_experts, n_levels, hidden):
    plan = mixing(n_experts, n_levels, hidden)
    rows, given = projected(n, plan), others(n, n_experts)
    found, expected = soft_mix(rows, plan, given), soft_mix_reference(wide(rows), plan, given)
    for name in NAMES:
        # As above.
        assert_close(getattr(found, name), getattr(expected, name), factor=3)
    there = ~np.isnan(given.values)
    np.testing.assert_array_equal(found.expert_log_g[there], given.values[there])
    assert (found.weights[given.logits == -np.inf] == 0).all()
    assert_close(found.weights.sum(1), np.ones(n))


def test_other_experts_that_say_nothing_change_nothing():
    plan = mixing()
    rows = projected(600, plan)
    nothing = np.full((600, 9), np.nan, np.float32)
    found, expected = (
        soft_mix(rows, plan, Given(nothing, nothing, np.zeros_like(nothing))),
        soft_mix(rows, plan),
    )
    for name in NAMES:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_the_gate_takes_evidence_as_logits():
    """With a gate that says nothing, the weights are the softmax of what is added: posterior shares of the experts."""
    w1, b1, w2, b2 = mixing(3).gate
    plan = mixing(3, gate=(w1, b1, np.zeros_like(w2), np.zeros_like(b2)))
    shares = np.array([[0.2, 0.8, 0.0], [1.0, 0.0, 0.0]])
    with np.errstate(divide="ignore"):
        logits = (np.log(shares) - 500).astype(np.float32)
    values = np.array([[2.0, 4.0, np.nan], [3.0, np.nan, np.nan]], np.float32)
    noise = np.array([[0.5, 0.1, np.nan], [0.3, np.nan, np.nan]], np.float32)
    found = soft_mix(projected(2, plan), plan, Given(values, noise, logits))
    # Logits of 500 carry a rounding of 3e-5.
    assert_close(found.weights, shares, factor=4)
    assert_close(found.log_g, [3.6, 3.0], factor=4)
    assert_close(found.log_g_err_raw, [0.18, 0.3], factor=4)


def test_no_finite_logit_is_no_answer():
    plan = mixing()
    rows, given = projected(3, plan), others(3, 9)
    spoiled = given._replace(logits=given.logits.copy())
    spoiled.logits[1] = -np.inf
    found, clean = soft_mix(rows, plan, spoiled), soft_mix(rows, plan, given)
    assert np.isnan(found.log_g[1])
    np.testing.assert_array_equal(found.log_g[[0, 2]], clean.log_g[[0, 2]])


def test_the_perceptron_is_scikit_learns():
    rng = np.random.default_rng(3)
    features = rng.standard_normal((50, 4))
    net = [a.astype(np.float64) for a in layers(4, 6, 3)]
    judge = MLPRegressor(hidden_layer_sizes=(6,), activation="tanh", max_iter=2, solver="lbfgs")
    with pytest.warns(Warning, match="lbfgs failed to converge"):
        judge.fit(features, rng.standard_normal((50, 3)))
    judge.coefs_, judge.intercepts_ = [net[0], net[2]], [net[1], net[3]]
    assert_close(perceptron_reference(features, *net), judge.predict(features))


def test_large_logits_neither_overflow_nor_lose_the_sum():
    w1, b1, w2, _ = mixing(3).gate
    plan = mixing(3, gate=(np.zeros_like(w1), b1, np.zeros_like(w2), np.array([1e4, -1e4, 0], np.float32)))
    rows = projected(5, plan)
    found = soft_mix(rows, plan)
    assert_close(found.weights, np.tile([1.0, 0.0, 0.0], (5, 1)))
    assert_close(found.log_g, np.clip(found.expert_log_g[:, 0], 1, 5))
    assert_close(soft_mix_reference(wide(rows), plan).weights, np.tile([1.0, 0.0, 0.0], (5, 1)))


def test_levels_outside_the_knots_are_those_of_the_ends():
    plan = mixing()
    rows = projected(40, plan)
    low, high = (replace(rows, log_level=np.full(40, v, np.float32)) for v in (-9, 9))
    ends = [replace(rows, log_level=np.full(40, v, np.float32)) for v in (plan.knots[0], plan.knots[-1])]
    for beyond, end in zip((low, high), ends, strict=True):
        np.testing.assert_array_equal(soft_mix(beyond, plan).expert_log_g, soft_mix(end, plan).expert_log_g)
    expected = rows.columns @ plan.expert_weights[:, -1].T + plan.intercepts[:, -1]
    assert_close(soft_mix(high, plan).expert_log_g, expected)


def test_a_row_has_the_same_bits_alone_and_a_bad_row_keeps_to_itself():
    plan = mixing()
    rows = projected(1300, plan)
    found = soft_mix(rows, plan)
    rows.columns[20] = np.nan
    rows.log_level[21] = np.nan
    spoiled = soft_mix(rows, plan)
    assert np.isnan(spoiled.log_g[20])
    assert np.isnan(spoiled.weights[20]).all()
    for i in (0, 1, 19, 22, 511, 512, 1299):
        alone = soft_mix(take(rows, slice(i, i + 1)), plan)
        for name in NAMES:
            np.testing.assert_array_equal(getattr(alone, name)[0], getattr(found, name)[i])
            np.testing.assert_array_equal(getattr(spoiled, name)[i], getattr(found, name)[i])


def test_shapes_are_checked():
    plan = mixing()
    rows = projected(3, plan)
    with pytest.raises(ValueError, match="columns, windows, variances, levels and energies of shapes"):
        soft_mix(replace(rows, columns=rows.columns[:, 1:]), plan)
    with pytest.raises(ValueError, match="levels and energies of shapes"):
        soft_mix(replace(rows, energy=rows.energy[1:]), plan)
    given = others(3, 9)
    with pytest.raises(ValueError, match=r"given values, noise and logits of shape \(3, 9\) expected"):
        soft_mix(rows, plan, given._replace(noise=given.noise[:, 1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"knots": np.zeros(3, np.float32)}, "two noise levels at least"),
        ({"n_leading": 10}, "leading components"),
        ({"n_basis": 12}, "leading components"),
        ({"line_offsets": np.zeros(3, np.float32)}, "12 offsets expected"),
        ({"gate": layers(13, 64, 9)}, "the gate must take 14 features and give 9"),
        ({"error_model": layers(17, 8, 2)}, "the error model must take 17 features and give 1"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        mixing(**change)
