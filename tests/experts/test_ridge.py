"""Linear experts against scikit-learn, NumPy's eigenvectors and noise that is really drawn."""

import numpy as np
import pytest
import scipy.linalg
from sklearn.linear_model import Ridge
from tolerances import assert_close

from moefast.experts.normal_equations import Moments, NormalEquations
from moefast.experts.ridge import NEGLIGIBLE, NoisePath, principal_subspace, ridge

P, N, RANK = 48, 600, 5


@pytest.fixture(scope="module")
def shape():
    """Noise variance D per pixel."""
    return np.exp(np.random.default_rng(1).normal(-3, 0.6, P))


@pytest.fixture(scope="module")
def rows():
    """Low-rank clean spectra whose label is linear in them."""
    rng = np.random.default_rng(5)
    hidden = rng.standard_normal((N, RANK)) * np.array([3, 2, 1, 0.5, 0.2])
    x = (hidden @ rng.standard_normal((RANK, P)) * 0.2).astype(np.float32)
    y = 3 + hidden @ np.array([0.1, -0.3, 0.5, 0.8, 1.0])
    return x, y


@pytest.fixture(scope="module")
def moments(rows, shape):
    return moments_of(*rows, np.tile(shape, (N, 1)))


def moments_of(x, y, variance=None):
    total = NormalEquations(np.zeros(x.shape[1]))
    total.add(np.asarray(x, np.float32), y, None if variance is None else np.asarray(variance, np.float32))
    return total.moments()


def exact_moments(x, y):
    """The same in float64, where float32 products would hide what is compared."""
    x = np.asarray(x, np.float64)
    centred, wrong = x - x.mean(0), y - y.mean()
    return Moments(
        len(x),
        x.mean(0),
        y.mean(),
        centred.T @ centred,
        centred.T @ wrong,
        wrong @ wrong,
        np.zeros(x.shape[1]),
    )


@pytest.mark.parametrize("alpha", [1.0, 30.0, 1e4])
def test_ridge_is_scikit_learns(rows, alpha):
    x, y = rows
    x = x + 0.1 * np.random.default_rng(0).standard_normal(x.shape).astype(np.float32) + 0.2
    judge = Ridge(alpha=alpha).fit(x.astype(np.float64), y)
    weights, intercept = ridge(moments_of(x, y), alpha)
    assert_close(weights, judge.coef_, made_in=np.float32, factor=10)  # condition number of the system
    assert_close(intercept, judge.intercept_, made_in=np.float32)


def test_ridge_with_noise_per_pixel_is_generalised_ridge(moments, shape):
    weights, intercept = ridge(moments, 2.0, noise=shape)
    direct = np.linalg.solve(moments.gram + np.diag(2.0 + N * shape), moments.cross)
    assert_close(weights, direct)
    assert_close(intercept, moments.mean_y - direct @ moments.mean_x)


def test_a_singular_system_is_refused(moments):
    assert np.linalg.matrix_rank(moments.gram, tol=1e-3) == RANK
    with pytest.raises(np.linalg.LinAlgError):
        ridge(moments, -1.0)


@pytest.mark.parametrize("level", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.01, 1.0])
def test_noise_path_is_ridge_in_a_whitened_basis(rows, shape, level, alpha):
    x, y = rows
    white, moments = exact_moments(x / np.sqrt(shape), y), exact_moments(x, y)
    expected, intercept = ridge(white, N * (level**2 + alpha))
    path = NoisePath(white)
    weights, found = path.solve(level, alpha)
    assert_close(weights, expected, factor=1e3)  # eigenvectors and Cholesky factor round differently
    assert_close(found, intercept)
    # In pixels the same is a ridge with penalty n s² D.
    in_pixels, _ = ridge(moments, 0.0, noise=(level**2 + alpha) * shape)
    assert_close(weights / np.sqrt(shape), in_pixels, factor=1e3)
    system = white.gram + N * (level**2 + alpha) * np.eye(P)
    assert_close(path.condition(level, alpha), np.linalg.cond(system), factor=1e3)


def test_noise_in_the_rows_is_taken_off_before_it_is_added(rows, shape):
    x, y = rows
    clean = moments_of(x / np.sqrt(shape), y)
    noisy = type(clean)(
        clean.n,
        clean.mean_x,
        clean.mean_y,
        clean.gram + clean.n * np.eye(P),
        clean.cross,
        clean.sum_yy,
        clean.variance,
    )
    for level in (0.3, 1.0, 2.0):
        expected, _ = NoisePath(clean).solve(level)
        found, _ = NoisePath(noisy, noise_in_gram=1.0).solve(level)
        assert_close(found, expected, made_in=np.float32)
    # At the level of the rows themselves nothing was taken off: plain least squares of the noisy rows.
    found, _ = NoisePath(noisy, noise_in_gram=1.0).solve(1.0)
    assert_close(found, np.linalg.solve(noisy.gram, noisy.cross), made_in=np.float32)


