"""Boosted trees: the kernel that rules leaves out against the reference that walks, and both against scikit-learn."""

from dataclasses import replace

import numpy as np
import pytest
from made_forest import features, forest
from sklearn.ensemble import GradientBoostingRegressor
from tolerances import assert_close

from moefast.kernels import Forest, forest_predict
from moefast.kernels.forest import LANES, MOST_LEAVES, TILE
from moefast.kernels.reference_forest import forest_leaves_reference, forest_predict_reference

STUMP = {
    "base": np.array([1.0], np.float32),
    "n_leaves": np.array([2, 1]),
    "feature": np.array([1]),
    "threshold": np.array([0.5], np.float32),
    "left": np.array([-1]),
    "right": np.array([-2]),
    "value": np.array([10.0, 20.0, 300.0], np.float32),
}


def test_known_answers():
    x = np.array([[9, 0.4], [9, 0.5], [9, 0.6], [9, np.nan], [9, -np.inf], [9, np.inf]], np.float32)
    expected = [311, 311, 321, 321, 311, 321]
    np.testing.assert_array_equal(forest_predict(x, Forest(**STUMP)), expected)
    np.testing.assert_array_equal(forest_predict_reference(x, Forest(**STUMP)), expected)


@pytest.mark.parametrize("n", [0, 1, 2, LANES - 1, LANES, LANES + 1, 997])
@pytest.mark.parametrize("n_leaves", [[], [1], [2], [1, 2, 3, 1], [MOST_LEAVES], [20] * 37, [31, 32, 17, 1]])
def test_matches_the_reference(n, n_leaves):
    trees, x = forest(n_leaves, seed=n), features(n, seed=n)
    found, expected = forest_predict(x, trees), forest_predict_reference(x, trees)
    assert found.dtype == np.float32
    assert_close(found, expected)


def test_every_leaf_is_reached_and_is_the_one_of_the_reference():
    """A tree at a time whose values are the numbers of its leaves: nothing hides in a sum."""
    reached = 0
    for seed in range(60):
        leaves = 2 + seed % (MOST_LEAVES - 1)
        numbers = np.arange(leaves, dtype=np.float32)
        tree = replace(forest([leaves], seed=seed), base=np.zeros(1, np.float32), value=numbers)
        x = features(400, seed=seed)
        expected = forest_leaves_reference(x, tree)[:, 0]
        np.testing.assert_array_equal(forest_predict(x, tree), expected)
        reached += np.unique(expected).size / leaves
    assert reached > 0.4 * 60  # splits that contradict each other leave some leaves unreachable


@pytest.mark.parametrize("n_features", [TILE - 1, TILE, TILE + 1, 3 * TILE + 7])
def test_more_features_than_a_tile_has(n_features):
    trees = forest([20] * 90, n_features, seed=n_features)
    x = features(150, n_features, seed=1)
    assert_close(forest_predict(x, trees), forest_predict_reference(x, trees))


def test_scikit_learn_judges_the_reference():
    draw = np.random.default_rng(1)
    x, y = draw.standard_normal((400, 6)).astype(np.float32), draw.standard_normal(400)
    model = GradientBoostingRegressor(n_estimators=15, max_depth=4, random_state=0).fit(x, y)
    parts = []
    for (judge,) in model.estimators_:
        tree = judge.tree_
        inner = tree.children_left >= 0
        number = np.where(inner, np.cumsum(inner) - 1, -np.cumsum(~inner))
        sides = (number[side[inner]] for side in (tree.children_left, tree.children_right))
        value = 0.1 * tree.value[~inner, 0, 0]
        # scikit-learn's thresholds are halfway between float32 numbers of these rows: rounding moves none past a row.
        parts.append((tree.feature[inner], tree.threshold[inner], *sides, value))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    feature, threshold, left, right, value = columns
    trees = Forest(
        np.array([y.mean()], np.float32), np.array([len(part[4]) for part in parts]), feature.astype(np.int64),
        threshold.astype(np.float32), left.astype(np.int64), right.astype(np.int64), value.astype(np.float32),
    )  # fmt: skip
    judged = np.column_stack([judge.apply(x) for (judge,) in model.estimators_])
    mine = forest_leaves_reference(x, trees)
    for t, (judge,) in enumerate(model.estimators_):
        np.testing.assert_array_equal(np.flatnonzero(judge.tree_.children_left < 0)[mine[:, t]], judged[:, t])
    assert_close(forest_predict_reference(x, trees), model.predict(x), made_in=np.float32)


def test_a_row_has_the_same_bits_alone_and_in_any_layout():
    trees, x = forest([20] * 40, seed=3), features(300, seed=3)
    whole = forest_predict(x, trees)
    for i in (0, 127, 128, 299):
        assert forest_predict(x[i : i + 1], trees)[0] == whole[i]
    wide = np.zeros((600, 15), np.float32)
    wide[::2, ::3] = x
    for same in (np.asfortranarray(x), wide[::2, ::3], x.astype(np.float64)):
        np.testing.assert_array_equal(forest_predict(same, trees), whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": np.zeros(2, np.float32)}, "one base value"),
        ({"base": np.zeros(1)}, "base of a forest must be a vector of float32"),
        ({"value": np.zeros((3, 1), np.float32)}, "value of a forest must be a vector of float32"),
        ({"value": np.array([1, np.nan, 2], np.float32)}, "must be finite"),
        ({"n_leaves": np.array([2, 0])}, "trees of 1 to 32 leaves"),
        ({"n_leaves": np.array([2, 33])}, "trees of 1 to 32 leaves"),
        ({"n_leaves": np.array([2, 2])}, "2 splits and 4 leaves expected"),
        ({"feature": np.array([-1])}, "features must not be negative"),
        ({"threshold": np.array([np.nan], np.float32)}, "thresholds not NaN"),
        ({"left": np.array([0])}, "a later split or to a leaf"),
        ({"left": np.array([1])}, "a later split or to a leaf"),
        ({"left": np.array([-3])}, "a later split or to a leaf"),
        ({"left": np.array([-2])}, "reached in one way"),
    ],
)
def test_arrays_that_are_no_trees_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Forest(**(STUMP | changes))


def test_a_split_of_two_parents_is_refused():
    trees = forest([4], seed=2)
    inner = np.flatnonzero(trees.left >= 0)
    spoilt = trees.right.copy()
    spoilt[inner[-1]] = trees.left[inner[-1]]
    with pytest.raises(ValueError, match="reached in one way"):
        replace(trees, right=spoilt)


def test_features_are_checked():
    trees = Forest(**STUMP)
    with pytest.raises(ValueError, match=r"x \(n, f\) with 2 features at least expected; found \(3, 1\)"):
        forest_predict(np.zeros((3, 1)), trees)
    with pytest.raises(ValueError, match=r"found \(3,\)"):
        forest_predict(np.zeros(3), trees)
