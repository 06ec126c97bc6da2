"""Reference sets are what they are called, whoever makes them and however they are cut."""

import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest

from moefast.core.errors import MoefastError
from moefast.simulate import Emulator, simulate_file, simulate_params
from moefast.simulate.gaps import Gaps
from moefast.simulate.rows import CALIBRATION, PARAMS
from moefast.simulate.sets import (
    FINGERPRINTS,
    REFERENCE_SETS,
    Identity,
    fingerprint,
    identify,
    simulate_set,
)
from moefast.simulate.visit import Visit


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """Rows 20 to 49 of the training part of z0."""
    path = tmp_path_factory.mktemp("sets") / "train.h5"
    simulate_set(path, "z0", "train", rows=(20, 50), noisy=True)
    return path


@pytest.fixture
def copy(shard, tmp_path):
    shutil.copy(shard, tmp_path / "copy.h5")
    return tmp_path / "copy.h5"


def test_the_sets_are_those_of_the_protocol():
    z0, survey = (REFERENCE_SETS[name].settings for name in ("z0", "survey"))
    assert z0.label_ranges == ((3750, 6000), (1, 5), (-2.5, 0.75), (-0.3, 0.5), (-0.5, 0.5))
    assert z0.mag == (20.5, 22.5)
    assert (z0.velocity_scatter, z0.redshift, z0.reddening, z0.calibration) == (0, (0, 0), (0, 0), 0)
    changes = {"velocity_scatter": 30.0, "reddening": (0.0, 0.3), "calibration": 0.03}
    assert survey == replace(z0, **changes)
    wild = REFERENCE_SETS["wild"].settings
    assert wild == replace(survey, velocity_scatter=5.0, visit=Visit())
    assert wild.visit == Visit(
        sky_continuum=0.3, sky_lines=0.5, sky_residual=0.01, tilt=0.05, line_spread=0.1, own_median=True,
        gaps=Gaps(telluric=2 / 3, random=(0.005, 0.05), block=0.1, block_share=(0.05, 0.2), edges=0.2),
    )  # fmt: skip
    for chosen in REFERENCE_SETS.values():
        assert {"train", "test_10k", "test_1k"} <= set(chosen.parts)
        assert (chosen.parts["test_10k"].n_rows, chosen.parts["test_1k"].n_rows) == (10_000, 1_000)
        assert len({part.seed for part in chosen.parts.values()}) == len(chosen.parts)


@pytest.mark.parametrize(("name", "part"), sorted(FINGERPRINTS))
def test_frozen_parts_are_still_made(name, part):
    assert fingerprint(name, part) == FINGERPRINTS[name, part]


def test_every_fixed_part_is_frozen():
    fixed = {(n, p) for n, s in REFERENCE_SETS.items() for p, part in s.parts.items() if part.n_rows}
    assert set(FINGERPRINTS) == fixed
    assert len(set(FINGERPRINTS.values())) == len(fixed)


def test_a_star_of_the_survey_is_the_same_star_of_z0():
    for part in ("train", "test_1k"):
        plain, seen, wild = (
            simulate_params(5, 40, seed=s.parts[part].seed, settings=s.settings)
            for s in REFERENCE_SETS.values()
        )
        for name, values in plain.items():
            changed = name in {"velocity", "ebv", *CALIBRATION}
            assert np.array_equal(values, seen[name]) != changed, name
            # The velocities that are left of those of the survey; all else is the same star.
            np.testing.assert_allclose(wild[name], seen[name] / (6 if name == "velocity" else 1), rtol=1e-12)


def test_a_file_is_recognised_by_what_is_in_it(shard):
    expected = Identity("z0", "train", fingerprint("z0", "train", (20, 50)))
    assert identify(shard) == expected
    with h5py.File(shard) as file:
        assert [file.attrs[name] for name in Identity._fields] == list(expected)
        assert file["dataset/params/table"]["id"].tolist() == list(range(20, 50))


def test_rows_do_not_depend_on_the_shard(shard, tmp_path):
    simulate_set(tmp_path / "other.h5", "z0", "train", rows=(40, 60))
    with h5py.File(shard) as one, h5py.File(tmp_path / "other.h5") as other:
        for name in ("flux", "error"):
            array = f"dataset/arrays/{name}/value"
            np.testing.assert_array_equal(one[array][20:], other[array][:10])
        assert "noisy" not in other["dataset/arrays"]


@pytest.mark.parametrize(
    ("dataset", "row", "factor"),
    [
        ("dataset/params/table", 3, None),
        ("dataset/arrays/flux/value", 0, 1.001),
        ("dataset/arrays/error/value", 29, 1.001),
        ("dataset/arrays/noisy/value", 0, 1.01),
    ],
)
def test_a_file_that_was_changed_is_not_the_set(copy, dataset, row, factor):
    assert identify(copy) is not None
    with h5py.File(copy, "r+") as file:
        values = file[dataset][row]
        if factor is None:
            values["log_g"] += 1e-3
        else:
            values = values * factor
        file[dataset][row] = values
    assert identify(copy) is None


@pytest.mark.parametrize("attribute", [*Identity._fields, "first_row"])
def test_a_false_claim_is_not_believed(copy, attribute):
    with h5py.File(copy, "r+") as file:
        old = file.attrs[attribute]
        changed = {
            "reference_set": "survey",
            "part": "validation",
            "fingerprint": "0" * 64,
            "first_row": old - 1 if attribute == "first_row" else 0,
        }
        file.attrs[attribute] = changed[attribute]
    assert identify(copy) is None
    with h5py.File(copy, "r+") as file:
        del file.attrs[attribute]
    assert identify(copy) is None


def test_other_files_are_no_set(tmp_path):
    assert identify(tmp_path / "absent.h5") is None
    (tmp_path / "text.h5").write_text("no")
    assert identify(tmp_path / "text.h5") is None
    simulate_file(tmp_path / "free.h5", 3, seed=71_001)
    assert identify(tmp_path / "free.h5") is None
    # The right rows under the name of a part that has more of them.
    claim = {"reference_set": "z0", "part": "test_1k", "fingerprint": fingerprint("z0", "test_1k")}
    simulate_file(tmp_path / "part.h5", 3, seed=71_004, attrs=claim)
    assert identify(tmp_path / "part.h5") is None


@pytest.mark.parametrize(
    ("name", "part", "rows", "message"),
    [
        ("z1", "train", (0, 5), "'z1' is unknown; choose one of z0, survey"),
        ("z0", "test", None, "no part 'test'; it has train"),
        ("z0", "train", None, "say which"),
        ("z0", "train", (5, 5), "say which"),
        ("z0", "test_1k", (0, 999), "1000 rows and is made as a whole"),
    ],
)
def test_parts_that_do_not_exist_are_refused(tmp_path, name, part, rows, message):
    with pytest.raises(MoefastError, match=message):
        simulate_set(tmp_path / "x.h5", name, part, rows=rows)
    assert not list(tmp_path.iterdir())


def test_the_producers_readers_take_the_file(shard):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("tables")
    table = pandas.read_hdf(shard, "dataset/params")
    expected = simulate_params(20, 50, seed=71_001)
    assert list(table.columns) == list(PARAMS)
    for name, values in expected.items():
        np.testing.assert_array_equal(table[name], values)
    assert (table["snr"] > 1).all()
    with h5py.File(shard) as file:
        assert file["dataset/arrays/flux/value"].shape == (30, 4096)
        np.testing.assert_array_equal(file["spectrumdataset/wave"][:], Emulator.load().wave)
