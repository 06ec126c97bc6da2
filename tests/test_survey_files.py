"""The benchmark of survey files writes files that both readers find the same stars in, and counts what it times."""

import numpy as np
import pytest
from astropy.io import fits

from moefast.benchmarks import survey_files
from moefast.benchmarks.survey_files import run
from moefast.core.errors import BenchmarkError
from moefast.spectra.opening import open_prepared
from moefast.spectra.prepared import Preparation

WAYS = ["bytes", "astropy", "moefast reads", "moefast predicts", "velocities fitted"]


def test_a_coadd_of_any_number_of_rows(model, tmp_path, monkeypatch):
    monkeypatch.setattr(survey_files, "ROWS", 16)
    found = run(tmp_path, "coadd", 21, model, repeats=1)
    assert list(found["rates"]) == WAYS
    assert all(np.all(np.array(samples) > 0) for samples in found["rates"].values())
    with fits.open(tmp_path / "coadd" / "coadd.fits") as file:
        file.verify("exception")
        assert file["Z_FLUX"].data.shape == (21, 2881)
        np.testing.assert_array_equal(file["Z_FLUX"].data[16:], file["Z_FLUX"].data[:5])


def test_spectra_that_were_not_read_are_not_counted():
    with pytest.raises(BenchmarkError, match="1 spectrum read or predicted, 3 expected"):
        survey_files._timed(lambda: 1, 3)


def test_files_of_one_star_each(model, tmp_path):
    found = run(tmp_path, "objects", 5, model, repeats=1)
    assert found["spectra"] == 5
    assert found["bytes"] > 5 * 400_000
    spectra = open_prepared(tmp_path / "objects", Preparation(model.mixture.wave, telluric="keep"))
    np.testing.assert_array_equal(spectra.params(["objId"])["objId"], 1_000_000_000 + np.arange(5))
    flux = np.concatenate([block.flux for block in spectra.blocks(10)])
    assert len(np.unique(flux[:, 100])) == 5
