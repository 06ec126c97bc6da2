import numpy as np
import pytest

from moefast.mixture import Mixture


def random_mixture(n_pixels=512, n_experts=5, n_levels=4, n_components=12, n_others=0, hidden=16, seed=0):
    """A mixture of random numbers whose predictions are of order one and react to every input."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    noise_shape = (0.01 * np.exp(0.5 * rng.standard_normal(n_pixels))).astype(np.float32)
    orthogonal, _ = np.linalg.qr(rng.standard_normal((n_pixels, n_components)))
    return Mixture(
        wave=np.linspace(7100.2, 8849.8, n_pixels),
        reference=np.float32(1) + normal(n_pixels, scale=0.1),
        noise_shape=noise_shape,
        knots=np.linspace(-1.5, 1.5, n_levels).astype(np.float32),
        columns=np.concatenate(
            [orthogonal / np.sqrt(noise_shape)[:, None], normal(n_pixels, n_others)], axis=1
        ).astype(np.float32),
        n_basis=n_components,
        expert_weights=normal(n_experts, n_levels, n_components + n_others, scale=n_pixels**-0.5),
        expert_intercepts=3 + normal(n_experts, n_levels, scale=0.3),
        gate=(normal(14, hidden, scale=0.1), normal(hidden), normal(hidden, n_experts), normal(n_experts)),
        error_model=(normal(17, 8, scale=0.1), normal(8), normal(8, 1, scale=0.3), normal(1, scale=0.3)),
        # Not numbers that float32 holds: the file must keep them exactly all the same.
        label_range=(2.6180339, 3.1415926),
    )


@pytest.fixture(scope="session")
def mixture():
    return random_mixture()


@pytest.fixture
def make_mixture():
    return random_mixture
