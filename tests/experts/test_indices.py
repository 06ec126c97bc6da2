"""Line indices from components: they are those of the spectrum, and a forest on them learns what a depth tells."""

import numpy as np
import pytest
from one_expert import N_COMPONENTS, inputs, model_of, run, same_arrays
from tolerances import assert_close

from moefast.core.line_features import LINES, Line
from moefast.core.metrics import r2
from moefast.experts.indices import MORE_LINES, TreesOnIndices, line_windows
from moefast.experts.protocol import Components, family, fitted_on_components
from moefast.experts.trees import Trees
from moefast.export import open_session

WAVE = np.linspace(7100.2, 8849.8, 2048)
NAMES = [line.name for line in (*LINES, *MORE_LINES)]


@pytest.fixture(scope="module")
def components():
    """Components that are white in noise of an uneven shape, and that hold a line of Mg I among others."""
    draw = np.random.default_rng(1)
    noise = 0.5 + draw.uniform(size=WAVE.size)
    shapes = draw.standard_normal((WAVE.size, N_COMPONENTS)) / 40
    shapes[:, 0] = -0.3 * ((WAVE >= 8803) & (WAVE < 8815))
    vectors = np.linalg.qr(shapes / np.sqrt(noise)[:, None])[0]
    basis = vectors / np.sqrt(noise)[:, None]
    return Components(WAVE, 1 + 0.1 * draw.standard_normal(WAVE.size), noise, basis)


def test_windows_are_those_of_the_spectrum_that_the_components_tell(components):
    draw = np.random.default_rng(2)
    flux = components.reference + components.noise_shape * (
        components.basis @ draw.standard_normal(N_COMPONENTS)
    )
    z = components.basis.T @ (flux - components.reference)
    windows, offsets = line_windows(components)
    found = offsets + z @ windows
    means, continua = np.split(found, 2)
    for i, line in enumerate((*LINES, *MORE_LINES)):
        low, high = line.window
        assert means[i] == pytest.approx(flux[(low <= WAVE) & (high > WAVE)].mean(), abs=1e-9), line.name
        blue, red = (flux[(a <= WAVE) & (b > WAVE)].mean() for a, b in (line.blue, line.red))
        assert min(blue, red) - 0.2 <= continua[i] <= max(blue, red) + 0.2, line.name


def test_the_continuum_of_a_slope_lies_on_it():
    slope = 1 + 1e-4 * (WAVE - 8000)
    own = Components(WAVE, slope, np.ones(WAVE.size), np.eye(WAVE.size, 3))
    continua = np.split(line_windows(own)[1], 2)[1]
    centres = np.array([line.centre for line in (*LINES, *MORE_LINES)])
    np.testing.assert_allclose(continua, 1 + 1e-4 * (centres - 8000), atol=1e-4)


def test_lines_beyond_the_grid_are_left_out(components):
    beyond = Line("beyond", 8900.0, (8890.0, 8910.0), (8870.0, 8880.0), (8915.0, 8920.0))
    assert line_windows(components, [beyond])[0].shape == (N_COMPONENTS, 0)
    assert line_windows(components, [beyond, *LINES])[0].shape == (N_COMPONENTS, 2 * len(LINES))


@pytest.fixture(scope="module")
def fitted(components):
    """A forest for stars whose log g is told by a ratio that no single component holds, and those stars."""
    seen = inputs(3000, 3)
    windows, offsets = line_windows(components)
    means, continua = np.split(offsets + seen.z @ windows, 2, axis=1)
    y = 3 + 8 * (1 - means / np.maximum(continua, 0.05))[:, NAMES.index("MgI_8809")].clip(-0.3, 0.3)
    return TreesOnIndices.fit_on_components(seen, y, components, seed=0), seen, y


def test_what_a_depth_tells_is_learnt_better_than_from_components_alone(fitted):
    expert, seen, y = fitted
    half = slice(0, 1500)
    few = seen._replace(**{name: getattr(seen, name)[half] for name in ("z", "log_level", "lines", "x")})
    components_alone = Trees.fit(few, y[half], seed=0).predict(seen)[1500:]
    assert r2(y, expert.predict(seen)) > 0.97
    assert r2(y[1500:], components_alone) < r2(y[1500:], expert.predict(seen)[1500:])


def test_what_it_computes_in_float32_float64_and_onnx(fitted):
    expert, seen, _ = fitted
    few = seen._replace(**{name: getattr(seen, name)[:131] for name in ("z", "log_level", "lines", "x")})
    expected = expert.predict_reference(few)
    for found in (expert.predict(few), run(open_session(model_of(expert)), few)):
        # A depth that lies on a threshold may go to the other leaf.
        assert np.mean(np.abs(found - expected) < 1e-5) > 0.97
    again = family("trees-indices").read_nodes(model_of(expert), "others.2")
    same_arrays(expert.arrays(), again.arrays())
    same_arrays(expert.arrays(), TreesOnIndices.from_arrays(expert.arrays().__getitem__).arrays())
    assert_close(again.predict(few), expert.predict(few))


def test_it_is_fitted_on_components_and_refuses_others(fitted):
    expert = fitted[0]
    assert fitted_on_components("trees-indices")
    assert not fitted_on_components("trees")
    with pytest.raises(ValueError, match=f"windows of 48 components expected; found {N_COMPONENTS}"):
        expert.check(9, 48, 4096)
    with pytest.raises(ValueError, match="offsets"):
        TreesOnIndices(expert.forest, expert.windows, expert.offsets[:-1])
