"""Trees of LightGBM, kept and scored without it: the same leaves for every float32, also on the thresholds."""

import builtins
from dataclasses import replace

import lightgbm
import numpy as np
import pytest
from one_expert import N_PIXELS, inputs, same_arrays
from tolerances import assert_close

from moefast.core.errors import MoefastError
from moefast.experts.trees import Trees, fit_trees, float32_below, read_booster
from moefast.kernels import Forest
from moefast.kernels.reference_forest import forest_leaves_reference, forest_predict_reference

SMALL = {"n_trees": 30, "leaves": 12, "least_stars": 10}


def problem(n=600, seed=3):
    """Flux with few values per pixel, so that thresholds fall between neighbours and lie close to what is seen."""
    seen = inputs(n, seed)
    y = 3 + seen.x[:, 3] * seen.x[:, 9] + np.abs(seen.x[:, 20]) + 0.1 * seen.z[:, 0]
    return seen, y.astype(np.float64)


@pytest.fixture(scope="module")
def booster():
    """A booster on its own, with leaf values that are float32."""
    seen, y = problem()
    settings = {
        "num_leaves": 16,
        "min_child_samples": 5,
        "use_missing": False,
        "verbosity": -1,
        "num_threads": 1,
    }
    made = lightgbm.train(settings, lightgbm.Dataset(seen.x, y, params=settings), num_boost_round=25)
    for t, tree in enumerate(made.dump_model()["tree_info"]):
        for leaf in range(tree["num_leaves"]):
            made.set_leaf_output(t, leaf, float(np.float32(made.get_leaf_output(t, leaf))))
    return made


@pytest.fixture(scope="module")
def thresholds(booster):
    """Feature and threshold, float64, of every split."""
    table = booster.trees_to_dataframe()
    splits = table[table.split_feature.notna()]
    return splits.split_feature.str.removeprefix("Column_").astype(
        int
    ).to_numpy(), splits.threshold.to_numpy()


def on_thresholds(thresholds, n=500):
    """Rows whose pixels lie exactly on, one unit in the last place above, or one below a threshold of theirs."""
    draw = np.random.default_rng(8)
    x = inputs(n, seed=9).x
    for feature in np.unique(thresholds[0]):
        own = thresholds[1][thresholds[0] == feature]
        nearest = draw.choice(own, n).astype(np.float32)
        steps = [
            nearest,
            np.nextafter(nearest, np.float32(np.inf)),
            np.nextafter(nearest, np.float32(-np.inf)),
        ]
        x[:, feature] = np.choose(draw.integers(0, 3, n), steps)
    return x


@pytest.mark.parametrize("sees", ["flux", "stacking"])
def test_leaves_and_sums_are_those_of_lightgbm(booster, sees):
    x = inputs(700, seed=4).x
    forest = read_booster(booster, sees=sees).forest
    np.testing.assert_array_equal(forest_leaves_reference(x, forest), booster.predict(x, pred_leaf=True))
    found, expected = forest_predict_reference(x, forest), booster.predict(x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_leaves_are_those_of_lightgbm_on_the_thresholds_themselves(booster, thresholds):
    x, trees = on_thresholds(thresholds), read_booster(booster)
    expected = booster.predict(x, pred_leaf=True)
    np.testing.assert_array_equal(forest_leaves_reference(x, trees.forest), expected)
    np.testing.assert_allclose(
        forest_predict_reference(x, trees.forest), booster.predict(x), rtol=0, atol=1e-12
    )
    seen = inputs(len(x))._replace(x=x)
    assert_close(trees.predict(seen), booster.predict(x), made_in=np.float32)


def test_rounding_thresholds_to_the_nearest_float32_would_reach_other_leaves(booster, thresholds):
    x, forest = on_thresholds(thresholds), read_booster(booster).forest
    order = [(k["split_index"], k["threshold"]) for k in _splits(booster)]
    exact = np.array([threshold for _, threshold in order])
    np.testing.assert_array_equal(float32_below(exact), forest.threshold)
    naive = replace(forest, threshold=exact.astype(np.float32))
    expected = booster.predict(x, pred_leaf=True)
    assert (forest_leaves_reference(x, naive) != expected).mean() > 0.01
    assert np.abs(forest_predict_reference(x, naive) - booster.predict(x)).max() > 0.01


def _splits(booster):
    """Splits of each tree in the order of their numbers."""
    for tree in booster.dump_model()["tree_info"]:
        waiting, found = [tree["tree_structure"]], []
        while waiting:
            node = waiting.pop()
            if "split_index" in node:
                found.append(node)
                waiting += [node["left_child"], node["right_child"]]
        yield from sorted(found, key=lambda node: node["split_index"])


def test_the_largest_float32_that_is_not_above():
    one = np.float32(1)
    above, below = np.nextafter(one, np.float32(2)), np.nextafter(one, np.float32(0))
    largest, tiny = np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal
    cases = {
        1.0: one, 1.0 + 1e-12: one, 1.0 - 1e-12: below, float(above): above, float(above) - 1e-12: one,
        -1.0 - 1e-12: -above, 0.0: 0.0, 1e-60: 0.0, -1e-60: -tiny, 1e300: largest, -1e300: -np.inf,
        float(largest) * (1 + 1e-9): largest, np.inf: np.inf,
    }  # fmt: skip
    found = float32_below(list(cases))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array(list(cases.values()), np.float32))
    draw = np.random.default_rng(0)
    thresholds = draw.standard_normal(4000) * 10.0 ** draw.integers(-44, 38, 4000)
    rounded = float32_below(thresholds)
    for steps in range(-2, 3):
        x = thresholds.astype(np.float32)
        for _ in range(abs(steps)):
            x = np.nextafter(x, np.float32(np.inf * steps))
        np.testing.assert_array_equal(x.astype(np.float64) <= thresholds, x <= rounded)