def test_noisy_copies_converge_to_the_closed_form(rows, shape):
    x, y = rows
    sigma = np.sqrt(shape)
    closed, _ = ridge(moments_of(x, y), 0.0, noise=shape)
    metric = x.T.astype(np.float64) @ x / N + np.diag(shape)

    def distance(draws, seed):
        rng = np.random.default_rng(seed)
        total = NormalEquations(np.zeros(P))
        for _ in range(draws):
            total.add(x + (sigma * rng.standard_normal(x.shape)).astype(np.float32), y)
        wrong = ridge(total.moments(), 0.0)[0] - closed
        return wrong @ metric @ wrong

    few = np.mean([distance(8, seed) for seed in range(4)])
    many = np.mean([distance(72, seed + 10) for seed in range(4)])
    # Squared errors shrink as 1/draws: 9 here, give or take the scatter of a few dozen random numbers.
    assert 6 < few / many < 13.5
    assert many < 3e-3 * closed @ metric @ closed


def test_each_levels_expert_is_the_best_at_its_level(rows, shape):
    x, y = rows
    white = moments_of(x / np.sqrt(shape), y)
    path = NoisePath(white)
    levels = (0.1, 0.3, 1.0, 3.0)
    experts = [path.solve(s) for s in levels]
    average = path.solve(float(np.sqrt(np.mean(np.square(levels)))))
    for own, level in zip(experts, levels, strict=True):
        best = white.sse(*own, noise=level**2)
        assert 0 < best < white.sum_yy
        for other in (average, *experts):
            if other is not own:
                assert best < white.sse(*other, noise=level**2)
        for step in np.random.default_rng(3).standard_normal((5, P)) * 0.01:
            assert best < white.sse(own[0] + step, own[1] - step @ white.mean_x, noise=level**2)


def test_subspace_is_that_of_numpys_eigenvectors(rows, shape):
    moments = exact_moments(*rows)
    scale = 1 / np.sqrt(shape)
    white = moments.gram * np.outer(scale, scale) / N
    values, vectors = np.linalg.eigh(white)
    values, vectors = values[::-1], vectors[:, ::-1]
    assert values[RANK - 1] > 100 * NEGLIGIBLE > 1e3 * values[RANK]
    found = principal_subspace(moments, shape)
    assert found.basis.shape == (P, RANK)
    assert_close(found.variance, values[:RANK])
    assert found.discarded < NEGLIGIBLE
    orthonormal = found.basis / scale[:, None]
    assert_close(orthonormal.T @ orthonormal, np.eye(RANK))
    assert np.rad2deg(scipy.linalg.subspace_angles(orthonormal, vectors[:, :RANK]).max()) < 1e-3
    assert_close(np.abs((orthonormal * vectors[:, :RANK]).sum(0)), np.ones(RANK))
    assert_close(found.captured, (found.basis**2).sum(1))


def test_subspace_of_limited_rank_says_what_it_leaves(rows, shape):
    moments = exact_moments(*rows)
    scale = 1 / np.sqrt(shape)
    values = np.linalg.eigvalsh(moments.gram * np.outer(scale, scale) / N)[::-1]
    found = principal_subspace(moments, shape, max_rank=3)
    assert found.basis.shape == (P, 3)
    assert_close(found.variance, values[:3])
    assert_close(found.discarded, values[3:].sum(), factor=1e2)  # a difference of larger sums


def test_a_large_subspace_of_a_decaying_spectrum_is_accurate():
    rng = np.random.default_rng(0)
    p, n = 200, 1000
    orthogonal, _ = np.linalg.qr(rng.standard_normal((p, p)))
    x = (rng.standard_normal((n, p)) * 2.0 ** -np.arange(p).clip(max=40)) @ orthogonal * 10
    moments = exact_moments(x, np.zeros(n))
    found = principal_subspace(moments, np.ones(p), max_rank=20)
    values, vectors = np.linalg.eigh(moments.gram / n)
    assert values[-12] > NEGLIGIBLE > values[-13]
    assert_close(found.variance, values[::-1][:12])
    assert scipy.linalg.subspace_angles(found.basis[:, :8], vectors[:, ::-1][:, :8]).max() < 1e-3


def test_signs_do_not_depend_on_the_random_start(rows, shape):
    moments = exact_moments(*rows)
    one, two = principal_subspace(moments, shape, seed=0), principal_subspace(moments, shape, seed=1)
    assert not np.array_equal(one.basis, two.basis)
    assert_close(one.basis, two.basis, factor=1e3)  # the least component is 1e4 times weaker than the first
    white = one.basis * np.sqrt(shape)[:, None]
    assert (white[np.abs(white).argmax(0), np.arange(RANK)] > 0).all()
    np.testing.assert_array_equal(principal_subspace(moments, shape, seed=0).basis, one.basis)
