"""The study of gates for the faintest stars: noise drawn in components is that of pixels, bounds lie above gates."""

import numpy as np
import pytest
import small

from moefast.benchmarks import c2
from moefast.benchmarks.studies import faint_gates as study
from moefast.core.metrics import r2
from moefast.fitting import fit_mixture
from moefast.recipes import options_of
from moefast.simulate import REFERENCE_SETS, SimulatedSpectra


@pytest.fixture(scope="module")
def source():
    """Rows of z0 in bins of four pixels."""
    emulator, settings = small.emulator(), REFERENCE_SETS["z0"].settings

    def make(part, first, n):
        seed = REFERENCE_SETS["z0"].parts[part].seed
        return SimulatedSpectra(n, seed=seed, first_row=first, emulator=emulator, settings=settings)

    return make


def test_noise_drawn_in_components_scatters_as_that_of_pixels_does(source):
    fit = fit_mixture(
        source("train", 0, 1500), options_of("template", references=False, sample_rows=2048, sample_draws=1)
    )
    teachers = source("train", c2.GATE_ROWS, 400)
    pixels = c2.gather(fit.mixture, fit.references["global-ridge"], teachers, 20, faint=True)
    drawn = study.in_components(fit.mixture, teachers, 20, 0)
    assert len(drawn.y) == 400 * 20
    for one, other in ((pixels.view(48), drawn.view(48)), (pixels.values, drawn.values)):
        np.testing.assert_allclose(one.std(0), other.std(0), rtol=0.06)
        np.testing.assert_allclose(one.mean(0), other.mean(0), atol=0.06 * one.std(0).max())


def test_every_gate_stays_within_the_values_and_below_what_bounds_it(source):
    y, found = study.measure(
        source("train", 0, 1500), source("train", c2.GATE_ROWS, 600), source("validation", 0, 900),
        draws=2, white=4, steps=60, seed=0,
    )  # fmt: skip
    names = list(found)
    bound, mean = names[-2:]
    assert (bound[:8], mean[:8]) == ("any gate", "no gate:")
    scores = {name: r2(y, log_g) for name, log_g in found.items()}
    assert scores["phys-moe"] < scores[bound] <= scores[mean] + 0.01
    assert all(len(log_g) == len(y) and np.isfinite(log_g).all() for log_g in found.values())
