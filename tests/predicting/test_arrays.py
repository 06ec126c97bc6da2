"""Spectra in memory: the numbers of the command, whatever they are wrapped in."""

from __future__ import annotations

import pydoc
import queue
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from astropy import units
from astropy.nddata import InverseVariance, NDData, StdDevUncertainty, VarianceUncertainty
from astropy.table import Table
from small import same_rows
from survey_files import write_desi

import moefast
from moefast.backend import Backend
from moefast.core.errors import InputError, OddSpectraWarning
from moefast.predicting import arrays, spectra_in_memory
from moefast.predicting.arrays import predict_arrays
from moefast.predicting.engines import CpuEngine, Place
from moefast.predicting.files import predict
from moefast.spectra.resample import Pixels

LIGHT_SPEED = 299_792.458
UNIT = units.Unit("1e-17 erg / (s cm2 Angstrom)")


@pytest.fixture(scope="module")
def few(stars):
    return stars.take(slice(0, 40)).observed()


@pytest.fixture(scope="module")
def plain(few, model):
    return predict_arrays(few.flux, few.error, model)


def as_columns(table):
    return {name: np.asarray(table[name]) for name in table.colnames}


def test_the_numbers_are_those_of_the_command(few, model, plain, tmp_path):
    path = few.write(tmp_path / "x.h5", params=())
    same_rows(as_columns(plain), predict(path, model).columns, but=())
    assert plain["log_g"].unit == units.dex
    assert plain["log_g_err"].description.startswith("calibrated")
    assert plain.meta["model"] == model.name
    assert moefast.predict_arrays is predict_arrays


def test_masks_are_those_of_the_command(few, model, tmp_path):
    mask = np.random.default_rng(0).random(few.flux.shape) < 0.2
    masked = few.take(slice(0, 40))
    masked = type(masked)(masked.wave, masked.flux, masked.error, masked.noisy, masked.params, mask)
    path = masked.write(tmp_path / "x.h5", arrays=("flux", "error", "mask"), params=())
    want = predict(path, model).columns
    same_rows(as_columns(predict_arrays(few.flux, few.error, model, mask=mask)), want, but=())
    hidden = np.ma.MaskedArray(few.flux, mask)
    same_rows(as_columns(predict_arrays(hidden, few.error, model)), want, but=())


def test_one_star(few, model, plain):
    one = predict_arrays(few.flux[3], few.error[3], model, wave=few.wave)
    assert len(one) == 1
    same_rows(as_columns(one), as_columns(plain), slice(0, 1), other_rows=slice(3, 4))


def test_units_are_converted_and_normalised(few, model):
    """nJy at vacuum wavelengths in nm: F_λ of any scale, divided by its median."""
    flux, error = few.flux.astype(float), few.error.astype(float)
    scale = np.median(flux, 1, keepdims=True)
    want = predict_arrays(flux / scale, error / scale, model)
    wave = few.wave * units.AA
    f_nu = (flux * 3 * UNIT).to(units.nJy, equivalencies=units.spectral_density(wave))
    f_error = (error * 3 * UNIT).to(units.nJy, equivalencies=units.spectral_density(wave))
    got = predict_arrays(f_nu, f_error, model, wave=wave.to(units.nm), telluric="keep")
    np.testing.assert_allclose(got["log_g"], want["log_g"], atol=2e-4)
    said = predict_arrays(f_nu.value, f_error.value, model, unit="nJy", wave=few.wave, telluric="keep")
    np.testing.assert_allclose(said["log_g"], want["log_g"], atol=2e-4)


@pytest.mark.parametrize("kind", ["std", "var", "ivar"])
def test_objects_of_other_packages(kind, few, model, plain):
    wrap = {"std": StdDevUncertainty, "var": VarianceUncertainty, "ivar": InverseVariance}[kind]
    power = {"std": 1, "var": 2, "ivar": -2}[kind]
    uncertainty = wrap(few.error.astype(float) ** power)
    mask = np.zeros(few.flux.shape, bool)
    table = predict_arrays(NDData(few.flux, uncertainty=uncertainty, mask=mask), model=model)
    np.testing.assert_allclose(table["log_g"], plain["log_g"], atol=1e-4)
    spectra = [
        SimpleNamespace(
            flux=few.flux[i] * UNIT, spectral_axis=few.wave / 10 * units.nm, mask=None,
            uncertainty=wrap(few.error[i].astype(float) ** power * UNIT**power),
        )
        for i in range(5)
    ]  # fmt: skip
    got = predict_arrays(spectra, model=model, telluric="keep")
    scale = np.median(few.flux[:5], 1, keepdims=True)
    want = predict_arrays(few.flux[:5] / scale, few.error[:5] / scale, model)
    np.testing.assert_allclose(got["log_g"], want["log_g"], atol=1e-4)


