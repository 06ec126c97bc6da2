"""Files of DESI as another package reads them: the same fluxes, errors and bad pixels, and the same log g."""

from pathlib import Path

import numpy as np
import pytest

import moefast
from moefast.predicting.files import predict
from moefast.spectra.layouts.registry import open_survey_file

specutils = pytest.importorskip("specutils")

DESI = Path(__file__).parents[2] / ".." / "shared" / "data" / "desi"
FILES = (
    "coadd-4-80613-thru20210324.fits",
    "coadd-5-169-thru20210419.fits",
    "spectra-5-169-thru20210419.fits",
)


def given(name):
    if not (DESI / name).exists():
        pytest.skip(f"{name} is not in {DESI}")
    return DESI / name


@pytest.mark.parametrize("name", FILES)
def test_fluxes_of_given_desi_files_are_those_of_specutils(name):
    path = given(name)
    theirs = specutils.SpectrumList.read(path)
    ours = open_survey_file(path)
    arms, faults = ours.read("flux", 0, ours.n_rows)
    assert len(arms) == len(theirs) == 3
    assert faults == {}
    good_pixels = 0
    for arm, spectrum in zip(arms, theirs, strict=True):
        shape = spectrum.flux.shape
        np.testing.assert_allclose(arm.wave, spectrum.spectral_axis.to_value("Angstrom"), rtol=1e-12)
        flux = spectrum.flux.to_value("1e-17 erg / (s cm2 Angstrom)")
        np.testing.assert_allclose(arm.flux.reshape(shape), flux, rtol=1e-6)
        ivar = spectrum.uncertainty.array
        good = (ivar > 0) & ~spectrum.mask
        np.testing.assert_array_equal(~arm.bad.reshape(shape), good)
        np.testing.assert_allclose(arm.error.reshape(shape)[good], ivar[good] ** -0.5, rtol=1e-6)
        good_pixels += good.sum()
    # One row of each file has data.
    assert good_pixels > 7000


def test_a_spectrum_of_specutils_is_predicted_as_its_file():
    """The Z arm alone, as the command has it."""
    path = given(FILES[0])
    spectrum = specutils.SpectrumList.read(path)[2]
    model = moefast.load("observed")
    table = model.predict(spectrum)
    # The file has the R arm, too: its pixels must not matter here.
    blue = spectrum.spectral_axis.to_value("Angstrom")[0]
    arm = open_survey_file(path).read("flux", 0, 1)[0][2]
    bad = arm.bad.reshape(1, -1)
    same = model.predict(
        arm.flux.reshape(1, -1), arm.error.reshape(1, -1), wave=arm.wave, mask=bad,
        unit="1e-17 erg / (s cm2 Angstrom)",
    )  # fmt: skip
    assert blue > model.mixture.wave[0]
    for name in ("log_g", "log_g_err", "chi2", "scale"):
        np.testing.assert_allclose(table[name], same[name], rtol=1e-4)
    assert predict(path, model).n_rows == len(table) == 1