@pytest.mark.parametrize("sees", ["flux", "stacking"])
def test_fitted_trees_find_what_is_there_and_are_the_same_again(sees):
    seen, y = problem()
    features = Trees(_leaf(), sees).features(seen)
    trees = fit_trees(features, y, sees=sees, seed=5, **SMALL, threads=1)
    assert trees.needs_flux == (sees == "flux")
    assert trees.forest.n_trees == 30
    assert trees.forest.base == np.float32(y.mean())
    fresh, truth = problem(seed=4)
    if sees == "flux":
        spread = truth.var()
        assert ((trees.predict(fresh) - truth) ** 2).mean() < 0.8 * spread
        assert ((trees.predict(seen) - y) ** 2).mean() < 0.6 * y.var()
    same_arrays(fit_trees(features, y, sees=sees, seed=5, **SMALL, threads=2).arrays(), trees.arrays())
    other = fit_trees(features, y, sees=sees, seed=6, **SMALL, threads=1)
    assert other.arrays()["feature"].tobytes() != trees.arrays()["feature"].tobytes()


def _leaf(value=0.0):
    """One tree that is a leaf."""
    none = np.zeros(0, np.int64)
    return Forest(
        np.zeros(1, np.float32), np.ones(1, np.int64), none, np.zeros(0, np.float32), none, none,
        np.full(1, value, np.float32),
    )  # fmt: skip


def test_a_fit_that_finds_no_split_is_the_mean():
    seen, y = problem(n=30)
    trees = fit_trees(seen.x, y, n_trees=3)
    assert_close(trees.predict(seen), np.full(30, y.mean()), made_in=np.float32)
    assert trees.forest.feature.size == 0


def test_stacking_sees_lines_components_and_level_in_this_order():
    seen = inputs(5)
    found = Trees(_leaf(), "stacking").features(seen)
    np.testing.assert_array_equal(found, np.column_stack([seen.lines, seen.z, seen.log_level]))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(
        Trees(_leaf(2.5), "stacking").predict(seen._replace(x=None)), np.full(5, 2.5)
    )


def test_a_missing_value_goes_to_the_right(booster):
    forest = read_booster(booster).forest
    x = np.full((1, N_PIXELS), np.nan, np.float32)
    first = np.cumsum(forest.n_leaves - 1) - (forest.n_leaves - 1)
    expected = []
    for start in first:
        at = 0
        while at >= 0:
            at = forest.right[start + at]
        expected.append(-1 - at)
    np.testing.assert_array_equal(forest_leaves_reference(x, forest)[0], expected)
    trees = Trees(forest, "flux")
    seen = inputs(1)._replace(x=x)
    assert_close(trees.predict(seen), trees.predict_reference(seen))
    # Not as LightGBM, which takes it for zero where it saw none in the fit.
    assert (booster.predict(x, pred_leaf=True)[0] != expected).any()


def test_arrays_there_and_back(booster):
    for sees in ("flux", "stacking"):
        trees = read_booster(booster, base=3.5, sees=sees)
        back = Trees.from_arrays(trees.arrays().__getitem__)
        assert back.sees == sees
        same_arrays(back.arrays(), trees.arrays())
    with pytest.raises(ValueError, match="sees must be one index"):
        Trees.from_arrays((trees.arrays() | {"sees": np.array([2])}).__getitem__)
    with pytest.raises(ValueError, match="splits and"):
        Trees.from_arrays((trees.arrays() | {"left": np.zeros(3, np.int64)}).__getitem__)


def test_boosters_of_another_kind_are_refused():
    seen, y = problem()
    x = seen.x.copy()
    x[::3] = np.nan
    settings = {"verbosity": -1, "num_threads": 1}
    missing = lightgbm.train(settings, lightgbm.Dataset(x, y, params=settings), num_boost_round=2)
    with pytest.raises(ValueError, match="'NaN'"):
        read_booster(missing)
    whole = np.abs(np.rint(4 * seen.x))
    data = lightgbm.Dataset(whole, y, categorical_feature=[3], params=settings)
    categories = lightgbm.train(
        settings | {"min_data_per_group": 1, "cat_smooth": 1}, data, num_boost_round=5
    )
    with pytest.raises(ValueError, match="'=='"):
        read_booster(categories)
    wide = settings | {"num_leaves": 40, "min_child_samples": 2}
    with pytest.raises(ValueError, match="1 to 32 leaves"):
        read_booster(lightgbm.train(wide, lightgbm.Dataset(seen.x, y, params=wide), num_boost_round=1))


def test_arguments_are_checked(booster):
    seen, y = problem(n=40)
    with pytest.raises(ValueError, match=r"features \(n, f\) and y \(n,\) expected"):
        fit_trees(seen.x, y[1:])
    with pytest.raises(ValueError, match="features"):
        fit_trees(seen.x[:0], y[:0])
    bad = seen.x.copy()
    bad[3, 3] = np.inf
    with pytest.raises(ValueError, match="must be finite"):
        fit_trees(bad, y)
    with pytest.raises(ValueError, match="trees see flux or stacking; found 'z'"):
        Trees(_leaf(), "z")
    with pytest.raises(ValueError, match="which the inputs lack"):
        read_booster(booster).predict(seen._replace(x=None))


def test_without_lightgbm_the_error_says_what_to_install(monkeypatch):
    usual = builtins.__import__

    def without(name, *arguments, **options):
        if name == "lightgbm":
            raise ImportError(name)
        return usual(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    seen, y = problem(n=60)
    with pytest.raises(MoefastError, match=r"pip install 'moefast\[hybrid\]'"):
        fit_trees(seen.x, y)
