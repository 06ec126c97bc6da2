"""Boosted regression trees as an expert: fitted by LightGBM, kept and scored as arrays of our own.

    log g = base + Σ_t value_t[leaf_t(x)],    x the raw flux, or line features, principal components and noise level.

Design: LightGBM is needed to fit and for nothing else. Its thresholds are float64 and compared with features that were
float32; each is replaced by the largest float32 that is not above it, which decides every comparison with a float32 in
the same way: x ≤ threshold holds for the one exactly if it holds for the other. Rounding to the nearest float32 would
send features that lie on a threshold to the other leaf. Leaf values are rounded to float32; the mean of log g is
subtracted before the fit and kept as `base`, so that they are small and the rounding is 1e-8 dex.

In ONNX the trees are one `TreeEnsembleRegressor`, whose attributes hold every number; there is no initializer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moefast.core.errors import ModelError, MoefastError
from moefast.core.threads import CORES
from moefast.experts.protocol import Expert, ExpertValues, Inputs, expert
from moefast.kernels import Forest, forest_predict
from moefast.kernels.reference_forest import forest_predict_reference
from moefast.ops.arithmetic import SolvingArithmetic

if TYPE_CHECKING:
    from typing import Self

    from onnx import ModelProto

__all__ = [
    "SEES",
    "Trees",
    "TreesOnFlux",
    "ensemble",
    "fit_trees",
    "float32_below",
    "forest_arrays",
    "read_booster",
    "read_ensemble",
    "read_forest",
    "stacking",
]

SEES = ("flux", "stacking")
"""What trees may see: raw flux, or line features, principal components and ln noise level, in this order."""
STACKED = ("lines", "z", "log_level")
OPERATOR, DOMAIN = "TreeEnsembleRegressor", "ai.onnx.ml"


@expert
@dataclass(frozen=True)
class Trees(Expert):
    """A forest and what it sees of a star.

    Attributes
    ----------
    forest : Forest
        Gives log g in dex.
    sees : str
        One of `SEES`.

    Raises
    ------
    ValueError
        `sees` is none of them.
    """

    forest: Forest
    sees: str

    family: ClassVar[str] = "trees"
    requires: ClassVar[tuple[str, ...]] = ("lightgbm",)

    def __post_init__(self) -> None:
        if self.sees not in SEES:
            raise ValueError(f"trees see {' or '.join(SEES)}; found {self.sees!r}")

    @property
    def needs_flux(self) -> bool:
        """Whether `Inputs.x` is needed."""
        return self.sees == "flux"

    def features(self, inputs: Inputs) -> NDArray[np.float32]:
        """What the trees see, (n, f), float32.

        Raises
        ------
        ValueError
            Flux is needed and missing.
        """
        if self.sees == "stacking":
            return stacking(inputs)
        if inputs.x is None:
            raise ValueError("these trees see flux, which the inputs lack; give x")
        return np.asarray(inputs.x, np.float32)

    def evaluate(self, inputs: Inputs) -> ExpertValues:
        """Log g of each star, (n, 1), dex."""
        return ExpertValues(forest_predict(self.features(inputs), self.forest)[:, None])

    def describe(self, op: SolvingArithmetic, seen: Mapping[str, Any]) -> ExpertValues:
        """One tree ensemble, after a concatenation if it sees several inputs; see `Expert`."""
        names = ("x",) if self.sees == "flux" else STACKED
        return ExpertValues(ensemble(op, self.forest, [seen[name] for name in names]))

    @classmethod
    def fit(cls, inputs: Inputs, y: NDArray, *, seed: int) -> Self:
        """A forest on line features, components and noise level; see `fit_trees`."""
        return cls(fit_trees(stacking(inputs), y, sees="stacking", seed=seed).forest, "stacking")

    def arrays(self) -> dict[str, NDArray]:
        """Arrays of the forest, and `sees` (1,) as an index of `SEES`."""
        return forest_arrays(self.forest) | {"sees": np.array([SEES.index(self.sees)], np.int64)}

    @classmethod
    def from_arrays(cls, read: Callable[[str], NDArray]) -> Self:
        """The inverse of `arrays`.

        Raises
        ------
        ValueError
            They do not fit together.
        """
        sees = read("sees")
        if sees.shape != (1,) or not 0 <= sees[0] < len(SEES):
            raise ValueError(f"sees must be one index of {SEES}; found {sees}")
        return cls(read_forest(read), SEES[int(sees[0])])

    @classmethod
    def read_nodes(cls, model: ModelProto, stem: str) -> Self:
        """From an ONNX model, to the last bit.

        Raises
        ------
        ModelError
            There is no such node, or it holds something else than `describe` writes.
        """
        forest, several = read_ensemble(model, stem)
        return cls(forest, "stacking" if several else "flux")


@expert
class TreesOnFlux(Trees):
    """A forest on noisy flux as it is, never standardised: the published way."""

    family: ClassVar[str] = "trees-flux"
    fits_on_flux: ClassVar[bool] = True

    @classmethod
    def fit(cls, inputs: Inputs, y: NDArray, *, seed: int) -> Self:
        """A forest on flux; see `fit_trees`."""
        if inputs.x is None:
            raise ValueError("these trees see flux, which the inputs lack; give x")
        return cls(fit_trees(inputs.x, y, sees="flux", seed=seed).forest, "flux")


def stacking(inputs: Inputs) -> NDArray[np.float32]:
    """Line features, principal components and ln noise level of each star, (n, f), float32."""
    columns = [inputs.lines, inputs.z, np.asarray(inputs.log_level)[:, None]]
    return np.concatenate(columns, axis=1, dtype=np.float32)


def ensemble(op: SolvingArithmetic, forest: Forest, columns: Sequence[Any]) -> Any:
    """What a forest says of columns side by side, (n, 1).

    Parameters
    ----------
    op : SolvingArithmetic
    forest : Forest
    columns : sequence of values of shape (n, …)
        One, or several that are joined.
    """

    def run(*arrays: NDArray) -> NDArray:
        # Trees are fitted to features in single precision: a threshold decides between these.
        features = np.concatenate(arrays, axis=1, dtype=np.float32)
        return forest_predict_reference(features, forest)[:, None]

    def write(graph: Any, names: Sequence[str], stem: str) -> str:
        features = names[0] if len(names) == 1 else graph.add("Concat", names, _features(stem), axis=1)
        return str(graph.add(OPERATOR, [features], _ensemble(stem), domain=DOMAIN, **_attributes(forest)))

    return op.step(columns, run, write)


def read_ensemble(model: ModelProto, stem: str) -> tuple[Forest, bool]:
    """The forest that `ensemble` wrote, to the last bit, and whether it sees several columns side by side.

    Raises
    ------
    ModelError
        There is no such node, or it holds something else than `ensemble` writes.
    """
    from onnx import helper

    name = _ensemble(stem)
    node = next((node for node in model.graph.node if node.name == name), None)
    if node is None or (node.op_type, node.domain) != (OPERATOR, DOMAIN) or len(node.input) != 1:
        raise ModelError(
            f"the ONNX model lacks the trees {name!r}; write it again with this moefast, and trees in it"
        )
    found = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    try:
        forest = _forest(found)
        fits = all(_same(found.pop(key), value) for key, value in _attributes(forest).items())
    except (KeyError, ValueError, TypeError, IndexError, OverflowError) as error:
        raise ModelError(f"the trees {name!r} of the ONNX model cannot be read: {error}") from error
    if not fits or found:
        raise ModelError(
            f"the trees {name!r} of the ONNX model are not as moefast writes them; write it again"
        )
    return forest, node.input[0] == _features(stem)


def _features(stem: str) -> str:
    return f"{stem}/features"


def _ensemble(stem: str) -> str:
    return f"{stem}/trees"


def forest_arrays(forest: Forest) -> dict[str, NDArray]:
    """Arrays of a forest by name."""
    return {name: getattr(forest, name) for name in _ARRAYS}


def read_forest(read: Callable[[str], NDArray]) -> Forest:
    """The inverse of `forest_arrays`; raises ValueError if they do not fit together."""
    return Forest(**{name: read(name) for name in _ARRAYS})


_ARRAYS = ("base", "n_leaves", "feature", "threshold", "left", "right", "value")


# --- ONNX ------------------------------------------------------------------------------------------------------


def _attributes(forest: Forest) -> dict[str, Any]:
    """Attributes of a `TreeEnsembleRegressor`: of each tree the splits in their order, then the leaves in theirs."""
    n_splits, n_leaves = forest.n_leaves - 1, forest.n_leaves
    split_tree = np.repeat(np.arange(forest.n_trees), n_splits)
    leaf_tree = np.repeat(np.arange(forest.n_trees), n_leaves)
    first_split, first_leaf = np.cumsum(n_splits) - n_splits, np.cumsum(n_leaves) - n_leaves
    split = np.arange(forest.feature.size) - first_split[split_tree]
    leaf = np.arange(forest.value.size) - first_leaf[leaf_tree] + n_splits[leaf_tree]
    # Trees one behind the other, splits before leaves.
    order = np.lexsort((np.concatenate([split, leaf]), np.concatenate([split_tree, leaf_tree])))

    def nodes(of_splits: NDArray, of_leaves: NDArray | None = None) -> list:
        others = np.zeros(leaf.size, of_splits.dtype) if of_leaves is None else of_leaves
        return np.concatenate([of_splits, others])[order].tolist()

    def children(child: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.where(child < 0, n_splits[split_tree] - 1 - child, child)

    modes = nodes(np.full(split.size, True), np.full(leaf.size, False))
    return {
        "aggregate_function": "SUM",
        "base_values": forest.base.tolist(),
        "n_targets": 1,
        "nodes_falsenodeids": nodes(children(forest.right)),
        "nodes_featureids": nodes(forest.feature),
        "nodes_modes": ["BRANCH_LEQ" if is_split else "LEAF" for is_split in modes],
        "nodes_nodeids": nodes(split, leaf),
        "nodes_treeids": nodes(split_tree, leaf_tree),
        "nodes_truenodeids": nodes(children(forest.left)),
        "nodes_values": nodes(forest.threshold),
        "post_transform": "NONE",
        "target_ids": [0] * leaf.size,
        "target_nodeids": leaf.tolist(),
        "target_treeids": leaf_tree.tolist(),
        "target_weights": forest.value.tolist(),
    }


def _forest(attributes: Mapping[str, Any]) -> Forest:
    """The inverse of `_attributes`, of attributes that may be anything."""
    tree = np.array(attributes["nodes_treeids"], np.int64)
    split = np.array([mode == b"BRANCH_LEQ" for mode in attributes["nodes_modes"]], np.bool_)
    if split.shape != tree.shape or (tree.size and (tree.min() < 0 or tree.max() >= tree.size)):
        raise ValueError("the numbers of its trees do not fit")
    n_leaves = np.bincount(tree[~split])
    n_splits = (n_leaves - 1)[tree[split]]

    def children(name: str) -> NDArray[np.int64]:
        child = np.array(attributes[name], np.int64)[split]
        return np.where(child < n_splits, child, n_splits - 1 - child)

    def numbers(name: str) -> NDArray[np.float32]:
        return np.array(attributes[name], np.float32)

    return Forest(
        numbers("base_values"), n_leaves, np.array(attributes["nodes_featureids"], np.int64)[split],
        numbers("nodes_values")[split], children("nodes_truenodeids"), children("nodes_falsenodeids"),
        numbers("target_weights"),
    )  # fmt: skip


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, str):
        return bool(found == expected.encode())
    if isinstance(expected, list) and expected and isinstance(expected[0], str):
        return list(found) == [word.encode() for word in expected]
    return bool(found == expected)


# --- fitting ---------------------------------------------------------------------------------------------------


def float32_below(values: ArrayLike) -> NDArray[np.float32]:
    """The largest float32 that is not above each value; x ≤ it exactly if x ≤ value, for every float32 x."""
    exact = np.asarray(values, np.float64)
    with np.errstate(over="ignore"):
        nearest = exact.astype(np.float32)
    return np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def fit_trees(
    features: NDArray,
    y: NDArray,
    weight: NDArray | None = None,
    *,
    sees: str = "flux",
    seed: int = 0,
    n_trees: int = 500,
    depth: int = 5,
    leaves: int = 20,
    rate: float = 0.05,
    least_stars: int = 50,
    threads: int = CORES,
) -> Trees:
    """Fit boosted trees: each of `n_trees` steps takes `rate` of a tree fitted to what is left of log g.

    The strong regularisation is that of the published experts: 0.3 of the features and 0.7 of the stars for each tree,
    penalties 1 on the size and the square of leaf values. The result does not depend on the number of threads.

    Parameters
    ----------
    features : array of shape (n, f), float32
        As they are scored: noisy flux, never standardised, or what `Trees.features` gives for "stacking".
    y : array of shape (n,), dex
        Log g.
    weight : array of shape (n,), optional
        What each star counts, not negative; each one, if None. `least_stars` counts stars all the same.
    sees : str
        Which of `SEES` the features are.
    seed : int
        Of the features and stars that are left out.
    n_trees, depth, leaves : int
        Trees; splits above a leaf and leaves of a tree, at most (32 leaves are the bound of `Forest`).
    rate : float
    least_stars : int
        Stars in a leaf.
    threads : int

    Raises
    ------
    ValueError
        Shapes do not fit, a number is not finite (trees are fitted without missing values), a weight is negative, or
        all are zero.
    MoefastError
        LightGBM is not installed.
    """
    x, target = np.ascontiguousarray(features, np.float32), np.asarray(y, np.float64)
    if x.ndim != 2 or target.shape != (len(x),) or len(x) == 0:
        raise ValueError(f"features (n, f) and y (n,) expected; found {x.shape} and {target.shape}")
    if not np.isfinite(x).all() or not np.isfinite(target).all():
        raise ValueError("features and y must be finite")
    if weight is not None and (
        np.shape(weight) != target.shape
        or not np.all((weight >= 0) & np.isfinite(weight))
        or not np.any(weight)
    ):
        raise ValueError(f"{target.size} weights that are not negative expected; found {np.shape(weight)}")
    try:
        import lightgbm
    except ImportError as error:
        raise MoefastError(
            "trees are fitted by LightGBM, which is not installed; pip install 'moefast[hybrid]'"
        ) from error
    settings = {
        "objective": "regression", "max_depth": depth, "num_leaves": leaves, "learning_rate": rate,
        "feature_fraction": 0.3, "bagging_fraction": 0.7, "bagging_freq": 1, "min_child_samples": least_stars,
        "reg_alpha": 1.0, "reg_lambda": 1.0, "boost_from_average": False, "use_missing": False,
        "deterministic": True, "force_col_wise": True, "num_threads": threads, "seed": seed, "verbosity": -1,
    }  # fmt: skip
    base = np.float32(np.average(target, weights=weight))
    data = lightgbm.Dataset(x, target - base, weight=weight, params=settings)
    return read_booster(lightgbm.train(settings, data, num_boost_round=n_trees), base=float(base), sees=sees)


def read_booster(booster: Any, *, base: float = 0.0, sees: str = "flux") -> Trees:
    """The trees of a LightGBM booster that was fitted without missing values and categories.

    Parameters
    ----------
    booster : lightgbm.Booster
    base : float
        Added to what the booster gives.
    sees : str
        One of `SEES`.

    Raises
    ------
    ValueError
        The booster has splits of another kind, or trees that `Forest` does not take.
    """
    n_leaves: list[int] = []
    splits: list[tuple[int, float, int, int]] = []
    values: list[float] = []
    for tree in booster.dump_model()["tree_info"]:
        found = dict(_splits(tree["tree_structure"]))
        of_leaves = dict(_leaves(tree["tree_structure"]))
        n_leaves.append(len(of_leaves))
        splits += [found[k] for k in range(len(found))]
        values += [of_leaves[k] for k in range(len(of_leaves))]
    feature, threshold, left, right = np.array(splits, np.float64).reshape(-1, 4).T
    whole = (column.astype(np.int64) for column in (feature, left, right))
    feature64, left64, right64 = whole
    return Trees(
        Forest(
            np.array([base], np.float32), np.array(n_leaves, np.int64), feature64, float32_below(threshold),
            left64, right64, np.array(values, np.float64).astype(np.float32),
        ),
        sees,
    )  # fmt: skip


def _nodes(root: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    waiting = [root]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [node[side] for side in ("left_child", "right_child") if side in node]


def _number(node: Mapping[str, Any]) -> int:
    # A tree that is one leaf has no number.
    return node["split_index"] if "split_index" in node else -1 - node.get("leaf_index", 0)


def _splits(root: Mapping[str, Any]) -> Iterator[tuple[int, tuple[int, float, int, int]]]:
    """Number of each split, and its feature, threshold and children."""
    for node in _nodes(root):
        if "split_index" not in node:
            continue
        if node["decision_type"] != "<=" or node["missing_type"] != "None":
            raise ValueError(
                f"splits 'x <= threshold' without missing values expected; found {node['decision_type']!r} with "
                f"{node['missing_type']!r}"
            )
        children = _number(node["left_child"]), _number(node["right_child"])
        yield node["split_index"], (node["split_feature"], node["threshold"], *children)


def _leaves(root: Mapping[str, Any]) -> Iterator[tuple[int, float]]:
    """Number of each leaf, and its value."""
    for node in _nodes(root):
        if "split_index" not in node:
            yield -1 - _number(node), node["leaf_value"]
