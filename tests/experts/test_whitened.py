"""The whitened ridge: a plane in components over the noise level is found again, in float32, float64 and ONNX."""

import numpy as np
import pytest
from one_expert import inputs, model_of, run, same_arrays
from tolerances import assert_close

from moefast.experts.protocol import family
from moefast.experts.whitened import Whitened
from moefast.export import open_session


def plane(n, seed=1):
    """Stars whose log g is a plane in z/s and 1/s, and that plane."""
    seen = inputs(n, seed)
    draw = np.random.default_rng(seed)
    weights, intercept = draw.standard_normal(seen.z.shape[1] + 1), 2.7
    inverse = np.exp(-seen.log_level.astype(np.float64))[:, None]
    y = np.concatenate([seen.z * inverse, inverse], 1) @ weights + intercept
    return seen, y, weights, intercept


def test_a_plane_is_found_again():
    seen, y, weights, intercept = plane(4000)
    found = Whitened.fit(seen, y, seed=0)
    np.testing.assert_allclose(found.weights[:, 0], weights, atol=0.02)
    assert found.intercept[0] == pytest.approx(intercept, abs=0.05)
    assert np.abs(found.predict_reference(seen) - y).mean() < 0.05


def test_noise_in_the_labels_is_met_by_a_larger_penalty():
    seen, y, weights, _ = plane(40)
    noise = 30 * np.random.default_rng(5).standard_normal(len(y))
    few = Whitened.fit(seen, noise, seed=0)
    # There is nothing to learn, and no weight is much.
    assert np.abs(few.weights).max() < 0.3 * np.abs(np.linalg.lstsq(
        np.concatenate([seen.z * np.exp(-seen.log_level)[:, None], np.exp(-seen.log_level)[:, None]], 1),
        noise - noise.mean(), rcond=None,
    )[0]).max()  # fmt: skip
    assert len(few.weights) == len(weights)


def test_what_it_computes_in_float32_float64_and_onnx():
    seen, y, _, _ = plane(131)
    expert = Whitened.fit(seen, y, seed=0)
    inverse = np.exp(-seen.log_level.astype(np.float64))[:, None]
    features = np.concatenate([seen.z * inverse, inverse], 1)
    expected = features @ expert.weights[:, 0].astype(np.float64) + float(expert.intercept[0])
    assert_close(expert.predict_reference(seen), expected)
    np.testing.assert_allclose(expert.predict(seen), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(run(open_session(model_of(expert)), seen), expected, rtol=1e-4, atol=1e-4)
    same_arrays(expert.arrays(), family("whitened").read_nodes(model_of(expert), "others.2").arrays())


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="intercept"):
        Whitened(np.zeros((3, 2), np.float32), np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="49 weights expected; found 7"):
        Whitened(np.zeros((7, 1), np.float32), np.zeros(1, np.float32)).check(9, 48, 4096)
