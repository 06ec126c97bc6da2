"""Fitting a network: noise that is what it should be, steps that can be repeated and gone on from, and stars learnt."""

import resource
import signal
import sys

import numpy as np
import pytest
from tolerances import assert_close

from moefast.core.errors import MoefastError
from moefast.core.line_features import LEAST_CONTINUUM
from moefast.kernels.reference import line_features
from moefast.ops.arithmetic import is_half, is_matrix
from moefast.trunks import training
from moefast.trunks.heads import Heads
from moefast.trunks.networks import NetworkPlan, start

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

RANK, N_LINES, P = 6, 12, 320
SCHEDULE = training.Schedule(steps=40, batch=64, looks=4, seed=5)


@pytest.fixture(autouse=True)
def one_thread():
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


def made_stars(n=600, seed=0):
    """Stars in components whose log g bends along the first of them, and windows far above zero."""
    rng = np.random.default_rng(seed)
    z = (rng.standard_normal((n, RANK)) * np.linspace(3, 1, RANK)).astype(np.float32)
    log_g = 3 + np.abs(z[:, 0]) / 3 + 0.2 * z[:, 1]
    level = rng.uniform(-1, 0, n).astype(np.float32)
    windows = (5 + 0.1 * z @ rng.standard_normal((RANK, N_LINES))).astype(np.float32)
    labels = training.Labels(log_g, z[:, :2].astype(np.float64), (z[:, 0] > 0).astype(np.int64))
    return z, windows, level, labels


