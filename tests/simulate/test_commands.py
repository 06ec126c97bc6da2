"""The commands `simulate` and `fit`, as far as they name what is simulated."""

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from moefast.cli import cli
from moefast.simulate import FINGERPRINTS, REFERENCE_SETS, Settings, identify, simulate_rows
from moefast.simulate.sets import TRAINING_SETS


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments, code=0):
        result = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result

    return call


def test_lists_the_sets(run):
    text = run("simulate", "--list-sets").stdout
    for name in (*REFERENCE_SETS, *TRAINING_SETS):
        assert f"\n{name}: " in "\n" + text
    for value in FINGERPRINTS.values():
        assert value in text


def test_makes_parts_of_sets(run):
    result = run("simulate", "test.h5", "--set", "survey", "--part", "test_1k")
    identity = identify("test.h5")
    assert identity[:2] == ("survey", "test_1k")
    assert f"set fingerprint {identity.fingerprint} (as frozen)" in result.stdout
    run("simulate", "train.h5", "--set", "survey", "--part", "train", "--rows", "7:19", "-q")
    assert identify("train.h5")[:2] == ("survey", "train")
    run("simulate", "more.h5", "--set", "survey", "--part", "validation", "-n", "3", "--noisy", "-q")
    with h5py.File("test.h5") as test, h5py.File("train.h5") as train, h5py.File("more.h5") as more:
        assert "noisy" in test["dataset/arrays"]
        assert "noisy" not in train["dataset/arrays"]
        assert "noisy" in more["dataset/arrays"]
        assert train["dataset/params/table"]["id"].tolist() == list(range(7, 19))
        assert np.std(train["dataset/params/table"]["velocity"]) > 5


def test_switches_reach_the_file(run):
    run(
        "simulate", "free.h5", "-n", 5, "--seed", 3, "--velocity", 20, "--redshift", -1e-4, 1e-4,
        "--reddening", 0.1, 0.2, "--calibration", 0.05, "--noise-level", 2, "--mag", 20, 21,
    )  # fmt: skip
    with h5py.File("free.h5") as file:
        table = file["dataset/params/table"][:]
        assert Settings.from_json(file.attrs["settings"]).noise_level == 2
    assert ((table["ebv"] > 0.1) & (table["ebv"] < 0.2)).all()
    assert ((table["mag"] > 20) & (table["mag"] < 21)).all()
    for name in ("velocity", "redshift", "calibration_1", "calibration_4"):
        assert table[name].std() > 0
    run("simulate", "rows.h5", "--rows", "2:6", "--seed", 3)
    plain = simulate_rows(2, 6, seed=3)
    with h5py.File("rows.h5") as file:
        np.testing.assert_array_equal(file["dataset/arrays/noisy/value"][:], plain.noisy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("x.h5 --set z1 --part train -n 4", "'z1' is unknown; choose one of z0, survey"),
        ("x.h5 --set z0", "choose one of train, validation, test_10k, test_1k"),
        ("x.h5 --set z0 --part test", "'test' is unknown"),
        ("x.h5 --set z0 --part test_1k -n 4", "has 1,000 spectra; leave -n"),
        ("x.h5 --set z0 --part train", "any number of rows"),
        ("x.h5 --set z0 --part train -n 4 --seed 3", "--seed: a reference set is what it is"),
        ("x.h5 --set z0 --part train -n 4 --mag 20 21 --velocity 3", "--mag, --velocity: a reference set"),
        ("x.h5 --part train -n 4 --seed 3", "say which with --set"),
        ("x.h5 -n 4", "--seed"),
        ("x.h5 --seed 4", "-n"),
        ("x.h5 -n 4 --rows 0:4 --seed 4", "give one of them"),
        ("x.h5 -n 4 --seed 4 --velocity -3", "not a positive number"),
        ("x.h5 -n 4 --seed 4 --velocity 300", "allow"),
        ("x.h5 -n 4 --seed 4 --redshift 0.001 0", "the lower limit comes first"),
        ("x.h5 -n 4 --seed 4 --redshift 0 0.1", "redshift 0 to 0.1"),
        ("x.h5 -n 4 --seed 4 --calibration nan", "not a positive number"),
        ("x.h5 -n 4 --seed 4 --calibration 3", "3 is an error of 300%"),
        ("x.h5 -n 4 --seed 4 --reddening -0.1 0.3", "E(B-V) is 0 or more"),
        ("x.fits -n 4 --seed 4", "spectra are written as HDF5; name the file .h5"),
        ("-n 4 --seed 4", "name the file"),
    ],
)
def test_contradictions_are_refused(run, tmp_path, arguments, message):
    assert message in run("simulate", *arguments.split(), code=2).output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-o model", "name the files to fit"),
        ("x.h5 --simulate 5 -o model", "name the files to fit"),
        ("x.h5 --set z0 -o model", "how many with --simulate"),
    ],
)
def test_fit_wants_files_or_a_number(run, tmp_path, arguments, message):
    assert message in run("fit", *arguments.split(), code=2).output
    assert not list(tmp_path.iterdir())


def test_fit_from_the_generator(run, monkeypatch):
    seen = {}

    def fit(spectra, **options):
        seen.update(spectra=spectra, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr("moefast.recipes.fit", fit)
    run("fit", "--simulate", "5000", "--set", "survey", "-o", "model", code=130)
    assert seen["spectra"].n_rows == 5000
    assert seen["spectra"].identity[:2] == ("survey", "train")
    run("fit", "--simulate", "3000", "-o", "model", code=130)
    assert seen["spectra"].identity[:2] == ("z0", "train")
