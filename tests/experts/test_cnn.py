"""A convolutional network that is scored without torch: against its reference, torch, and what it should learn."""

import builtins

import numpy as np
import pytest
from one_expert import inputs, network, same_arrays
from tolerances import assert_close

from moefast.core.errors import MoefastError
from moefast.experts.cnn import ROWS, ConvNet, fit_conv_net, n_places

P = 320


@pytest.mark.parametrize("n", [0, 1, ROWS - 1, ROWS, ROWS + 1, 53])
@pytest.mark.parametrize("p", [296, P, 333])
def test_matches_the_reference(n, p):
    net, seen = network(p), inputs(n, p=p)
    found = net.predict(seen)
    assert found.dtype == np.float32
    assert found.shape == (n,)
    assert_close(found, net.predict_reference(seen))


@pytest.mark.parametrize("kernels", [(2, 2, 2), (16, 8, 8), (4, 6, 10)])
def test_any_even_kernel_will_do(kernels):
    net, seen = network(kernels=kernels), inputs(9, p=P)
    assert net.v1.shape[0] == 3 * n_places(P, kernels) + 1
    assert_close(net.predict(seen), net.predict_reference(seen))


def test_a_known_answer():
    """Kernels of ones over pixels of one: windows of 4, then 2, then 2, every second place."""
    one = np.ones(1, np.float32)
    net = ConvNet(
        np.zeros(12, np.float32), np.full(12, 0.5, np.float32),
        np.ones((1, 1, 4), np.float32), one, np.ones((1, 1, 2), np.float32), one, np.ones((1, 1, 2), np.float32), -one,
        np.array([[1], [1], [1], [10]], np.float32), one, np.full((1, 1), 2, np.float32), one,
    )  # fmt: skip
    # 12 pixels of 1: 5 places of 0.5 · 4 + 1 = 3, 4 of 7, 3 of 13; then 2 (39 + 10 ln s + 1) + 1.
    seen = inputs(3, p=12)._replace(
        x=np.ones((3, 12), np.float32), log_level=np.array([0, 0.5, -9], np.float32)
    )
    assert n_places(12, (4, 2, 2)) == 3
    np.testing.assert_array_equal(net.predict_reference(seen), [81, 91, 1])
    np.testing.assert_array_equal(net.predict(seen), [81, 91, 1])


def test_a_row_has_the_same_bits_alone_and_in_any_layout():
    net, seen = network(), inputs(40, p=P)
    whole = net.predict(seen)
    for i in (0, 15, 16, 39):
        alone = seen._replace(x=seen.x[i : i + 1], log_level=seen.log_level[i : i + 1])
        assert net.predict(alone)[0] == whole[i]
    spoilt = seen.x.copy()
    spoilt[3] = np.nan
    found = net.predict(seen._replace(x=spoilt))
    good = np.arange(40) != 3
    np.testing.assert_array_equal(found[good], whole[good])
    for same in (np.asfortranarray(seen.x), seen.x.astype(np.float64)):
        np.testing.assert_array_equal(net.predict(seen._replace(x=same)), whole)


def test_arrays_there_and_back():
    net = network()
    same_arrays(ConvNet.from_arrays(net.arrays().__getitem__).arrays(), net.arrays())
    assert net.needs_flux


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reference", np.zeros(P - 1)), ("scale", np.zeros((P, 1))), ("w1", np.zeros((5, 1, 15))),
        ("w2", np.zeros((7, 4, 8))), ("w2", np.zeros((7, 5))), ("b3", np.zeros(4)), ("v1", np.zeros((3, 4))),
        ("c1", np.zeros(5)), ("c1", np.zeros((4, 1))), ("v2", np.zeros((4, 2))), ("c2", np.zeros(2)),
        ("w3", np.zeros((3, 7, 40))), ("w3", np.zeros((3, 7, 0))),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(name, value):
    arrays = network().arrays() | {name: value.astype(np.float32)}
    with pytest.raises(ValueError, match="do not fit together"):
        ConvNet.from_arrays(arrays.__getitem__)


def test_other_types_and_numbers_that_mean_nothing_are_refused():
    arrays = network().arrays()
    with pytest.raises(ValueError, match="b2 of a network must be finite and float32"):
        ConvNet.from_arrays((arrays | {"b2": arrays["b2"].astype(np.float64)}).__getitem__)
    with pytest.raises(ValueError, match="v1 of a network must be finite and float32"):
        ConvNet.from_arrays((arrays | {"v1": np.full_like(arrays["v1"], np.nan)}).__getitem__)


