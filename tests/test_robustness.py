"""Bad pixels, bad rows, bad files, and processes that are killed: nothing spoils its neighbours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from small import same_rows
from small import stars as simulate

from moefast.core.errors import InputError, WaveGridError
from moefast.core.metrics import r2
from moefast.predicting import engines, run
from moefast.predicting.files import predict
from moefast.spectra import Flag, open_spectra, read_table

N = 530
BAD = (0, 17, 511, 512, 529)


def flags(*names):
    return np.uint32(sum(Flag[name] for name in names))


@pytest.fixture(scope="module")
def few(stars):
    return stars.take(slice(0, N)).observed()


@pytest.fixture(scope="module")
def clean(few, model, tmp_path_factory):
    found = predict(few.write(tmp_path_factory.mktemp("clean") / "x.h5"), model).columns
    assert np.isfinite(found["log_g"]).all()
    return found


def _spoiled(few, model, path, spoil, **arrays):
    some = few.take(slice(None))
    for row in BAD:
        spoil(some, row)
    return predict(some.write(path, **arrays), model).columns


def _set(name, value, pixels=slice(100, 110)):
    def spoil(stars, row):
        getattr(stars, name)[row, pixels] = value

    return spoil


# -- pixels and rows -------------------------------------------------------------------------------------------

PIXELS = {
    "flux NaN": (_set("flux", np.nan), ()),
    "flux +inf": (_set("flux", np.inf), ()),
    "flux -inf": (_set("flux", -np.inf), ()),
    "error NaN": (_set("error", np.nan), ("BAD_ERROR",)),
    "error inf": (_set("error", np.inf), ("BAD_ERROR",)),
    "error zero": (_set("error", 0), ("BAD_ERROR",)),
    "error negative": (_set("error", -1), ("BAD_ERROR",)),
}


@pytest.mark.parametrize("kind", PIXELS)
def test_bad_pixels(kind, few, model, clean, tmp_path):
    spoil, expected = PIXELS[kind]
    found = _spoiled(few, model, tmp_path / "x.h5", spoil)
    others = np.setdiff1d(np.arange(N), BAD)
    same_rows(found, clean, others)
    for name in ("log_g", "log_g_err", "chi2", "snr_norm", "snr_median"):
        assert np.isfinite(found[name][list(BAD)]).all(), name
    # Ten of 1024 pixels, away from the gate's lines, move log g by less than its error.
    moved = np.abs(found["log_g"] - clean["log_g"])[list(BAD)]
    assert (moved < clean["log_g_err"][list(BAD)]).all()
    wrong = flags("NO_DATA", "FEW_GOOD_PIXELS", "BAD_ERROR")
    assert (found["flag"][list(BAD)] & wrong == flags(*expected)).all()


def test_every_kind_of_bad_pixel_gives_the_same_numbers(few, model, tmp_path):
    """Zero weight is zero weight: what stands in a bad pixel does not matter."""
    tables = [
        _spoiled(few, model, tmp_path / f"{i}.h5", spoil) for i, (spoil, _) in enumerate(PIXELS.values())
    ]
    masked = replace(few, mask=np.zeros(few.flux.shape, bool))
    tables.append(
        _spoiled(masked, model, tmp_path / "m.h5", _set("mask", True), arrays=("flux", "error", "mask"))
    )
    for table in tables[1:]:
        same_rows(table, tables[0], but=("row", "flag"))
    wild = replace(masked, flux=np.where(np.arange(1024) < 3, np.nan, few.flux))
    wild.mask[:, :3] = True
    assert np.isfinite(predict(wild.write(tmp_path / "w.h5", arrays=("flux", "error", "mask")), model).r2)


def _all(name, value):
    return _set(name, value, slice(None))


ROWS = {
    "all NaN": (_all("flux", np.nan), ("NO_DATA", "FEW_GOOD_PIXELS")),
    "all errors zero": (_all("error", 0), ("NO_DATA", "FEW_GOOD_PIXELS", "BAD_ERROR")),
    "all masked": (_all("mask", True), ("NO_DATA", "FEW_GOOD_PIXELS")),
    "one good pixel": (_set("mask", True, np.arange(1024) != 333), ("FEW_GOOD_PIXELS",)),
    "a few more than half masked": (_set("mask", True, slice(0, 520)), ("FEW_GOOD_PIXELS",)),
    "half masked": (_set("mask", True, slice(0, 512)), ()),
}


@pytest.mark.parametrize("kind", ROWS)
def test_bad_rows(kind, few, model, clean, tmp_path):
    spoil, expected = ROWS[kind]
    masked = replace(few, mask=np.zeros(few.flux.shape, bool))
    found = _spoiled(masked, model, tmp_path / "x.h5", spoil, arrays=("flux", "error", "mask"))
    others = np.setdiff1d(np.arange(N), BAD)
    same_rows(found, clean, others)
    rows = list(BAD)
    wrong = flags("NO_DATA", "FEW_GOOD_PIXELS", "BAD_ERROR")
    assert (found["flag"][rows] & wrong == flags(*expected)).all()
    numbers = [name for name, values in found.items() if values.dtype.kind == "f"]
    if "NO_DATA" in expected:
        assert all(np.isnan(found[name][rows]).all() for name in numbers)
        assert (found["expert"][rows] == -1).all()
        assert (found["flag"][rows] == flags(*expected)).all()
    else:
        assert all(np.isfinite(found[name][rows]).all() for name in numbers)
    np.testing.assert_array_equal(found["row"], np.arange(N))


@pytest.mark.parametrize("name", ["flux", "error"])
@pytest.mark.parametrize("value", [1e18, 1e25, 1e38])
def test_numbers_near_the_end_of_float32_are_never_silent(name, value, few, model, clean, tmp_path):
    found = _spoiled(few, model, tmp_path / "x.h5", _set(name, value))
    same_rows(found, clean, np.setdiff1d(np.arange(N), BAD))
    warned = flags("BAD_ERROR", "OUT_OF_GRID", "LOW_CONFIDENCE", "UNLIKE_TRAINING")
    assert (found["flag"][list(BAD)] & warned != 0).all()


# -- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 511, 512, 513, 2049])
def test_any_number_of_rows(n, stars, model, whole, tmp_path):
    path = stars.take(slice(0, n)).observed().write(tmp_path / "x.h5")
    same_rows(predict(path, model).columns, whole.columns, slice(None), other_rows=slice(0, n))


@pytest.mark.parametrize(
    "storage",
    [
        {"dtype": "f8"},
        {"dtype": ">f4"},
        {"chunks": (7, 1024)},
        {"chunks": (64, 100), "compression": "gzip", "dtype": "f8"},
    ],
    ids=str,
)
def test_storage_changes_nothing(storage, few, model, clean, tmp_path):
    same_rows(predict(few.write(tmp_path / "x.h5", **storage), model).columns, clean)


def test_half_precision_is_read_as_it_is(few, model, tmp_path):
    rounded = replace(few, flux=few.flux.astype("f2"), error=few.error.astype("f2"))
    half = predict(rounded.write(tmp_path / "h.h5", dtype="f2"), model).columns
    same_rows(half, predict(rounded.write(tmp_path / "f.h5"), model).columns)


@pytest.mark.parametrize("size", [0, 7, 4000, 0.5, 0.999])
def test_truncated(size, few, model, tmp_path):
    path = few.write(tmp_path / "cut.h5")
    with open(path, "rb+") as file:
        file.truncate(int(size * path.stat().st_size) if isinstance(size, float) else size)
    with pytest.raises(InputError, match=r"cut\.h5: (truncated file|not an HDF5 file)") as caught:
        predict(path, model, tmp_path / "t.h5")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "t.h5").exists()


def test_truncated_says_which_row(few, model, tmp_path):
    path = few.write(tmp_path / "cut.h5")
    with h5py.File(path) as file:
        offset = file["dataset/arrays/error/value"].id.get_offset()
    with open(path, "rb+") as file:
        file.truncate(offset + 100 * 4096 + 10)
    with pytest.raises(InputError, match=r"/dataset/arrays/error/value ends in row 100 of 530"):
        predict(path, model)


@pytest.mark.parametrize(
    ("dataset", "match"),
    [
        ("dataset/arrays/error/value", "dataset/arrays/error/value is missing; found dataset/arrays/flux"),
        ("dataset/arrays/flux/value", "dataset/arrays/flux/value is missing; found dataset/arrays/error"),
        ("spectrumdataset/wave", "spectrumdataset/wave is missing"),
    ],
)
def test_missing_dataset(dataset, match, few, model, tmp_path):
    path = few.take(slice(0, 5)).write(tmp_path / "x.h5")
    with h5py.File(path, "r+") as file:
        del file[dataset]
    with pytest.raises(InputError, match=match):
        predict(path, model, tmp_path / "t.h5")
    assert not (tmp_path / "t.h5").exists()


def test_another_wave_grid(few, model, tmp_path):
    some = few.take(slice(0, 5))
    path = replace(some, wave=some.wave + 1000).write(tmp_path / "x.h5")
    with pytest.raises(WaveGridError) as caught:
        predict(path, model, tmp_path / "t.h5")
    for words in ("x.h5", "1024 pixels, 8100.854 to ", "1024 pixels, 7100.854 to 8849.146 Å", "step"):
        assert words in str(caught.value)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "t.h5").exists()


def test_rounding_of_the_wave_grid_is_forgiven(few, model, clean, tmp_path):
    rounded = replace(few, wave=few.wave.astype("f4")).write(tmp_path / "x.h5")
    same_rows(predict(rounded, model).columns, clean)


def test_no_rows(few, model, tmp_path):
    empty = few.take(slice(0, 0)).write(tmp_path / "empty.h5")
    with pytest.raises(InputError, match=r"empty\.h5: holds no spectra"):
        predict(empty, model, tmp_path / "t.h5")
    summary = predict([empty, few.take(slice(0, 3)).write(tmp_path / "x.h5")], model, tmp_path / "t.h5")
    assert summary.n_rows == 3
    assert [failure.path.name for failure in summary.failures] == ["empty.h5"]


def test_a_file_that_shrinks_while_it_is_read(few, model, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "make_engine", lambda mixture, _: engines.CpuEngine(mixture, 64))
    path = few.write(tmp_path / "x.h5")
    score = run.score_block

    def shrink(*args):
        with open(path, "rb+") as file:
            file.truncate(200_000)
        return score(*args)

    monkeypatch.setattr(run, "score_block", shrink)
    with pytest.raises(InputError, match=r"x\.h5: .*rows \d+ to \d+ cannot be read"):
        predict(path, model, tmp_path / "t.h5")
    assert [item.name for item in tmp_path.iterdir()] == ["x.h5"]


# -- killed ----------------------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-c", "from moefast.cli import main; main()", "predict", "--quiet"]


def test_killed_at_any_moment(stars, model_folder, model, tmp_path):
    """Ten runs ended by SIGKILL: most while rows are written, some before the table is begun."""
    night = stars.take(np.arange(5200) % 2600).observed()
    path = night.write(tmp_path / "night.h5", dtype="f8")
    expected = predict(path, model).columns
    rng = np.random.default_rng(20)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

    def run(number, early, delay):
        out = tmp_path / f"table_{number}.h5"
        process = subprocess.Popen(
            [*COMMAND, str(path), "-m", str(model_folder), "-o", str(out)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + 600

        def begun():
            return any(tmp_path.glob(f".{out.name}.*-{process.pid}-*.partial"))

        waiting = (lambda: False) if early else (lambda: not begun() and process.poll() is None)
        while waiting() and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(delay)
        was_begun = begun()
        process.send_signal(signal.SIGKILL)
        process.wait()
        return out, was_begun

    moments = [(n, n < 2, rng.uniform(0, 0.4 if n < 2 else 0.3)) for n in range(10)]
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda moment: run(*moment), moments))
    assert any(begun for _, begun in outcomes), "no run was ended while it wrote: nothing was tested"
    for out, _ in outcomes:
        if out.exists():
            same_rows(read_table(out)[0], expected)
        predict(path, model, out, overwrite=True)
        same_rows(read_table(out)[0], expected)
        assert not list(tmp_path.glob(f".{out.name}.*")), "a stale partial file was left"


# -- the leak --------------------------------------------------------------------------------------------------


def _r2_of(regressor, features, log_g):
    return r2(log_g, cross_val_predict(regressor, features, log_g, cv=4))


def test_the_gate_cannot_read_log_g_from_the_errors(model):
    """σ holds the star's own photon noise: pixel by pixel it gives log g away, and the gate must not see that."""
    star = simulate(2000, seed=77)
    log_g = star.params["log_g"]
    leak = _r2_of(make_pipeline(StandardScaler(), Ridge(1e-6)), star.error, log_g)
    assert leak > 0.5, "the errors no longer leak, so this test guards nothing"
    constant = np.ones_like(star.flux)
    seen = model.mixture.prepare(constant, star.error).features
    varies = np.ptp(seen, axis=0) > 1e-3
    assert varies.tolist() == [False] * (varies.size - 1) + [True], (
        "only the noise level may depend on the errors"
    )
    for regressor in (
        LinearRegression(),
        make_pipeline(StandardScaler(), KNeighborsRegressor(50)),
        HistGradientBoostingRegressor(max_iter=30, max_depth=3, random_state=0),
    ):
        assert _r2_of(regressor, seen, log_g) < 0.05, regressor


def test_the_survey_files_are_read_as_they_are():
    data = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    files = [data / "pfsspec_contiguous.h5", data / "pfsspec_streamed.h5"]
    if not all(file.exists() for file in files):
        pytest.skip(f"the files of the survey's simulator are not in {data}")
    spectra = open_spectra(files)
    assert spectra.n_rows == 128
    assert spectra.has_labels()
