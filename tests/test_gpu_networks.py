"""The benchmark of networks on a GPU, run on a CPU at small sizes: what it times, and what it checks."""

import numpy as np
import pytest
from click.testing import CliRunner

from moefast.benchmarks import gpu_networks
from moefast.model import Model
from moefast.trunks.heads import Heads
from moefast.trunks.networks import KINDS

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def mixture():
    return Model.load("survey").mixture


def test_the_step_of_every_trunk_is_timed(mixture, monkeypatch):
    monkeypatch.setattr(gpu_networks, "POOL", 64)
    found = gpu_networks.measure_fit(mixture, "small", 20, device="cpu", batch=4)
    assert set(found) == set(KINDS)
    for entry in found.values():
        assert (
            entry["fused"]["kernels"] == entry["plain"]["kernels"] == "plain"
        )  # no GPU, nothing to fuse for
        assert entry["plain"]["milliseconds"] > 0
        seconds = 1e-3 * entry["plain"]["milliseconds"]
        assert entry["plain"]["tflops"] == pytest.approx(entry["flop_per_star"] * 4 / seconds / 1e12)


def test_scores_agree_with_float64(mixture):
    found = gpu_networks.measure_scores(mixture, "small", 1, backend="cpu", rows=32, block=32)
    assert len(found) == 2 * len(KINDS)
    for entry in found.values():
        assert entry["agrees"]
        assert entry["difference"] > 0
        assert entry["rows_per_second"] > 0


def test_scores_that_differ_are_told(mixture, monkeypatch):
    """A graph of another network than the one that float64 scores."""

    def other(mine, **more):
        heads = mine.place(Heads)
        numbers = {**heads.numbers, "log_g.scale": heads.numbers["log_g.scale"] + np.float32([0.1, 0])}
        return build(mine.with_expert(Heads(heads.plan, numbers)), **more)

    build = gpu_networks.build
    monkeypatch.setattr(gpu_networks, "build", other)
    monkeypatch.setattr(gpu_networks, "KINDS", ("pca-mlp",))
    found = gpu_networks.measure_scores(mixture, "small", 1, backend="cpu", rows=32, block=32)
    assert not any(entry["agrees"] for entry in found.values())


def test_operations_of_a_product_are_two_per_number(mixture):
    heads = gpu_networks.network_of("pca-mlp", "small", mixture)
    matrices = [a for name, a in heads.numbers.items() if name.endswith(".w") and name != "heads.w"]
    assert gpu_networks.flops(torch, heads) == 2 * sum(a.size for a in matrices)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_nothing_is_measured():
    done = CliRunner().invoke(gpu_networks.main, [])
    assert done.exit_code == 7
    assert "sees no GPU" in done.output
