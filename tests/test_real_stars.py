"""Observed stars and spectra of another emulator: the data say what they are, the cases are what they are called."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from moefast.benchmarks import independent, real_stars
from moefast.core.errors import InputError, OutputError
from moefast.model import Model
from moefast.simulate import Emulator, NoiseModel, simulate_file
from moefast.spectra import open_spectra
from moefast.spectra.telluric import telluric_pixels

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "pfsspec_contiguous.h5"


@pytest.fixture(scope="module")
def model():
    return Model.load("z0")


@pytest.fixture(scope="module")
def found(model):
    return real_stars.run(model, draws=50, backend="cpu")


def test_the_stars_are_the_published_ones_with_source_and_licence():
    wave, stars = real_stars.read_stars()
    np.testing.assert_allclose(wave, Emulator.load().wave, atol=1e-6)
    labels = {star.name: (star.t_eff, star.log_g, star.m_h) for star in stars}
    assert labels == {
        "Sun": (5771, 4.438, 0), "HD 140283": (5792, 3.65, -2.36), "HD 122563": (4636, 1.4, -2.62),
    }  # fmt: skip
    for star in stars:
        assert star.source
        assert star.licence in {"MIT", "Apache-2.0"}
        assert np.median(star.flux) == pytest.approx(1.0, abs=1e-5)
        # Ca II is where it belongs for a star at rest, in vacuum.
        near = np.abs(wave - 8544.4) < 4
        assert abs(wave[near][star.flux[near].argmin()] - 8544.4) < 0.6
    assert real_stars.DATA.stat().st_size < 300_000


@pytest.mark.parametrize("snr", real_stars.SNRS)
def test_noise_is_of_the_ratio_that_is_asked_for(snr):
    _, stars = real_stars.read_stars()
    noise = NoiseModel(Emulator.load().wave_edges)
    flux, error = real_stars.case(stars[0], snr, noise, draws=20)
    assert np.median(stars[0].flux / error[0]) == pytest.approx(snr, rel=1e-3)
    assert ((flux - stars[0].flux) / error).std() == pytest.approx(1.0, abs=0.01)
    again, _ = real_stars.case(stars[0], snr, noise, draws=3, first=5)
    np.testing.assert_array_equal(again, flux[5:8])


def test_every_case_is_measured(found):
    cases = {(one["star"], one["snr"], one["mask"]): one for one in found["cases"]}
    assert len(cases) == 12
    json.dumps(found, allow_nan=False)
    # What the model is known to do: the Sun at SNR 20 is nearly right with all pixels.
    sun = cases["Sun", 20.0, "none"]
    assert abs(sun["bias"]) < 0.35
    assert sun["bias"] == pytest.approx(sun["mean"] - 4.438, abs=1e-6)
    assert 0.1 < sun["scatter"] < 0.35
    assert cases["Sun", 5.0, "none"]["scatter"] > sun["scatter"]
    # Without the pixels that the mask takes, the answer is another one.
    assert cases["Sun", 20.0, "telluric"]["mean"] != pytest.approx(sun["mean"], abs=1e-3)
    text = real_stars.format_text(found)
    assert text.count("\n  Sun ") == 4
    assert "Apache-2.0" in text


def test_the_mask_reaches_the_model(found, model, monkeypatch):
    seen = []
    honest = real_stars.score_block

    def spy(engine, block, first):
        seen.append(block.mask)
        return honest(engine, block, first)

    monkeypatch.setattr(real_stars, "score_block", spy)
    real_stars.run(model, draws=2, backend="cpu")
    lost = telluric_pixels(Emulator.load().wave)
    assert [mask is None for mask in seen] == [True, False] * 6
    assert all((mask == lost).all() for mask in seen if mask is not None)


def test_commands(tmp_path, found):
    out = tmp_path / "stars.json"
    call = CliRunner().invoke(
        real_stars.main, ["z0", "-n", "2", "-o", str(out), "--backend", "cpu"], catch_exceptions=False
    )
    assert call.exit_code == 0
    assert "2 draws of noise" in call.output
    assert len(json.loads(out.read_text(encoding="utf-8"))["cases"]) == 12
    with pytest.raises(OutputError, match="exists already"):
        CliRunner().invoke(real_stars.main, ["z0", "-o", str(out)], catch_exceptions=False)
    with pytest.raises(InputError, match="not a file of observed stars"):
        real_stars.read_stars(tmp_path / "absent.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["wave"] = np.ones(3)
        file.create_group("Sun")
    with pytest.raises(InputError, match="not a file of observed stars"):
        real_stars.read_stars(tmp_path / "other.h5")


# --- another emulator --------------------------------------------------------------------------------------


def test_own_spectra_give_what_is_known_of_them(tmp_path, model):
    """Our own simulator in the place of the other one: z0 has R² 0.767 there."""
    simulate_file(tmp_path / "own.h5", 200, seed=5, noisy=False)
    found = independent.run(model, tmp_path / "own.h5", draws=2, backend="cpu")
    plain, masked = found["masks"]
    assert 0.65 < plain["r2"] < 0.87
    assert 0.6 < plain["within_1_sigma"] < 0.76
    assert masked["r2"] < plain["r2"]
    assert abs(plain["r2_expected"] - plain["r2"]) < 0.1  # honest errors say what R² they allow
    assert masked["r2_expected"] < plain["r2_expected"]
    brighter = independent.run(model, tmp_path / "own.h5", draws=2, noise_level=0.5, backend="cpu")
    assert brighter["masks"][0]["r2"] > plain["r2"] + 0.03
    assert brighter["snr_median"] == pytest.approx(2 * found["snr_median"], rel=1e-6)
    ours = independent.run(model, tmp_path / "own.h5", draws=2, emulator=True, backend="cpu")
    assert ours["masks"][0]["r2"] == pytest.approx(
        plain["r2"], abs=2e-3
    )  # the file's spectra are the emulator's
    json.dumps(found, allow_nan=False)
    call = CliRunner().invoke(
        independent.main,
        [str(tmp_path / "own.h5"), "z0", "-n", "1", "-o", str(tmp_path / "o.json")],
        catch_exceptions=False,
    )
    assert call.exit_code == 0
    assert "200 spectra of own.h5, 1 draws of noise" in call.output
    assert json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))["n"] == 200


@pytest.mark.skipif(not SHARED.exists(), reason="the independent spectra are not in shared/data")
def test_independent_spectra(model):
    found = independent.run(model, SHARED, draws=3, backend="cpu")
    assert found["n"] == 64
    known = open_spectra(SHARED).params(("snr",))["snr"]
    assert found["snr_median"] == pytest.approx(np.median(known), rel=1e-4)
    assert all(-1 < one["r2"] < 1 for one in found["masks"])
