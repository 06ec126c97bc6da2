"""Scenarios: each does to the spectra what it says, the measures are what they are called, and any model is judged."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from moefast.cli import cli
from moefast.core.errors import MoefastError
from moefast.model import SHIPPED, Model
from moefast.protocol import scenarios
from moefast.protocol.scenarios import FLAGS, SCENARIOS, format_text, measure, run_scenarios, verdict
from moefast.simulate import Emulator, simulate_rows
from moefast.simulate.gaps import GAPS
from moefast.simulate.sets import REFERENCE_SETS
from moefast.spectra.quality import Flag
from moefast.spectra.telluric import telluric_pixels

N = 12


@pytest.fixture(scope="module")
def stars():
    return next(scenarios._stars(N, Emulator.load()))


@pytest.fixture(scope="module")
def made(stars):
    return {name: one.make(stars) for name, one in SCENARIOS.items()}


@pytest.fixture(scope="module")
def shipped():
    return {name: run_scenarios(Model.load(name), n=100, backend="cpu") for name in SHIPPED}


# --- the spectra -------------------------------------------------------------------------------------------


def test_the_table_is_that_of_the_protocol():
    kinds = {name: one.kind for name, one in SCENARIOS.items()}
    assert [name for name, kind in kinds.items() if kind == "reference"] == list(REFERENCE_SETS)
    assert [name for name, kind in kinds.items() if kind == "no star"] == [
        "black body", "noise only", "zeros", "constant",
    ]  # fmt: skip
    assert {f"gap: {kind}" for kind in GAPS if kind != "none"} <= set(kinds)
    # Velocities are not fitted there.
    assert set(FLAGS) == set(Flag) - {Flag.VELOCITY_UNCERTAIN}


@pytest.mark.parametrize("name", SCENARIOS)
def test_spectra_are_well_formed_and_the_same_in_any_block(made, name):
    spectra = made[name]
    for values in (spectra.flux, spectra.error):
        assert (values.shape, values.dtype) == ((N, 4096), np.float32)
        assert np.isfinite(values).all()
    assert (spectra.error > 0).all()
    assert (spectra.log_g is None) == (SCENARIOS[name].kind == "no star")
    emulator = Emulator.load()
    whole = scenarios.BaseStars(
        5, 7, simulate_rows(5, 7, seed=REFERENCE_SETS["z0"].parts["test_10k"].seed), emulator,
        next(scenarios._stars(2, emulator)).noise,
    )  # fmt: skip
    part = SCENARIOS[name].make(whole)
    np.testing.assert_allclose(part.flux, spectra.flux[5:7], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(part.error, spectra.error[5:7], rtol=1e-5)
    if spectra.mask is not None:
        np.testing.assert_array_equal(part.mask, spectra.mask[5:7])


def test_nothing_but_the_scenario_is_changed(stars, made):
    np.testing.assert_array_equal(made["z0"].flux, stars.noisy)
    for name, factor in (("scale 0.9", 0.9), ("scale 1.1", 1.1)):
        np.testing.assert_allclose(made[name].flux, factor * stars.noisy, rtol=1e-6)
        np.testing.assert_allclose(made[name].error, factor * stars.block.error, rtol=1e-6)
    ratio = made["tilt 10 %"].error / stars.block.error
    np.testing.assert_allclose(ratio[:, [0, -1]], [[0.95, 1.05]] * N, rtol=1e-5)
    wave = Emulator.load().wave
    np.testing.assert_allclose(
        made["F_nu"].error[:, 0]
        / made["F_nu"].error[:, -1]
        / (stars.block.error[:, 0] / stars.block.error[:, -1]),
        (wave[0] / wave[-1]) ** 2,
        rtol=1e-4,
    )
    np.testing.assert_allclose(made["errors too small"].error, stars.block.error / 2, rtol=1e-6)
    np.testing.assert_array_equal(made["errors too small"].flux, stars.noisy)
    np.testing.assert_array_equal(
        made["gap: telluric"].mask, np.repeat(telluric_pixels(wave)[None], N, axis=0)
    )
    flat = (made["continuum-normalised"].flux / stars.noisy) * stars.block.flux
    assert np.abs(np.median(flat, axis=1) - 1).max() < 0.05
    upper = np.quantile(flat.reshape(N, 8, -1), 0.9, axis=2)
    assert (
        upper.std(axis=1) < np.quantile(stars.block.flux.reshape(N, 8, -1), 0.9, axis=2).std(axis=1) + 0.01
    ).all()


@pytest.mark.parametrize(
    ("name", "velocity"), [("100 km/s", 100), ("300 km/s", 300), ("air wavelengths", -82.4)]
)
def test_lines_move_by_the_velocity(stars, made, name, velocity):
    """The shift that makes the noisy spectra most like the clean ones at rest."""
    wave = Emulator.load().wave
    moved = made[name].flux - made[name].flux.mean(axis=1, keepdims=True)

    def likeness(v):
        at_rest = np.array([np.interp(wave / (1 + v / 299792.458), wave, row) for row in stars.block.flux])
        return ((at_rest - at_rest.mean(axis=1, keepdims=True)) * moved / made[name].error ** 2)[
            :, 50:-50
        ].sum()

    grid = velocity + np.arange(-60, 61, 5.0)
    assert abs(grid[np.argmax([likeness(v) for v in grid])] - velocity) <= 10


def test_what_is_no_star(stars, made):
    assert (made["zeros"].flux == 0).all()
    assert (made["constant"].flux == 1).all()
    noise = made["noise only"].flux / made["noise only"].error
    assert noise.std() == pytest.approx(1.0, abs=0.02)
    black = made["black body"]
    smooth = np.median(black.flux, axis=0).reshape(64, 64).mean(axis=1)
    assert (np.diff(smooth[::8]) < 0).all()
    assert np.median(black.flux) == pytest.approx(1.0, abs=0.02)


def test_light_that_does_not_belong_there(stars, made):
    rays = (made["cosmic rays"].flux - stars.noisy) / stars.block.error
    assert ((rays > 1).sum(axis=1) > 10).all()
    assert ((rays > 1e-3).sum(axis=1) <= 30).all()
    assert (rays.max(axis=1) > 20).all()
    sky = made["sky residuals"].flux - stars.noisy
    brightest = stars.noise.line_electrons.sum(axis=0).argmax()
    assert np.abs(sky[:, brightest]).max() > 0.2
    hot = made["outside the labels"]
    # Hotter than 6000 K, the continuum falls more steeply to the red than that of the hottest stars of the set.
    assert np.median(hot.flux[:, :500]) / np.median(hot.flux[:, -500:]) > 1.2
    np.testing.assert_array_equal(made["blend"].log_g, stars.log_g)
    assert np.abs(made["blend"].flux - stars.noisy).max() > 0.05


# --- the measures ------------------------------------------------------------------------------------------


def test_measures_by_hand():
    log_g = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 2.0])
    columns = {
        "log_g": np.array([1.05, 2.15, 3.5, 4.5, np.nan, 2.0], np.float32),
        "log_g_err": np.array([0.1, 0.1, 0.1, 0.1, 0.1, np.nan], np.float32),
        "flag": np.array([0, 0, 0, Flag.UNLIKE_TRAINING, 0, Flag.OUT_OF_GRID], np.uint32),
    }
    found = measure(columns, log_g)
    assert (found.n, found.within_1_sigma, found.within_2_sigma) == (
        6,
        pytest.approx(1 / 6),
        pytest.approx(2 / 6),
    )
    assert found.flagged == pytest.approx(2 / 6)
    assert (found.unlike, found.flags["OUT_OF_GRID"]) == (pytest.approx(1 / 6),) * 2
    # The third star, and the fifth, which has neither a number nor a flag; the fourth is flagged.
    assert found.silent == pytest.approx(2 / 6)
    assert found.bias == pytest.approx((0.05 + 0.15 + 0.5 + 0.5) / 5, rel=1e-5)
    filled = np.array([1.05, 2.15, 3.5, 4.5, log_g.mean(), 2.0])
    expected = 1 - ((filled - log_g) ** 2).sum() / ((log_g - log_g.mean()) ** 2).sum()
    assert found.r2 == pytest.approx(expected, rel=1e-5)
    nothing = measure(columns, None)
    assert (nothing.silent, nothing.r2, nothing.within_1_sigma) == (pytest.approx(4 / 6), None, None)


def test_verdicts():
    def flags(n_silent, n_unlike):
        log_g = np.zeros(1000)
        log_g[:n_silent] = 4.0
        flag = np.zeros(1000, np.uint32)
        flag[len(flag) - n_unlike :] = Flag.UNLIKE_TRAINING
        return {"log_g": log_g, "log_g_err": np.ones(1000), "flag": flag}

    truth = np.zeros(1000)
    assert verdict("star", measure(flags(10, 0), truth)) == "pass"
    assert verdict("star", measure(flags(11, 0), truth)) == "FAIL: silent"
    assert verdict("star", measure(flags(0, 900), truth)) == "pass"
    assert verdict("reference", measure(flags(0, 20), truth)) == "pass"
    assert verdict("reference", measure(flags(11, 21), truth)) == "FAIL: silent, false flags"
    assert verdict("no star", measure(flags(0, 950), None)) == "pass"
    assert verdict("no star", measure(flags(0, 949), None)) == "FAIL: unflagged"


# --- models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_any_recipe_is_judged(shipped, name):
    found = shipped[name]
    assert list(found["scenarios"]) == list(SCENARIOS)
    home = {"observed": "wild"}.get(name, name)
    assert found["scenarios"][home]["r2"] > 0.6
    assert found["scenarios"]["errors too small"]["unlike"] > 0.9
    json.dumps(found, allow_nan=False)
    text = format_text(found)
    assert all(f"\n  {name}" in text for name in SCENARIOS)


def test_results_do_not_depend_on_the_block(shipped, monkeypatch):
    monkeypatch.setattr(scenarios, "ROWS_AT_ONCE", 64)
    names = ("survey", "gap: random", "zeros")
    again = run_scenarios(Model.load("z0"), n=100, names=names, backend="cpu")
    for name in names:
        for key, value in again["scenarios"][name].items():
            expected = shipped["z0"]["scenarios"][name][key]
            assert value == (pytest.approx(expected, rel=1e-4) if isinstance(value, float) else expected)


def test_the_command(tmp_path):
    out = tmp_path / "found.json"
    arguments = ["scenarios", "z0", "-n", "20", "--scenario", "zeros", "--scenario", "tilt 10 %", "-q"]
    result = CliRunner().invoke(cli, [*arguments, "-o", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "20 stars of z0 test_10k" in result.stdout
    stored = json.loads(out.read_text(encoding="utf-8"))
    assert list(stored["scenarios"]) == ["zeros", "tilt 10 %"]
    printed = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False)
    assert json.loads(printed.stdout) == stored
    assert CliRunner().invoke(cli, [*arguments, "-o", str(out)]).exit_code != 0


def test_nonsense_is_refused():
    with pytest.raises(MoefastError, match="scenario 'fog' is unknown; choose of z0"):
        run_scenarios(Model.load("z0"), n=5, names=("fog",))
    with pytest.raises(MoefastError, match="n: expected 2 to 10000 stars, found 1"):
        run_scenarios(Model.load("z0"), n=1)
