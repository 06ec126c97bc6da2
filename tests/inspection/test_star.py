"""One star: the numbers of the table, the reasons of its flags, the right row, and what is drawn of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from survey_files import write_pfs_many

import moefast
from moefast.cli import cli
from moefast.core.errors import InputError, OutputError
from moefast.inspection.lines import lines_within
from moefast.inspection.smoothing import smoothed
from moefast.inspection.star import describe, look_at
from moefast.inspection.star_picture import LARGEST_PULL, figure
from moefast.pages.drawing import LIGHT, styled
from moefast.predicting.files import predict


@pytest.fixture(scope="module")
def table(odd_stars, posterior_model):
    return predict(odd_stars, posterior_model).columns


@pytest.fixture(scope="module")
def star(odd_stars, posterior_model):
    return look_at(odd_stars, posterior_model, row=3)


def axes_of(star):
    with styled(LIGHT):
        canvas = figure(star, LIGHT)
        canvas.draw_without_rendering()
    return canvas.axes


@pytest.mark.parametrize("row", [0, 3, 5, 39])
def test_the_numbers_are_those_of_the_table(row, odd_stars, posterior_model, table):
    found = look_at(odd_stars, posterior_model, row=row)
    assert set(found.values) == set(table) - {"row", "id"}
    for name, value in found.values.items():
        assert value == table[name][row], name
    assert {name for name, _ in found.flags} == {
        flag.name for flag in moefast.inspection.star.Flag if table["flag"][row] & flag
    }
    assert found.ids == {"id": table["id"][row]}
    assert all(reason for _, reason in found.flags)


def test_a_gap_is_no_good_pixel_and_its_flag_says_how_many(star):
    assert not star.good[100:700].any()
    assert star.good[:100].all()
    flags = dict(star.flags)
    assert flags["FEW_GOOD_PIXELS"] == f"{int(star.good.sum())} of 1024 pixels are good"
    assert "the file says" in describe(star)
    assert json.loads(json.dumps(star.to_dict()))["good_pixels"] == int(star.good.sum())


def test_a_star_is_named_by_identifier(odd_stars, posterior_model):
    assert look_at(odd_stars, posterior_model, identifier="1020").row == 20
    assert look_at(odd_stars, posterior_model, identifier="id=1021").row == 21
    with pytest.raises(InputError, match=r"night\.h5: --id 1007: 2 spectra have id 1007 \(rows 7, 8\)"):
        look_at(odd_stars, posterior_model, identifier="1007")
    with pytest.raises(InputError, match="no spectrum has it in id"):
        look_at(odd_stars, posterior_model, identifier="7")
    with pytest.raises(InputError, match="rows 0 to 39"):
        look_at(odd_stars, posterior_model, row=40)
    with pytest.raises(InputError, match="choose one with --row"):
        look_at(odd_stars, posterior_model)
    with pytest.raises(InputError, match="one of the two"):
        look_at(odd_stars, posterior_model, row=1, identifier="1001")


def test_of_several_files_rows_are_counted_through_them(odd_stars, posterior_model, table, tmp_path):
    second = tmp_path / "second.h5"
    second.write_bytes(odd_stars.read_bytes())
    found = look_at([odd_stars, second], posterior_model, row=45)
    assert (found.file, found.row) == (str(second), 5)
    assert found.values["log_g"] == table["log_g"][5]


def test_survey_files_are_shown_at_rest(stars, posterior_model, tmp_path):
    few = stars.take(slice(2400, 2404)).observed()
    path = write_pfs_many(tmp_path / "pfs.fits", few.wave, few.flux.astype(float), few.error.astype(float))
    still = look_at(path, posterior_model, identifier="1002", velocity=0.0, telluric="keep")
    assert still.ids["objId"] == 1002
    assert still.row == 2
    masked = look_at(path, posterior_model, row=2, velocity=0.0)
    assert masked.good.sum() < still.good.sum()
    assert any("atmosphere" in note for note in masked.notes)
    moved = look_at(path, posterior_model, row=2, velocity=120.0, telluric="keep")
    assert moved.values["v_los"] == 120.0
    expected = predict(path, posterior_model, velocity=120.0, telluric="keep").columns
    assert moved.values["log_g"] == expected["log_g"][2]
    # Of files of surveys the velocity is fitted where none is given, by the command and here.
    fitted, expected = look_at(path, posterior_model, row=2), predict(path, posterior_model).columns
    for name in ("v_los", "v_los_err", "log_g", "log_g_err"):
        assert fitted.values[name] == pytest.approx(expected[name][2], rel=1e-5), name
    assert any("the velocity is fitted" in note for note in fitted.notes)
    assert fitted.posterior is not None


def test_the_picture_draws_flux_model_residuals_and_posterior(star):
    spectrum, residual, triplet, log_g, kiel, words = axes_of(star)
    lines = {line.get_label(): line for line in spectrum.get_lines()}
    flux = lines["flux, good pixels"].get_ydata()
    np.testing.assert_array_equal(np.isfinite(flux), star.good)
    np.testing.assert_array_equal(flux[star.good], star.flux[star.good])
    np.testing.assert_array_equal(lines["the star, by the model"].get_ydata(), star.posterior.star)
    pulls = next(line for line in residual.get_lines() if line.get_label() == "each pixel").get_ydata()
    expected = (star.flux - star.posterior.model) / star.error
    np.testing.assert_allclose(pulls[star.good], np.clip(expected, -LARGEST_PULL, LARGEST_PULL)[star.good])
    density = next(line for line in log_g.get_lines() if line.get_label() == "posterior")
    at = density.get_xdata()
    np.testing.assert_allclose(density.get_ydata(), star.posterior.density("log_g", at))
    assert np.trapezoid(density.get_ydata(), at) == pytest.approx(1, abs=0.02)
    marks = {line.get_label(): line.get_xdata()[0] for line in log_g.get_lines()[:1]}
    assert marks == {"value, calibrated 1σ": star.values["log_g"]}
    assert kiel.get_xlim()[0] > kiel.get_xlim()[1]
    assert kiel.get_ylim()[0] > kiel.get_ylim()[1]
    texts = {text.get_text() for text in spectrum.texts} | {text.get_text() for text in triplet.texts}
    assert {"Ca II", "Na I", "Mg I", "Fe I", "Pa 14"} <= texts
    assert "FEW_GOOD_PIXELS" in words.texts[0].get_text()


def test_a_spike_does_not_set_the_frame(odd_stars, posterior_model):
    spectrum = axes_of(look_at(odd_stars, posterior_model, row=5))[0]
    assert spectrum.get_ylim()[1] < 10
    assert any("beyond the frame" in text.get_text() for text in spectrum.texts)


def test_calcium_and_other_lines_stand_where_they_are():
    found = dict(lines_within(7100, 8850))
    np.testing.assert_allclose(found["Ca II"], [8500.36, 8544.44, 8664.52], atol=0.1)
    np.testing.assert_allclose(found["Na I"], [8185.5, 8197.1], atol=0.1)
    assert set(dict(lines_within(8440, 8740))) == {
        "Ca II",
        "Fe I",
        "Pa 17",
        "Pa 16",
        "Pa 15",
        "Pa 14",
        "Pa 13",
    }


def test_smoothing_leaves_bad_pixels_out():
    values, weights = np.array([1.0, 2, np.nan, 4, 5]), np.array([1.0, 1, 0, 1, 3])
    np.testing.assert_allclose(smoothed(values, weights, 3), [1.5, 1.5, 3, 4.75, 4.75])
    assert np.isnan(smoothed(values, np.zeros(5), 3)).all()


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_pictures_in_every_format_are_the_same_twice(suffix, star, tmp_path):
    for name in ("a", "b"):
        moefast.draw_star(star, tmp_path / f"{name}{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_a_picture_of_another_kind_is_refused(star, tmp_path):
    with pytest.raises(OutputError, match=r"\.png, \.svg, \.pdf"):
        moefast.draw_star(star, tmp_path / "star.gif")
    assert not list(tmp_path.iterdir())


def test_a_star_without_data_says_so(odd_stars, posterior_model, tmp_path):
    empty = look_at(odd_stars, posterior_model, row=4)
    assert empty.posterior is None
    assert dict(empty.flags)["NO_DATA"] == "not one pixel is good"
    assert empty.to_dict()["values"]["log_g"] is None
    moefast.draw_star(empty, tmp_path / "empty.png")


def test_models_that_are_no_posterior_draw_what_they_can(odd_stars, model, tmp_path):
    found = look_at(odd_stars, model, row=0)
    assert found.posterior is None
    assert "is no posterior" in describe(found)
    spectrum, residual, _, log_g, _, _ = axes_of(found)
    assert "the star, by the model" not in {line.get_label() for line in spectrum.get_lines()}
    assert "no model spectrum" in residual.texts[0].get_text()
    weights = next(line for line in log_g.get_lines() if line.get_marker() == "o").get_ydata()
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    moefast.draw_star(found, tmp_path / "star.png")


def test_dollars_in_names_are_text(odd_stars, posterior_model, tmp_path):
    path = tmp_path / "$\\frac{1}$.h5"
    path.write_bytes(odd_stars.read_bytes())
    moefast.draw_star(look_at(path, posterior_model, row=0), tmp_path / "star.png")


def test_the_command(odd_stars, model_folder, tmp_path):
    def run(*words, code=0):
        result = CliRunner().invoke(cli, [*map(str, words)])
        assert result.exit_code == code, result.output
        return result

    picture = tmp_path / "star.svg"
    result = run("inspect", odd_stars, "-m", model_folder, "--row", 3, "--picture", picture)
    assert "FEW_GOOD_PIXELS: " in result.stdout
    assert picture.read_bytes().startswith(b"<?xml")
    facts = json.loads(run("inspect", odd_stars, "-m", model_folder, "--id", 1003, "--json").stdout)
    assert facts["row"] == 3
    assert "rows 0 to 39" in run("inspect", odd_stars, "-m", model_folder, "--row", 99, code=3).stderr
    run("inspect", odd_stars, "-m", model_folder, "--row", 3, "--picture", tmp_path / "star.gif", code=8)
    refused = run("inspect", odd_stars, "--report", tmp_path / "page.html", code=3)
    assert "for one table that moefast predict wrote" in refused.stderr


def test_whatever_backend_the_environment_names():
    code = "import moefast.inspection.star_picture, matplotlib; print(matplotlib.rcParams['backend'])"
    environment = os.environ | {"MPLBACKEND": "module://nothing.of.this.name"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
