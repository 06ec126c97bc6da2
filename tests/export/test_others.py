"""Mixtures in which trees and networks stand in for linear experts: the same numbers in ONNX Runtime, and back."""

import pytest
from one_expert import network, same_arrays
from plans import random_mixture, random_trees

from moefast.export import build, read_mixture
from moefast.export.parity import verify


@pytest.fixture(scope="module")
def mixture():
    plain = random_mixture()
    with_trees = plain.with_expert(random_trees(plain.n_pixels, "flux"), 0)
    return with_trees.with_expert(network(plain.n_pixels), 3).with_expert(network(plain.n_pixels, seed=1), 4)


@pytest.mark.parametrize("part", ["mixture", "expert-0", "expert-3", "expert-4", "expert-1"])
def test_onnx_runtime_gives_the_contract(mixture, part):
    # It raises where they differ.
    assert verify(build(mixture, part), mixture)


def test_read_back_is_exact(mixture):
    model = build(mixture)
    back = read_mixture(model, mixture.wave)
    assert back.families == ["trees", "linear", "linear", "cnn", "cnn"]
    for mine, theirs in zip(back.experts, mixture.experts, strict=True):
        assert mine.bins == theirs.bins
        same_arrays(mine.expert.arrays(), theirs.expert.arrays())
    assert build(back).SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)
