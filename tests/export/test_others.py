"""Mixtures in which trees and networks stand in for linear experts: the same numbers in ONNX Runtime, and back."""

from dataclasses import replace

import pytest
from one_expert import network, same_arrays
from plans import random_mixture, random_trees

from moefast.export import build, read_mixture
from moefast.export.parity import verify


@pytest.fixture(scope="module")
def mixture():
    plain = random_mixture()
    others = {
        0: random_trees(plain.n_pixels, "flux"),
        3: network(plain.n_pixels),
        4: network(plain.n_pixels, seed=1),
    }
    return replace(plain, others=others)


@pytest.mark.parametrize("part", ["mixture", "expert-0", "expert-3", "expert-4", "expert-1"])
def test_onnx_runtime_gives_the_contract(mixture, part):
    # It raises where they differ.
    assert verify(build(mixture, part), mixture)


def test_read_back_is_exact(mixture):
    model = build(mixture)
    back = read_mixture(model, mixture.wave)
    assert {k: expert.family for k, expert in back.others.items()} == {0: "trees", 3: "cnn", 4: "cnn"}
    for k, expert in mixture.others.items():
        same_arrays(back.others[k].arrays(), expert.arrays())
    assert build(back).SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)