def test_a_velocity_is_removed(few, model, plain):
    """Wavelengths that are stretched by 1 + v/c, with v: the spectra at rest, but for rounding."""
    velocity = np.linspace(-300, 300, 40)
    wave = few.wave * (1 + velocity[:, None] / LIGHT_SPEED)
    got = predict_arrays(few.flux, few.error, model, wave=wave, velocity=velocity)
    np.testing.assert_allclose(got["log_g"], plain["log_g"], atol=1e-3)
    np.testing.assert_allclose(got["v_los"], velocity, rtol=1e-6)
    one = predict_arrays(few.flux, few.error, model, wave=wave[39], velocity=0.3e6 * units.m / units.s)
    np.testing.assert_allclose(one["log_g"], plain["log_g"], atol=1e-3)
    assert (
        np.abs(predict_arrays(few.flux, few.error, model, wave=wave)["log_g"] - plain["log_g"])[[0, 39]].max()
        > 0.01
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"error": None}, "every spectrum needs its 1σ"),
        ({"error": np.ones((40, 7))}, r"error has shape \(40, 7\), flux \(40, 1024\)"),
        ({"mask": np.ones((3, 1024))}, r"mask has shape \(3, 1024\)"),
        ({"wave": np.ones(7)}, r"wave has shape \(7,\)"),
        ({"wave": np.linspace(8850, 7100, 1024)}, "spectrum 0: wave: wavelength of pixel 1 is not above"),
        ({"wave": np.full(1024, np.nan)}, "spectrum 0: wave: wavelength of pixel 0 is not finite"),
        ({"wave": np.ones(1024) * units.Hz}, "expected a length"),
        ({"unit": "electron"}, "must be flux-calibrated first"),
        ({"velocity": np.ones(3)}, r"one for each of 40 spectra, expected; found shape \(3,\)"),
        ({"velocity": np.nan}, "needs a finite one"),
        ({"scale": 1e-17}, "its scale cannot be told. Say unit="),
        ({"flux": np.ones((40, 7)), "error": np.ones((40, 7))}, "flux has 7 pixels, the model's grid 1024"),
        ({"flux": np.full((2, 1024), "x")}, "numbers of shape"),
    ],
)
def test_what_makes_no_sense(change, match, few, model):
    given = {"flux": few.flux, "error": few.error} | change
    scale = given.pop("scale", None)
    if scale:
        given |= {"flux": few.flux * scale, "error": few.error * scale}
    with pytest.raises(InputError, match=match):
        predict_arrays(given.pop("flux"), given.pop("error"), model, **given)


class Slots(CpuEngine):
    """An engine whose blocks lie in memory of its own, as those of a GPU do, and which says where they were scored."""

    def __init__(self, mixture, block_rows, slots):
        super().__init__(mixture, block_rows=block_rows, workers=slots)
        names = ("flux", "error", "mask")
        kinds = (np.float32, np.float32, np.bool_)
        made = [
            {
                name: np.empty((block_rows, mixture.n_pixels), kind)
                for name, kind in zip(names, kinds, strict=True)
            }
            for _ in range(slots)
        ]
        object.__setattr__(self, "free", queue.SimpleQueue())
        object.__setattr__(self, "in_place", [])
        object.__setattr__(self, "filling", threading.Barrier(slots, timeout=60))
        for slot in made:
            self.free.put(slot)

    @contextmanager
    def place(self):
        slot = self.free.get()

        def array(name, shape):
            if name == "flux":
                # Goes on when all slots are filled at the same time.
                self.filling.wait()
            return slot[name][: shape[0]]

        def score(flux, error, mask, first_row):
            own = [np.shares_memory(a, slot[name]) for a, name in ((flux, "flux"), (error, "error"))]
            self.in_place.append(all(own) and (mask is None or np.shares_memory(mask, slot["mask"])))
            return self(flux, error, mask, first_row)

        try:
            yield Place(array, score)
        finally:
            self.free.put(slot)


@pytest.mark.parametrize("kind", [np.float32, np.float64, ">f4"])
def test_spectra_are_copied_once_to_where_a_device_reads_them_by_several_threads(
    kind, few, model, plain, monkeypatch
):
    engine = Slots(model.mixture, 10, 2)
    monkeypatch.setattr(arrays, "open_engine", lambda *_: (engine, Backend("cpu", "slots", "")))
    taken = []
    real = Pixels.take
    monkeypatch.setattr(
        Pixels, "take", lambda arm, rows: taken.append((arm, real(arm, rows))) or taken[-1][1]
    )
    found = predict_arrays(few.flux.astype(kind), few.error.astype(kind), model)
    same_rows(as_columns(found), as_columns(plain), but=())
    assert engine.in_place == [True] * 4
    # Those that are looked at before the first is scored may be copied.
    assert all(np.shares_memory(some.flux, arm.flux) for arm, some in taken)
    mask = np.random.default_rng(0).random(few.flux.shape) < 0.2
    predict_arrays(few.flux.astype(kind), few.error.astype(kind), model, mask=mask)
    assert engine.in_place == [True] * 8


