"""The errors of log g are those of the predictions themselves, group by group and gap by gap."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from moefast.benchmarks import accuracy
from moefast.core.errors import InputError, OutputError
from moefast.model import Model
from moefast.simulate import simulate_file
from moefast.simulate.gaps import telluric_pixels
from moefast.spectra import open_spectra

N = 600


@pytest.fixture(scope="module")
def stars(tmp_path_factory):
    path = tmp_path_factory.mktemp("accuracy") / "stars.h5"
    simulate_file(path, N, seed=7, noisy=True)
    return path


@pytest.fixture(scope="module")
def model():
    return Model.load("z0")


def test_rows_are_the_errors_of_the_predictions(stars, model):
    spectra = open_spectra(stars)
    truth = spectra.labels(("log_g",))["log_g"]
    (block,) = spectra.blocks(N, array="noisy")
    found = accuracy.run(model, stars, gaps=("none", "telluric"), backend="cpu")
    rows = {(one["gap"], one["group"]): one for one in found["rows"]}
    lost = np.repeat(telluric_pixels(spectra.wave)[None], N, axis=0)
    for gap, mask in (("none", None), ("telluric", lost)):
        prediction = model.mixture.predict(block.flux, block.error, mask)
        good = np.ones(block.flux.shape, bool) if mask is None else ~mask
        ratio = np.nanmedian(np.where(good, block.flux / block.error, np.nan), axis=1)
        for group, (low, high) in accuracy.RATIOS.items():
            # Stars at a limit of a group may lie on either side of it, by the rounding of the ratio.
            margin = 1e-4
            inside = (ratio >= low + margin) & (ratio <= high - margin)
            assert np.array_equal(inside, (ratio >= low - margin) & (ratio <= high + margin))
            assert inside.sum() > 5
            one = rows[gap, group]
            assert one["n"] == inside.sum()
            apart = (prediction.log_g - truth)[inside]
            assert one["rms"] == pytest.approx(np.sqrt(np.mean(apart**2)), abs=1e-5)
            assert one["median_error"] == pytest.approx(np.median(prediction.log_g_err[inside]), abs=1e-5)
    assert rows["telluric", "all"]["rms"] > rows["none", "all"]["rms"]
    assert rows["none", "SNR 20"]["rms"] < rows["none", "SNR 10"]["rms"] < rows["none", "SNR 5"]["rms"]
    json.dumps(found, allow_nan=False)


def test_the_command_prints_and_writes_and_names_what_is_wrong(stars, tmp_path):
    out = tmp_path / "errors.json"
    call = [str(stars), "z0", "-o", str(out), "--backend", "cpu"]
    printed = CliRunner().invoke(accuracy.main, call, catch_exceptions=False)
    assert printed.exit_code == 0
    assert "600 spectra of stars.h5; errors of log g in dex" in printed.output
    assert json.loads(out.read_text(encoding="utf-8"))["n"] == N
    with pytest.raises(OutputError, match="exists already"):
        CliRunner().invoke(accuracy.main, call, catch_exceptions=False)
    with pytest.raises(InputError, match="'sunspots' is none of none, telluric"):
        CliRunner().invoke(accuracy.main, [str(stars), "z0", "--gap", "sunspots"], catch_exceptions=False)
