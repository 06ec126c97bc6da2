"""Residuals beside a strong answer: the ridge is its equation and finds what is there; no region comes out worse."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_expert import inputs, model_of, run, same_arrays
from plans import random_lean, random_ridge
from tolerances import assert_close

from moefast.core.errors import ModelError
from moefast.experts.protocol import Inputs
from moefast.experts.residual import LinearResidual, RidgeResidual, fit_linear_residual, fit_ridge_residual
from moefast.experts.residual_choice import NEGLIGIBLE, Gain, KeptResiduals, choose_residuals, regions
from moefast.export.graph import check
from moefast.export.session import open_session

STEM = "others.2"
RANGE = (1.0, 5.0)


# --- the ridge -------------------------------------------------------------------------------------------------------


def by_hand(expert, seen):
    """The equation, star by star."""
    out = []
    low, high = expert.limits.astype(float)
    for z, level, lines in zip(seen.z, seen.log_level, seen.lines, strict=True):
        level = min(max(float(level), float(expert.levels[0])), float(expert.levels[1]))
        f = [*map(float, lines), *map(float, z)]
        value = float(expert.intercept[0]) + float(expert.weights[-1, 0]) * level
        for j, f_j in enumerate(f):
            share = 1 + float(expert.noise[j]) * np.exp(2 * level)
            value += float(expert.weights[j, 0]) * (f_j - float(expert.mean[j])) / share
        out.append(min(max(value, low), high))
    return np.array(out)


@pytest.mark.parametrize("n", [0, 1, 131])
def test_the_ridge_is_its_equation(n):
    expert, seen = random_ridge(15), inputs(n)
    expected = by_hand(expert, seen)
    found = expert.predict_reference(seen)
    assert found.dtype == np.float64
    assert_close(found, expected)
    fast = expert.predict(seen)
    assert fast.dtype == np.float32
    assert_close(fast, expected, made_in=np.float32)


def test_levels_and_limits_hold():
    expert, seen = random_ridge(15), inputs(500)
    far = seen._replace(log_level=seen.log_level * 50)
    assert (np.abs(far.log_level) > expert.levels[1]).mean() > 0.9
    edges = seen._replace(log_level=np.clip(far.log_level, *expert.levels))
    np.testing.assert_array_equal(expert.predict(far), expert.predict(edges))
    wild = expert.predict(seen._replace(z=1e6 * seen.z))
    assert set(np.unique(wild)) == set(expert.limits)


@pytest.mark.parametrize("n", [0, 1, 131])
def test_onnx_runtime_gives_the_reference(n):
    expert, seen = random_ridge(15), inputs(n)
    model = model_of(expert)
    check(model, "ridge")
    assert_close(run(open_session(model), seen), expert.predict_reference(seen), made_in=np.float32)


def test_read_back_is_exact():
    expert = random_ridge(15)
    model = onnx.ModelProto.FromString(model_of(expert).SerializeToString())
    same_arrays(RidgeResidual.read_nodes(model, STEM).arrays(), expert.arrays())


def test_a_damaged_model_is_refused():
    model = model_of(random_ridge(15))
    with pytest.raises(ModelError, match=r"lacks the initializer 'others\.3\.mean'"):
        RidgeResidual.read_nodes(model, "others.3")
    weights = next(tensor for tensor in model.graph.initializer if tensor.name == f"{STEM}.weights")
    weights.CopyFrom(onnx.numpy_helper.from_array(np.full((16, 1), np.nan, np.float32), weights.name))
    with pytest.raises(ModelError, match=r"others\.2.*cannot be read.*weights"):
        RidgeResidual.read_nodes(model, STEM)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mean", np.zeros(14, np.float32)),
        ("weights", np.zeros((16, 1))),
        ("noise", np.full(15, -1, np.float32)),
        ("limits", np.array([0, np.inf], np.float32)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(name, value):
    with pytest.raises(ValueError, match=r"expected|negative"):
        replace(random_ridge(15), **{name: value})


# --- its fit ---------------------------------------------------------------------------------------------------------


def noisy(n, seed=0, spread=2.0):
    """Clean features of spread `spread`, noise s² as in `z`; lines are noisier."""
    rng = np.random.default_rng(seed)
    clean = Inputs(*(spread * rng.standard_normal((n, m)) for m in (4,)), np.zeros(n), np.zeros((n, 9)))
    level = rng.uniform(-1, 1, n)
    z = clean.z + np.exp(level)[:, None] * rng.standard_normal(clean.z.shape)
    lines = 0.1 * clean.z[:, [0] * 9] + 0.3 * np.exp(level)[:, None] * rng.standard_normal((n, 9))
    seen = Inputs(z.astype(np.float32), level.astype(np.float32), lines.astype(np.float32))
    return clean, seen


def test_the_noise_of_a_feature_is_told_from_its_signal():
    seen = noisy(40_000)[1]
    found = fit_ridge_residual(seen, seen.z[:, 0].astype(float), np.ones(40_000), 1e-6)
    np.testing.assert_allclose(found.noise[9:], 1 / 4, rtol=0.1)
    np.testing.assert_allclose(found.noise[:9], 0.09 / 0.04, rtol=0.15)


def test_the_ridge_is_the_least_squares_solution_of_another_solver():
    rng = np.random.default_rng(2)
    _, seen = noisy(700)
    weight = rng.uniform(0, 1, 700)
    e = 0.3 * np.sin(seen.z[:, 1]) + 0.1 * rng.standard_normal(700)
    found = fit_ridge_residual(seen, e, weight, 0.05)
    level = seen.log_level.astype(float)
    f = np.concatenate([seen.lines, seen.z], 1).astype(float)
    mean = weight @ f / weight.sum()
    x = np.column_stack([(f - mean) / (1 + found.noise * np.exp(2 * level)[:, None]), level])
    centre = weight @ x / weight.sum()
    scale = np.sqrt(weight @ (x - centre) ** 2 / weight.sum())
    root = np.sqrt(weight / weight.sum())[:, None]
    rows = np.concatenate([root * (x - centre) / scale, np.sqrt(0.05) * np.eye(14)])
    off = e - weight @ e / weight.sum()
    right = np.concatenate([root[:, 0] * off, np.zeros(14)])
    beta = np.linalg.lstsq(rows, right, rcond=None)[0] / scale
    np.testing.assert_allclose(found.weights[:, 0], beta, rtol=1e-3, atol=1e-5)
    expected = weight @ e / weight.sum() + (x - centre) @ beta
    np.testing.assert_allclose(found.predict(seen), np.clip(expected, *found.limits), rtol=0, atol=1e-5)


def test_a_bias_is_found_as_the_best_linear_answer_at_every_noise_level():
    clean, seen = noisy(60_000, seed=1)
    bias = 0.4 + 0.2 * clean.z[:, 2]
    found = fit_ridge_residual(seen, bias, np.ones(60_000), 1e-6)
    fresh_clean, fresh = noisy(4000, seed=9)
    # The posterior mean of a normal feature of variance 4 behind noise s².
    best = 0.4 + 0.2 * fresh.z[:, 2] / (1 + np.exp(2 * fresh.log_level) / 4)
    assert np.abs(found.predict(fresh) - best).mean() < 0.01
    left = 0.4 + 0.2 * fresh_clean.z[:, 2] - found.predict(fresh)
    assert np.abs(left.mean()) < 0.01


def test_constant_features_and_one_noise_level_are_no_trouble():
    _, seen = noisy(300)
    seen = seen._replace(lines=np.full((300, 9), 0.7, np.float32), log_level=np.full(300, 0.3, np.float32))
    e = 0.1 * seen.z[:, 0].astype(float)
    found = fit_ridge_residual(seen, e, np.ones(300), 1e-6)
    np.testing.assert_array_equal(found.weights[[*range(9), -1]], 0)
    np.testing.assert_allclose(found.predict(seen), e, atol=1e-4)
    again = fit_ridge_residual(Inputs(*(a[:1] for a in seen[:3])), e[:1], np.ones(1), 1.0)
    np.testing.assert_allclose(again.predict(seen), e[0], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"residual": np.zeros(3)}, "4 residuals"),
        ({"weight": np.zeros(3)}, "4 residuals"),
        ({"residual": np.array([0, 1, np.nan, 0])}, "finite"),
        ({"weight": np.zeros(4)}, "not all zero"),
        ({"weight": -np.ones(4)}, "not all zero"),
        ({"penalty": 0.0}, "positive penalty"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change, match):
    given_ = {"residual": np.zeros(4), "weight": np.ones(4), "penalty": 1.0, **change}
    with pytest.raises(ValueError, match=match):
        fit_ridge_residual(inputs(4), **given_)


# --- leaning on the linear expert ------------------------------------------------------------------------------------


def two_values(n, seed=0):
    """An expert and a linear one whose errors are of 0.3 and 0.6 dex and independent."""
    rng = np.random.default_rng(seed)
    y = rng.uniform(1, 5, n)
    value, linear = y + rng.normal(0, 0.3, n) - 0.1, y + rng.normal(0, 0.6, n)
    seen = inputs(n)._replace(value=value.astype(np.float32), linear=linear.astype(np.float32))
    return y, seen


def test_leaning_is_its_equation():
    _, seen = two_values(500)
    expert = random_lean()
    apart = seen.linear.astype(float) - seen.value
    expected = np.clip(np.float32(-0.03) + float(np.float32(0.2)) * apart, *expert.limits.astype(float))
    assert 0.2 < np.isin(expected, expert.limits.astype(float)).mean() < 0.9
    assert_close(expert.predict_reference(seen), expected)
    assert_close(expert.predict(seen), expected, made_in=np.float32)


def test_two_independent_answers_are_weighed_by_their_precision():
    y, seen = two_values(40_000)
    found = fit_linear_residual(seen, y - seen.value, np.ones(40_000))
    # 0.3² / (0.3² + 0.6²), and the expert is 0.1 low where the linear one is not.
    assert found.share[0] == pytest.approx(0.2, abs=0.01)
    assert found.intercept[0] == pytest.approx(0.1 - 0.2 * 0.1, abs=0.01)
    left = y - seen.value - found.predict(seen)
    assert left.std() == pytest.approx(np.sqrt(0.3**2 * 0.8), rel=0.02)
    own = found.predict(seen)
    assert (own.min(), own.max()) == pytest.approx(tuple(found.limits), abs=1e-6)


def test_only_the_stars_of_an_expert_count():
    y, seen = two_values(2000)
    weight = (np.arange(2000) < 500).astype(float)
    wild = seen.linear.copy()
    wild[500:] += 100
    found = fit_linear_residual(seen._replace(linear=wild), y - seen.value, weight)
    few = Inputs(*(None if a is None else a[:500] for a in seen))
    same_arrays(found.arrays(), fit_linear_residual(few, (y - seen.value)[:500], np.ones(500)).arrays())


def test_a_worse_answer_that_errs_alike_gets_no_share():
    y, seen = two_values(2000)
    twice = (y + 2 * (seen.value - y)).astype(np.float32)
    assert fit_linear_residual(seen._replace(linear=twice), y - seen.value, np.ones(2000)).share == 0
    same = fit_linear_residual(seen._replace(linear=seen.value), np.full(2000, 0.1), np.ones(2000))
    assert same.share == 0
    np.testing.assert_allclose(same.predict(seen), 0.1, atol=1e-6)


def test_leaning_needs_both_values():
    _, seen = two_values(3)
    for missing in ("value", "linear"):
        with pytest.raises(ValueError, match="give value and linear"):
            random_lean().predict(seen._replace(**{missing: None}))
        with pytest.raises(ValueError, match="give value and linear"):
            fit_linear_residual(seen._replace(**{missing: None}), np.zeros(3), np.ones(3))


def test_numbers_of_leaning_come_back_from_a_file_or_are_refused():
    expert = random_lean()
    same_arrays(LinearResidual.from_arrays(expert.arrays().__getitem__).arrays(), expert.arrays())
    with pytest.raises(ValueError, match="share: finite"):
        replace(expert, share=np.array([np.nan], np.float32))


# --- the choice ------------------------------------------------------------------------------------------------------


def judged(n=3000, n_bins=3, seed=0, bias=0.3):
    """Stars whose answer is off by `bias` in bin 1 and by chance elsewhere; the gate leaves some doubt about bins."""
    rng = np.random.default_rng(seed)
    bins = rng.integers(0, n_bins, n)
    y = rng.uniform(1.5, 4.5, n)
    strong = y - bias * (bins == 1) + rng.normal(0, 0.3, n)
    gate = np.full((n, n_bins), 0.01 / (n_bins - 1))
    gate[np.arange(n), bins] = 0.99
    return bins, y, strong, gate, rng


def masks(bins):
    return {str(k): bins == k for k in np.unique(bins)}


def test_the_bias_of_one_bin_is_taken_away_and_the_others_stay():
    bins, y, strong, gate, rng = judged()
    right = {k: np.full(y.size, 0.3 if k == 1 else 0.0) for k in range(3)}
    chance = {k: rng.normal(0, 0.2, y.size) for k in range(3)}
    found = choose_residuals(
        y, strong, gate, {"right": right, "chance": chance}, np.arange(y.size), masks(bins), RANGE
    )
    assert found.kept == {1: "right"}
    assert found.dropped == {}
    expected = 0.3**2 / 3
    assert found.total.gain == pytest.approx(expected, abs=3 * found.total.standard_error)
    assert found.regions["1"].gain == pytest.approx(0.3**2, rel=0.15)
    assert found.steps[1] == found.total


def test_a_residual_that_makes_a_region_worse_is_dropped_though_it_helps_on_the_whole():
    bins, y, strong, gate, _ = judged()
    faint = (np.arange(y.size) % 4 == 0) & (bins == 1)
    # Faint stars of the bin are right as they are.
    strong = strong + 0.3 * faint
    where = masks(bins) | {"faint": faint}
    candidates = {"flat": {1: np.full(y.size, 0.3)}}
    found = choose_residuals(y, strong, gate, candidates, np.arange(y.size), where, RANGE)
    assert found.kept == {}
    assert found.dropped == {1: "faint"}
    del where["faint"]
    assert choose_residuals(y, strong, gate, candidates, np.arange(y.size), where, RANGE).kept == {1: "flat"}


def test_of_two_only_the_one_that_does_harm_goes():
    bins, y, strong, gate, _ = judged()
    strong = strong - 0.2 * (bins == 0)
    poor = (np.arange(y.size) % 3 == 0) & (bins == 0)
    strong = strong + 0.2 * poor
    candidates = {"flat": {0: np.full(y.size, 0.2), 1: np.full(y.size, 0.3)}}
    where = masks(bins) | {"metal-poor": poor}
    found = choose_residuals(y, strong, gate, candidates, np.arange(y.size), where, RANGE)
    assert found.kept == {1: "flat"}
    assert found.dropped == {0: "metal-poor"}


def test_draws_of_one_star_are_not_stars():
    _, y, strong, gate, _ = judged(n=60)
    one = {"flat": {1: np.full(60, 0.3)}}
    many = np.tile(np.arange(60), 50)
    several = choose_residuals(
        y[many],
        strong[many],
        gate[many],
        {"flat": {1: np.full(3000, 0.3)}},
        many,
        {},
        RANGE,
        margin=0,
        sure=0,
    )
    alone = choose_residuals(y, strong, gate, one, np.arange(60), {}, RANGE, margin=0, sure=0)
    assert alone.kept == several.kept == {1: "flat"}
    assert several.total.stars == 60
    np.testing.assert_allclose(several.total, alone.total, rtol=1e-9)


def test_predictions_are_judged_as_they_are_clipped():
    # Outside of the labels' range, a step further out changes nothing, and one that leads back too far does harm.
    y, star = np.full(50, 5.0), np.arange(50)
    gate = np.ones((50, 1))
    for step, kept in ((1.0, {}), (-1.0, {}), (0.0, {})):
        candidates = {"flat": {0: np.full(50, step)}}
        assert choose_residuals(y, y + 0.5, gate, candidates, star, {}, RANGE).kept == kept
    assert choose_residuals(y, y - 0.5, gate, {"flat": {0: np.full(50, 1.0)}}, star, {}, RANGE).kept == {
        0: "flat"
    }


def test_without_stars_or_candidates_nothing_is_kept():
    empty = np.empty(0)
    found = choose_residuals(empty, empty, np.empty((0, 2)), {"a": {0: empty}}, empty.astype(int), {}, RANGE)
    assert found == KeptResiduals()
    y = np.array([2.0])
    assert not choose_residuals(y, y + 1, np.ones((1, 1)), {"a": {0: -y / 2}}, np.array([7]), {}, RANGE).kept
    _, y, strong, gate, _ = judged()
    assert choose_residuals(y, strong, gate, {}, np.arange(y.size), {}, RANGE) == KeptResiduals()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 300),
    n_bins=st.integers(1, 5),
    n_candidates=st.integers(0, 3),
    margins=st.sampled_from([(0.0, 0.0), (1.0, 2.0), (0.0, 3.0), (3.0, 1.0)]),
)
def test_never_worse_than_without_on_the_stars_that_judge(seed, n, n_bins, n_candidates, margins):
    # Candidates of any quality: some take a bias away, some add noise, most do both.
    rng = np.random.default_rng(seed)
    bins, star = rng.integers(0, n_bins, n), rng.integers(0, n, n)
    y = rng.uniform(1, 5, n)
    bias = rng.normal(0, 0.4, n_bins)
    strong = y + bias[bins] + rng.normal(0, 0.3, n)
    gate = rng.dirichlet(np.ones(n_bins), n) * 0.3
    gate[np.arange(n), bins] += 0.7
    candidates = {
        str(c): {
            k: -bias[k] * rng.uniform(-0.5, 1.5) + rng.normal(0, rng.gamma(1, 0.2), n) for k in range(n_bins)
        }
        for c in range(n_candidates)
    }
    where = masks(bins) | {"some": rng.random(n) < 0.3, "none": np.zeros(n, bool)}
    found = choose_residuals(
        y, strong, gate, candidates, star, where, RANGE, margin=margins[0], sure=margins[1]
    )
    final = strong + sum((gate[:, k] * candidates[name][k] for k, name in found.kept.items()), np.zeros(n))

    def error(values, mask):
        each = [
            np.mean((np.clip(values[mine], *RANGE) - y[mine]) ** 2)
            for s in np.unique(star[mask])
            for mine in [(star == s) & mask]
        ]
        return np.array(each)

    everywhere = np.ones(n, bool)
    gain = error(strong, everywhere) - error(final, everywhere)
    assert gain.mean() >= 0
    assert set(found.kept).isdisjoint(found.dropped)
    assert set(found.steps) == set(found.kept)
    if found.kept:
        assert gain.mean() > margins[1] * gain.std(ddof=1) / np.sqrt(gain.size)
        assert found.total.gain == pytest.approx(gain.mean())
        for name, mask in where.items():
            if np.unique(star[mask]).size > 1:
                off = error(strong, mask) - error(final, mask)
                negligible = NEGLIGIBLE * error(strong, mask).mean()
                bound = max(margins[1] * off.std(ddof=1) / np.sqrt(off.size), negligible)
                assert off.mean() >= -bound - 1e-12
                assert found.regions[name].gain == pytest.approx(off.mean(), abs=1e-12)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"strong": np.full(4, np.nan)}, "strong: 4 finite"),
        ({"y": np.zeros(3)}, "y: 4 finite"),
        ({"candidates": {"a": {0: np.zeros(3)}}}, "residual 0 of a"),
        ({"candidates": {"a": {2: np.zeros(4)}}}, "experts 0 … 1"),
        ({"where": {"poor": np.ones(5, bool)}}, "poor: 4"),
        ({"margin": -1.0}, "margins must not be negative"),
        ({"sure": -1.0}, "margins must not be negative"),
    ],
)
def test_what_cannot_be_judged_is_refused(change, match):
    given_ = {
        "y": np.zeros(4), "strong": np.zeros(4), "gate": np.ones((4, 2)) / 2, "candidates": {"a": {0: np.zeros(4)}},
        "star": np.arange(4), "where": {}, "label_range": RANGE, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=match):
        choose_residuals(**given_)


def test_regions_are_bins_metal_poor_stars_and_ranges_of_snr():
    found = regions(
        np.array([0, 1, 1]), ("cool", "hot"), np.array([-1.2, -1.0, 0.1]), np.array([1, 0, 1]), "XL"
    )
    expected = {
        "cool": [True, False, False],
        "hot": [False, True, True],
        "metal-poor": [True, False, False],
        "not metal-poor": [False, True, True],
        "snr_norm X": [False, True, False],
        "snr_norm L": [True, False, True],
    }
    assert {name: mask.tolist() for name, mask in found.items()} == expected


def test_the_summary_says_what_was_kept_and_why():
    gain = Gain(0.01, 0.002, 50, 0.3)
    kept = KeptResiduals({1: "ridge"}, {1: gain}, {0: "snr_norm X"}, gain, {"snr_norm L": gain})
    numbers = {"gain": 0.01, "standard_error": 0.002, "stars": 50, "before": 0.3}
    assert kept.summary(("cool", "hot")) == {
        "kept": {"hot": {"residual": "ridge", **numbers}},
        "dropped": {"cool": "made snr_norm X worse"},
        "all": numbers,
        "regions": {"snr_norm L": numbers},
    }