def test_the_scale_is_told_from_some_of_many_spectra(few, model, monkeypatch):
    """Medians of all pixels of a million spectra would take longer than to predict them."""
    looked_at = []
    real = np.median
    monkeypatch.setattr(
        spectra_in_memory.np, "median", lambda values: looked_at.append(len(values)) or real(values)
    )
    many = np.broadcast_to(few.flux[:1], (3000, few.flux.shape[1]))
    spectra_in_memory._check_scale(many, np.broadcast_to(few.error[:1], many.shape), many > 1e30)
    assert max(looked_at) <= 256 * many.shape[1]
    with pytest.raises(InputError, match="a median of"):
        spectra_in_memory._check_scale(1e-17 * many, 1e-17 * np.abs(many), many > 1e30)


def test_a_model_predicts_by_itself(few, model, plain, tmp_path):
    mask = np.random.default_rng(0).random(few.flux.shape) < 0.2
    same_rows(as_columns(model.predict(few.flux, few.error)), as_columns(plain), but=())
    one = model.predict(
        few.flux[3], error=few.error[3], wave=few.wave, mask=mask[3], velocity=-26 * units.km / units.s
    )
    many = predict_arrays(few.flux, few.error, model, wave=few.wave, mask=mask, velocity=-26.0)
    assert (len(one), one["v_los"][0]) == (1, -26)
    same_rows(as_columns(one), as_columns(many), slice(0, 1), other_rows=slice(3, 4))
    assert "flag" in one.colnames
    assert isinstance(moefast.load("z0"), moefast.Model)


def test_velocities_and_masks_on_another_grid_are_those_of_the_command(few, model, tmp_path):
    """Arrays and a file of the survey with the same spectra give the same table."""
    mask = np.random.default_rng(1).random(few.flux.shape) < 0.05
    velocity = np.linspace(-200, 200, 40)
    path = write_desi(
        tmp_path / "x.fits", {"Z": (few.wave, few.flux, few.error)}, mask={"Z": mask.astype("u4")},
        ivar={"Z": 1 / few.error.astype("f4") ** 2},
    )  # fmt: skip
    table = Table({"TARGETID": 39633345008634465 + np.arange(40), "VRAD": velocity})
    table.write(tmp_path / "v.ecsv")
    want = predict(path, model, velocity=tmp_path / "v.ecsv").columns
    error = 1 / np.sqrt(1 / few.error.astype("f4") ** 2)
    got = model.predict(few.flux * UNIT, error * UNIT, wave=few.wave * units.AA, mask=mask, velocity=velocity)
    for name in ("log_g", "log_g_err", "chi2"):
        np.testing.assert_allclose(got[name], want[name], atol=1e-4)
    np.testing.assert_array_equal(got["flag"], want["flag"])


def test_odd_arrays_are_told_in_the_words_of_the_command(few, model, plain, tmp_path):
    assert plain.meta["oddities"] == []
    flux, error = few.flux.copy(), few.error.copy()
    flux[5] = 1.0
    path = type(few)(few.wave, flux, error, None, {}).write(
        tmp_path / "x.h5", arrays=("flux", "error"), params=()
    )
    said = predict(path, model).oddities
    with pytest.warns(OddSpectraWarning, match=r"same flux in every pixel \(row 5\)"):
        table = model.predict(flux, error)
    assert table.meta["oddities"] == said
    with pytest.warns(OddSpectraWarning, match="errors are too small"):
        table = model.predict(few.flux, few.error / 3)
    np.testing.assert_array_equal(model.predict(few.flux, few.error)["log_g"], plain["log_g"])


def test_help_and_completion_show_the_public_names():
    assert set(moefast.__all__) <= set(dir(moefast))
    text = pydoc.plain(pydoc.render_doc(moefast))
    for name in ("evaluate", "fit", "load", "predict", "predict_arrays"):
        assert f"\n    {name}(" in text
    assert "class Model(" in text


def test_a_model_says_what_it_is_in_a_line(model):
    text = repr(model)
    assert len(text) < 250
    assert "\n" not in text
    assert "9 experts, 1024 pixels" in text
