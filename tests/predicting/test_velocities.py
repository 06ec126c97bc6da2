"""Velocities fitted by the command and in Python: what is fitted by default, what is said, columns, bad neighbours."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from astropy.table import Table
from click.testing import CliRunner
from survey_files import write_desi, write_pfs_many, write_pfs_one

from moefast.backend import Backend
from moefast.benchmarks import velocities
from moefast.benchmarks.velocities import moving_stars
from moefast.cli import cli
from moefast.core.errors import BackendError, InputError, OddSpectraWarning
from moefast.inspection.star import describe, look_at
from moefast.model import Model
from moefast.predicting import files
from moefast.predicting.arrays import predict_arrays
from moefast.predicting.engines import CpuEngine, CudaEngine
from moefast.predicting.files import predict
from moefast.predicting.velocities import FITTED_ON_CPU, MOVED_ON_CPU, fit_on
from moefast.spectra import read_table
from moefast.spectra.quality import Flag
from moefast.spectra.writer import SpectrumWriter

N = 16


@pytest.fixture(scope="module")
def model():
    return Model.load("z0")


@pytest.fixture(scope="module")
def stars():
    return moving_stars(N, seed=11)


@pytest.fixture(scope="module")
def night(stars, tmp_path_factory):
    return write_pfs_many(
        tmp_path_factory.mktemp("pfs") / "night.fits", stars["wave"], stars["moved"].astype(float),
        stars["error"].astype(float),
    )  # fmt: skip


@pytest.fixture(scope="module")
def fitted(night, model):
    return predict(night, model)


@pytest.fixture(scope="module")
def simulated(stars, tmp_path_factory):
    path = tmp_path_factory.mktemp("sim") / "moved.h5"
    step = stars["wave"][1] - stars["wave"][0]
    edges = np.append(stars["wave"], stars["wave"][-1] + step) - step / 2
    with SpectrumWriter(
        path, n_rows=N, wave=stars["wave"], wave_edges=edges, arrays=("flux", "error"), params={"log_g": "f8"}
    ) as writer:
        writer.write(0, flux=stars["moved"], error=stars["error"], params={"log_g": stars["log_g"]})
    return path


def assert_right(columns, stars, rows=slice(None)):
    off = np.abs(columns["v_los"] - stars["velocity"][rows])
    sure = columns["flag"] & np.uint32(Flag.VELOCITY_UNCERTAIN) == 0
    assert sure.mean() > 0.7
    assert (off[sure] < 5 * columns["v_los_err"][sure]).all()
    assert (columns["v_los_err"] > 0).all()


def test_files_of_surveys_are_fitted_and_say_so(fitted, stars):
    assert_right(fitted.columns, stars)
    (told,) = [note for note in fitted.notes if "velocit" in note]
    assert "one was fitted to each star within 500 km/s" in told
    assert "--velocity 0" in told
    assert list(fitted.columns).index("v_los") < list(fitted.columns).index("log_g")


def test_a_run_on_a_gpu_says_that_velocities_are_fitted_on_the_cpu(night, model, monkeypatch):
    real = files.open_engine

    def on_a_gpu(mixture, backend):
        return real(mixture, "cpu")[0], Backend(backend, "Fake H200", "as asked")

    monkeypatch.setattr(files, "open_engine", on_a_gpu)
    fitted = predict(night, model, backend="cuda", limit=2)
    assert fitted.reason == f"as asked; {FITTED_ON_CPU}"
    assert "velocities fitted on the CPU" in fitted.reason
    assert predict(night, model, backend="cuda", limit=2, velocity=0).reason == "as asked"


class FitOnDevice:
    """A fit whose device works, or has too little memory."""

    def __init__(self, problem=None):
        self.problem, self.used = problem, False

    def use_device(self):
        if self.problem:
            raise BackendError(self.problem)
        self.used = True


def test_velocities_are_fitted_where_predictions_are_made_by_kernels(model):
    where, kernels = Backend("cuda", "Fake H200", "as asked"), object.__new__(CudaEngine)
    fit = FitOnDevice()
    assert fit_on(kernels, fit, where, "cuda").reason == f"as asked; {MOVED_ON_CPU}"
    assert fit.used
    # Neither another engine nor a run at rest asks for the device.
    fit = FitOnDevice()
    assert fit_on(CpuEngine(model.mixture), fit, where, "cuda").reason == f"as asked; {FITTED_ON_CPU}"
    assert fit_on(kernels, None, where, "cuda") is where
    on_cpu = Backend("cpu", "EPYC", "no GPU")
    assert fit_on(CpuEngine(model.mixture), fit, on_cpu, "auto") is on_cpu
    assert not fit.used


def test_a_gpu_that_cannot_fit_velocities_is_no_error_unless_it_was_asked_for():
    where, kernels = Backend("cuda", "Fake H200", "found"), object.__new__(CudaEngine)
    full = FitOnDevice("device memory: 1 GB are needed")
    words = fit_on(kernels, full, where, "auto").reason
    assert words == f"found; {FITTED_ON_CPU}: device memory: 1 GB are needed"
    with pytest.raises(BackendError, match="device memory"):
        fit_on(kernels, full, where, "cuda")


def test_a_velocity_that_is_given_has_precedence(night, model, fitted):
    still = predict(night, model, velocity=0)
    assert not still.columns["v_los"].any()
    assert "v_los_err" not in still.columns
    assert not any("velocit" in note for note in still.notes)
    assert np.abs(still.columns["log_g"] - fitted.columns["log_g"]).max() > 0.1


def test_spectra_of_the_simulator_are_at_rest_unless_asked(simulated, stars, model):
    still = predict(simulated, model)
    assert "v_los" not in still.columns
    assert any("taken to be at rest; --velocity fit" in note for note in still.notes)
    engine = model.mixture.score(stars["moved"], stars["error"])[0]
    np.testing.assert_array_equal(still.columns["log_g"], engine.log_g.astype("f4"))
    moving = predict(simulated, model, velocity="fit")
    assert_right(moving.columns, stars)
    assert moving.r2 is not None
    array = predict_arrays(stars["moved"], stars["error"], model, wave=stars["wave"], velocity="fit")
    for name in ("v_los", "v_los_err", "log_g", "log_g_err", "T_eff", "flag", "chi2"):
        np.testing.assert_array_equal(
            moving.columns[name], np.asarray(array[name], moving.columns[name].dtype), err_msg=name
        )
    assert array.meta["velocity"] == "fitted within 500 km/s"


def test_parts_and_bad_neighbours_change_no_bit(night, stars, fitted, model, tmp_path):
    part = predict(night, model, rows=(5, 9)).columns
    for name, values in part.items():
        np.testing.assert_array_equal(values, fitted.columns[name][5:9], err_msg=name)
    flux = stars["moved"].astype(float)
    flux[2] = np.nan
    bad = write_pfs_many(tmp_path / "bad.fits", stars["wave"], flux, stars["error"].astype(float))
    columns = predict(bad, model).columns
    assert np.isnan([columns[name][2] for name in ("v_los", "v_los_err", "log_g")]).all()
    assert columns["flag"][2] & np.uint32(Flag.VELOCITY_UNCERTAIN) == 0
    others = np.delete(np.arange(N), 2)
    for name in ("v_los", "v_los_err", "log_g", "flag"):
        np.testing.assert_array_equal(columns[name][others], fitted.columns[name][others], err_msg=name)


def test_files_of_one_star_each_are_fitted_as_one_of_many(stars, fitted, model, tmp_path):
    for i in range(3):
        write_pfs_one(
            tmp_path / f"pfsObject-{i}.fits", stars["wave"], stars["moved"][i].astype(float),
            stars["error"][i].astype(float), obj_id=i,
        )  # fmt: skip
    (tmp_path / "pfsObject-1.fits").write_bytes((tmp_path / "pfsObject-1.fits").read_bytes()[:5000])
    found = predict(tmp_path, model)
    assert len(found.failures) == 1
    np.testing.assert_array_equal(found.columns["v_los"], fitted.columns["v_los"][[0, 2]])


def test_files_of_surveys_and_of_the_simulator_together(night, simulated, model, fitted):
    found = predict([night, simulated], model)
    np.testing.assert_array_equal(found.columns["v_los"][:N], fitted.columns["v_los"])
    assert not found.columns["v_los"][N:].any()
    assert np.isnan(found.columns["v_los_err"][N:]).all()
    np.testing.assert_array_equal(found.columns["log_g"][N:], predict(simulated, model).columns["log_g"])
    said = "one was fitted to each star of a survey's files within 500 km/s"
    assert any(
        said in note and "spectra of the simulator are taken to be at rest" in note for note in found.notes
    )
    assert any(note.startswith("identifiers catId, ") and str(simulated) in note for note in found.notes)
    assert not any(note.startswith("identifiers") or "of a survey's files" in note for note in fitted.notes)


def test_the_telluric_mask_stays_where_the_atmosphere_is(stars, model):
    from moefast.spectra.telluric import telluric_pixels

    lost = np.repeat(telluric_pixels(stars["wave"])[None], N, axis=0)
    masked = predict_arrays(stars["moved"], stars["error"], model, velocity="fit", telluric="mask")
    same = predict_arrays(stars["moved"], stars["error"], model, velocity="fit", mask=lost)
    np.testing.assert_allclose(masked["v_los"], same["v_los"], atol=0.05)
    assert_right(masked, stars)


def test_flux_with_a_unit_was_observed_and_is_fitted(stars, model):
    from astropy import units

    unit = units.Unit("erg s-1 cm-2 AA-1")
    found = predict_arrays(stars["moved"] * unit, stars["error"] * unit, model, telluric="keep")
    assert_right(found, stars)
    assert str(found["v_los"].unit) == "km / s"
    with pytest.warns(OddSpectraWarning, match="lines lie"):
        still = predict_arrays(
            stars["moved"] * unit, stars["error"] * unit, model, telluric="keep", velocity=0
        )
    assert still.meta["velocity"] == "as given"
    assert not still["v_los"].any()


def test_desi_is_fitted(stars, model, tmp_path):
    arms = {
        arm: (stars["wave"][k], stars["moved"][:, k].astype(float), stars["error"][:, k].astype(float))
        for arm, k in {"R": stars["wave"] < 7620, "Z": stars["wave"] > 7520}.items()
    }
    assert_right(predict(write_desi(tmp_path / "x.fits", arms), model).columns, stars)


def test_models_that_are_no_posteriors_refuse(night, simulated):
    heads = Model.load("survey")
    with pytest.raises(InputError, match=r"velocity fit: the model heads .*survey.* is no posterior"):
        predict(simulated, heads, velocity="fit")
    with pytest.raises(InputError, match="is no posterior"):
        predict_arrays(np.ones(4096), np.ones(4096), heads, velocity="fit")
    found = predict(night, heads)
    assert "v_los" not in found.columns
    assert any("this model fits none: spectra are taken to be at rest" in note for note in found.notes)


def test_the_command(night, fitted, tmp_path):
    out = tmp_path / "t.fits"
    arguments = ["predict", str(night), "-m", "z0", "-o", str(out), "--velocity", "fit"]
    done = CliRunner().invoke(cli, [*arguments, "--velocity-range", "400"])
    assert done.exit_code == 0, done.output
    assert "one was fitted to each star within 400 km/s" in done.output
    columns, attrs = read_table(out)
    assert attrs["velocity"] == "fitted within 400 km/s"
    sure = columns["flag"] & np.uint32(Flag.VELOCITY_UNCERTAIN) == 0
    np.testing.assert_allclose(columns["v_los"][sure], fitted.columns["v_los"][sure], atol=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = Table.read(out)
    assert [str(table[name].unit) for name in ("v_los", "v_los_err")] == ["km / s"] * 2
    wrong = CliRunner().invoke(cli, [*arguments, "--overwrite", "--velocity-range", "0"])
    assert wrong.exit_code == 2
    far = CliRunner().invoke(cli, [*arguments, "--overwrite", "--velocity-range", "90000"])
    assert far.exit_code == 3
    assert "velocity range 90000" in far.stderr


@pytest.mark.parametrize("given", ["fit", "-26", "table", "default"])
def test_a_star_that_is_looked_at_has_the_numbers_of_the_table(given, night, model, stars, tmp_path):
    velocity: str | None = None if given == "default" else given
    if given == "table":
        path = tmp_path / "velocities.csv"
        Table({"objId": 1000 + np.arange(N), "v_los": stars["velocity"], "v_losErr": np.full(N, 3.5)}).write(
            path
        )
        velocity = str(path)
    columns = predict(night, model, velocity=velocity, rows=(4, 7)).columns
    star = look_at(night, model, row=5, velocity=velocity)
    assert {"v_los", "log_g", "log_g_err", "flag"} <= set(star.values)
    for name, value in star.values.items():
        assert value == columns[name][1], name
    assert ("v_los_err" in star.values) == (given != "-26")
    assert star.velocity_fitted == (given in {"fit", "default"})
    assert f"km/s, {'fitted' if star.velocity_fitted else 'as given'}" in describe(star)


def test_a_velocity_with_a_large_error_is_weighed_with_what_the_spectrum_says(night, model, stars, tmp_path):
    error = np.where(np.arange(N) % 2, 25.0, 3.0)
    given = stars["velocity"] + np.where(np.arange(N) % 2, 25.0, 0.0)
    columns = {"objId": 1000 + np.arange(N), "v_los": given}
    Table(columns).write(tmp_path / "exact.csv")
    Table(columns | {"v_losErr": error}).write(tmp_path / "known.csv")
    exact = predict(night, model, velocity=tmp_path / "exact.csv")
    found = predict(night, model, velocity=tmp_path / "known.csv")
    # What is known well enough is taken as it is, to the last bit.
    for name in ("log_g", "log_g_err", "v_los"):
        np.testing.assert_array_equal(found.columns[name][::2], exact.columns[name][::2])
    np.testing.assert_array_equal(found.columns["v_los_err"][::2], np.float32(3))
    off = np.abs(found.columns["v_los"] - stars["velocity"])[1::2]
    assert (found.columns["v_los_err"][1::2] < 25).all()
    assert np.median(off) < 10
    assert (off < 5 * found.columns["v_los_err"][1::2]).all()
    assert any("errors above 5 km/s are weighed" in note for note in found.notes)
    assert not any("are weighed" in note for note in exact.notes)
    star = look_at(night, model, row=5, velocity=tmp_path / "known.csv")
    for name, value in star.values.items():
        assert value == found.columns[name][5], name


def test_a_range_of_velocities_that_changes_nothing_is_told(night, simulated, model, fitted, stars, tmp_path):
    table = tmp_path / "v.csv"
    columns = {"objId": 1000 + np.arange(N), "v_los": stars["velocity"]}
    Table(columns).write(table)
    words = "--velocity-range 300 changes nothing"
    for spectra, velocity in ((night, 0), (night, table), (simulated, None)):
        notes = predict(spectra, model, velocity=velocity, velocity_range=300, rows=(0, 2)).notes
        assert sum(words in note for note in notes) == 1, velocity
        assert any(
            words in note
            for note in look_at(spectra, model, row=1, velocity=velocity, velocity_range=300).notes
        )
    assert any(words in note for note in predict(night, "survey", velocity_range=300, rows=(0, 2)).notes)
    Table(columns | {"v_losErr": np.full(N, 25.0)}).write(table, overwrite=True)
    weighed = predict(night, model, velocity=table, velocity_range=300, rows=(0, 2))
    for notes in (weighed.notes, fitted.notes, predict(night, model, velocity=0, rows=(0, 2)).notes):
        assert not any("changes nothing" in note for note in notes)


def test_a_star_whose_velocity_is_uncertain_can_be_looked_at(night, model, stars):
    fastest = int(np.abs(stars["velocity"]).argmax())
    short = abs(float(stars["velocity"][fastest])) / 2
    columns = predict(night, model, velocity="fit", velocity_range=short, rows=(fastest, fastest + 1)).columns
    assert columns["flag"][0] & np.uint32(Flag.VELOCITY_UNCERTAIN)
    star = look_at(night, model, row=fastest, velocity="fit", velocity_range=short)
    assert "the last of the range" in dict(star.flags)["VELOCITY_UNCERTAIN"]
    assert star.values["v_los"] == columns["v_los"][0]
    done = CliRunner().invoke(
        cli, ["inspect", str(night), "-m", "z0", "--row", str(fastest), "--velocity-range", str(short)]
    )
    assert done.exit_code == 0, done.output
    assert "VELOCITY_UNCERTAIN" in done.output


def test_the_benchmark_measures_what_it_says(model):
    found = velocities.run(model, n=24, repeats=1)
    rows = {(one["mask"], one["group"]): one for one in found["rows"]}
    assert rows["none", "all"]["n"] == rows["telluric", "all"]["n"] == 24
    assert rows["none", "all"]["wrong_unflagged"] < 0.2
    assert rows["none", "all"]["claimed"] < rows["telluric", "all"]["claimed"]
    assert found["noise"]["uncertain"] > 0.8
    assert found["rates"]["at_rest"] > found["rates"]["fitted"] > 0
    assert "telluric" in velocities.format_text(found)