def test_flux_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"flux of shape \(n, 320\); found \(2, 64\)"):
        network().predict(inputs(2))
    with pytest.raises(ValueError, match="found None"):
        network().predict(inputs(2)._replace(x=None))


def stars(n, seed):
    """Clean flux, error and log g, in which lines deepen with log g by an amount that a third number decides."""
    draw = np.random.default_rng(seed)
    log_g, other = draw.uniform(1, 5, n), draw.uniform(-1, 1, n)
    pixel = np.arange(P)
    flux = np.ones((n, P))
    for k, centre in enumerate(range(20, P, 40)):
        depth = 0.1 * (log_g - 3) * other if k % 2 else 0.2 * other
        flux -= (0.25 + depth)[:, None] * np.exp(-0.5 * ((pixel - centre) / 4) ** 2)
    level = np.exp(draw.normal(0, 0.4, (n, 1)))
    error = 0.05 * level * (1 + 0.3 * np.sin(pixel))
    return flux.astype(np.float32), error.astype(np.float32), log_g, np.log(level[:, 0]).astype(np.float32)


FIT = {"reference": np.ones(P), "noise_shape": (0.05 * (1 + 0.3 * np.sin(np.arange(P)))) ** 2}


@pytest.mark.torch
def test_a_fit_learns_what_no_linear_fit_can_and_is_the_same_again():
    flux, error, y, _ = stars(1200, 1)
    told = []
    net = fit_conv_net(flux, error, y, **FIT, seed=4, epochs=15, progress=lambda *step: told.append(step))
    assert told == [(epoch, 15) for epoch in range(1, 16)]
    clean, sigma, truth, level = stars(500, 2)
    noisy = clean + sigma * np.random.default_rng(3).standard_normal(clean.shape, dtype=np.float32)
    seen = inputs(500, p=P)._replace(x=noisy, log_level=level)
    assert np.corrcoef(net.predict(seen), truth)[0, 1] > 0.6
    # The third number changes the sign of every line: linear fits see nothing.
    matrix = np.column_stack([flux, np.ones(len(flux))])
    linear = np.column_stack([noisy, np.ones(500)]) @ np.linalg.lstsq(matrix, y, rcond=1e-3)[0]
    assert abs(np.corrcoef(linear, truth)[0, 1]) < 0.3
    again = [fit_conv_net(flux[:200], error[:200], y[:200], **FIT, seed=seed, epochs=2) for seed in (4, 4, 5)]
    same_arrays(again[0].arrays(), again[1].arrays())
    assert again[0].w1.tobytes() != again[2].w1.tobytes()


@pytest.mark.torch
def test_torch_gives_what_is_scored():
    import torch

    from moefast.experts.cnn import _forward

    net, seen = network(), inputs(6, p=P)
    weights = {name: torch.tensor(value) for name, value in net.arrays().items()}
    scaled = torch.tensor((seen.x - net.reference) * net.scale)
    found = _forward(torch, scaled, torch.tensor(seen.log_level[:, None]), weights)[:, 0].numpy()
    assert_close(found, net.predict_reference(seen))


@pytest.mark.torch
def test_a_fit_ends_when_time_is_up_and_leaves_torch_as_it_was():
    import torch

    usual = torch.get_num_threads()
    flux, error, y, level = stars(300, 1)
    told = []
    net = fit_conv_net(
        flux, error, y, **FIT, epochs=10**6, minutes=0.005, progress=lambda *step: told.append(step)
    )
    assert 1 <= len(told) < 10**5
    assert np.isfinite(net.predict(inputs(300, p=P)._replace(x=flux, log_level=level))).all()
    assert torch.get_num_threads() == usual


def test_arguments_are_checked():
    flux, error, y, _ = stars(4, 1)
    with pytest.raises(ValueError, match="two stars at least expected"):
        fit_conv_net(flux, error[1:], y, **FIT)
    with pytest.raises(ValueError, match="positive noise_shape of 320 pixels"):
        fit_conv_net(flux, error, y, **(FIT | {"noise_shape": np.zeros(P)}))
    with pytest.raises(ValueError, match="40 pixels are too few"):
        fit_conv_net(flux[:, :40], error[:, :40], y, reference=np.ones(40), noise_shape=np.ones(40))
    with pytest.raises(ValueError, match="finite flux"):
        fit_conv_net(flux, -error, y, **FIT)


def test_without_torch_the_error_says_what_to_install(monkeypatch):
    usual = builtins.__import__

    def without(name, *arguments, **options):
        if name == "torch":
            raise ImportError(name)
        return usual(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    flux, error, y, _ = stars(4, 1)
    with pytest.raises(MoefastError, match=r"pip install torch"):
        fit_conv_net(flux, error, y, **FIT)