def fitted(folder=None, schedule=SCHEDULE, stop_after=None, monkeypatch=None, key="one"):
    z, windows, level, labels = made_stars()
    rng = np.random.default_rng(9)
    root = 0.1 * rng.standard_normal((RANK + N_LINES, RANK + N_LINES))
    covariance = root @ root.T
    covariance[:RANK, :RANK] = np.eye(RANK)
    covariance[:RANK, RANK:] = covariance[RANK:, :RANK] = 0
    widths = np.full(N_LINES // 3, 2, np.float32)
    stars = training.StarsInComponents(torch, "cpu", z, windows, level, covariance, widths, LEAST_CONTINUUM)
    plan = NetworkPlan("pca-mlp", RANK, 2, width=32, head=8, gate=8)
    begin = training.scaled(
        Heads(plan, start(plan, 0)),
        {
            "variance": z.var(0),
            "log_g.scale": [labels.log_g.mean(), labels.log_g.std()],
            "level.limits": [-1, 0],
        },
    )
    seen = {
        "z": z[:200] + np.exp(level[:200, None]) * rng.standard_normal((200, RANK)),
        "log_level": level[:200, None], "lines": line_features(windows[:200], widths, LEAST_CONTINUUM),
    }  # fmt: skip
    judges = training.Judges(seen, labels.log_g[:200])
    if stop_after is not None:
        look = training._Training.look

        def stopped(self, *told):
            look(self, *told)
            if len(self.curve) == stop_after:
                raise KeyboardInterrupt

        monkeypatch.setattr(training._Training, "look", stopped)
    return training.fit_heads(begin, stars, labels, judges, schedule, checkpoint=folder, key=key)


def assert_same(a, b):
    for name in a.numbers:
        np.testing.assert_array_equal(a.numbers[name], b.numbers[name], err_msg=name)


def test_noise_of_components_has_the_covariance_that_it_should_have():
    rng = np.random.default_rng(1)
    joint = rng.standard_normal((40, RANK + N_LINES))
    covariance = joint.T @ joint / 40
    z, windows, _, _ = made_stars(2)
    level = np.log(np.float32([2, 2]))
    # Windows are seen as line features alone; with continua of one these are the windows, but for signs.
    windows[:] = 1e6
    stars = training.StarsInComponents(
        torch, "cpu", z, windows, level, covariance, np.zeros(N_LINES // 3, np.float32), 0.1
    )
    random = torch.Generator().manual_seed(0)
    seen = stars.draw(torch.zeros(20_000, dtype=torch.int64), random)
    noise = seen["z"].numpy() - z[0]
    expected = 4 * covariance[:RANK, :RANK]
    # 20 000 draws know a variance to one per cent.
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert np.abs(np.cov(noise.T) - expected).max() < 0.04 * scale.max()
    assert np.abs(noise.mean(0)).max() < 0.05 * np.sqrt(np.diag(expected)).max()
    # Depth is 1 − core/continuum ≈ (continuum − core)/10⁶.
    depth = 1e6 * seen["lines"].numpy().astype(np.float64)[:, 0]
    core, continuum = RANK, RANK + 2
    spread = covariance[core, core] + covariance[continuum, continuum] - 2 * covariance[core, continuum]
    assert depth.var() == pytest.approx(4 * spread, rel=0.15)


def test_noise_of_pixels_is_that_of_the_file():
    rng = np.random.default_rng(2)
    inverse = rng.uniform(1, 3, P).astype(np.float32)
    reference = rng.uniform(1, 2, P).astype(np.float32)
    flux, error = (
        rng.standard_normal((2, P)).astype(np.float16),
        rng.uniform(0.5, 2, (2, P)).astype(np.float16),
    )
    columns = rng.uniform(0, 1, (P, N_LINES)).astype(np.float32)
    stars = training.StarsInPixels(
        torch, "cpu", flux, error, np.zeros(2, np.float32), reference, inverse, columns,
        np.ones(N_LINES // 3, np.float32), LEAST_CONTINUUM,
    )  # fmt: skip
    seen = stars.draw(torch.ones(5000, dtype=torch.int64), torch.Generator().manual_seed(0))
    scaled = seen["scaled"].numpy()
    np.testing.assert_allclose(scaled.mean(0), flux[1].astype(float), atol=5 * 2 / 5000**0.5)
    np.testing.assert_allclose(scaled.std(0), error[1].astype(float), rtol=0.05)
    whole = scaled.astype(np.float64) / inverse + reference
    expected = line_features(whole @ columns, np.ones(N_LINES // 3), LEAST_CONTINUUM)
    assert_close(seen["lines"].numpy(), expected, made_in=np.float32, factor=10)  # a sum of 320 terms


def test_a_fit_learns_what_no_line_can_say():
    heads, curve, kernels = fitted(schedule=training.Schedule(steps=400, batch=128, looks=10, seed=1))
    assert [look["step"] for look in curve] == list(range(40, 401, 40))
    assert curve[-1]["r2"] > 0.5  # noise of a third to one, of a signal of three; a line explains 0.15 of it
    assert curve[-1]["r2"] > curve[0]["r2"]
    assert "labels.w" not in heads.numbers
    assert kernels == "plain"
    assert all(is_half(name, array) for name, array in heads.numbers.items() if is_matrix(name, array.ndim))


def test_the_same_seed_gives_the_same_network_and_another_another_one():
    assert_same(fitted()[0], fitted()[0])
    other = fitted(schedule=training.Schedule(steps=40, batch=64, looks=4, seed=6))[0]
    assert not np.array_equal(other.numbers["in.w"], fitted()[0].numbers["in.w"])


def test_a_fit_that_was_stopped_goes_on_to_the_same_network(tmp_path, monkeypatch):
    whole, curve, _ = fitted()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fitted(tmp_path, stop_after=2, monkeypatch=patch)
    assert (tmp_path / "heads.safetensors").exists()
    again, found, _ = fitted(tmp_path)
    assert_same(again, whole)
    assert found == curve
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["cut", "edited", "step"])
def test_a_checkpoint_that_was_changed_is_told_and_not_used(damage, tmp_path, monkeypatch, caplog):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fitted(tmp_path, stop_after=2, monkeypatch=patch)
    path = tmp_path / "heads.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "edited":
        content[-3] ^= 1
    else:
        at = content.index(b'"step":"20"')
        content[at : at + 11] = b'"step":"10"'
    path.write_bytes(content)
    assert_same(fitted(tmp_path)[0], fitted()[0])
    assert "heads.safetensors: not a complete checkpoint" in caplog.text


def test_a_disk_that_takes_no_checkpoint_is_told_and_the_fit_goes_on(tmp_path, caplog):
    """The limit on the size of a file is a disk that is full there, for libraries that write past Python, too."""
    expected = fitted()[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        found = fitted(tmp_path)[0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert_same(found, expected)
    assert "heads.safetensors: the checkpoint after step 10 could not be written" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_fit_is_not_used(tmp_path):
    fitted(tmp_path)
    other = training.Schedule(steps=40, batch=32, looks=4, seed=5)
    assert_same(fitted(tmp_path, schedule=other)[0], fitted(schedule=other)[0])
    fitted(tmp_path)
    assert_same(fitted(tmp_path, schedule=SCHEDULE, key="two")[0], fitted()[0])


def test_a_fit_that_no_longer_gains_ends():
    schedule = training.Schedule(steps=4000, batch=8, rate=1e-9, looks=400, seed=5)
    curve = fitted(schedule=schedule).curve
    best = max(range(len(curve)), key=lambda i: curve[i]["r2"])
    assert len(curve) < 400
    assert len(curve) - 1 - best >= training.PATIENCE - 1


def test_a_fit_that_breaks_down_says_so():
    with pytest.raises(MoefastError, match="broke down at step"):
        fitted(schedule=training.Schedule(steps=40, batch=64, rate=1e30, looks=4, seed=5))


def fused_by(backend, monkeypatch):
    """Fit as on a GPU: loss and gradients compiled, in one piece, by a backend of `torch.compile`."""

    class Fused(training._Training):
        def __init__(self, *told):
            super().__init__(*told)
            self._fused = torch.compile(self.loss, fullgraph=True, backend=backend)

    monkeypatch.setattr(training, "_Training", Fused)
    torch.compiler.reset()
    return fitted()


def test_loss_and_gradients_can_be_compiled_in_one_piece(monkeypatch):
    plain = fitted()
    fused = fused_by("aot_eager", monkeypatch)
    assert fused.kernels == "fused"
    assert_same(fused.heads, plain.heads)


def test_without_a_compiler_a_fit_is_plain_and_says_why(monkeypatch):
    def broken(graph, examples):
        raise RuntimeError("no compiler here")

    plain = fitted()
    found = fused_by(broken, monkeypatch)
    assert found.kernels.startswith("plain: torch.compile failed")
    assert "no compiler here" in found.kernels
    assert_same(found.heads, plain.heads)


def test_torch_is_left_as_it_was():
    before = torch.get_float32_matmul_precision()
    fitted()
    assert torch.get_float32_matmul_precision() == before


def test_without_safetensors_a_checkpoint_is_refused_before_the_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    with pytest.raises(MoefastError, match=r"moefast\[networks\]"):
        fitted(tmp_path)


def test_without_torch_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MoefastError, match="pip install torch"):
        training.load_torch()
