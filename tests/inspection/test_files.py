"""What `inspect` shows."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest

from moefast.core.errors import OutputError
from moefast.inspection.files import format_text, summarise
from moefast.inspection.files_picture import draw_files
from moefast.spectra import open_spectra


def test_summary_counts_what_is_wrong(make_file):
    first, values = make_file("a.h5", n=40, p=64, dtype="f4", arrays=("flux", "error", "mask"))
    second, other = make_file("b.h5", n=10, p=64, seed=4)
    with h5py.File(first, "r+") as file:
        file["dataset/arrays/mask/value"][...] = 0
        file["dataset/arrays/mask/value"][5] = 1
        file["dataset/arrays/error/value"][7, 3] = 0
        file["dataset/arrays/flux/value"][9, :40] = np.nan
    spectra = open_spectra([first, second])
    summary = summarise(spectra)
    json.dumps(summary, allow_nan=False)
    assert summary["rows"] == summary["rows_examined"] == 50
    assert summary["rows_unreadable"] == 0
    assert summary["wave"] == {"pixels": 64, "first": 7100.0, "last": 8850.0, "step": 1750 / 63}
    assert summary["flags"] == {"NO_DATA": 1, "FEW_GOOD_PIXELS": 2, "BAD_ERROR": 1}
    assert [(row["row"], row["flags"]) for row in summary["bad_rows"]] == [
        (5, ["NO_DATA", "FEW_GOOD_PIXELS"]),
        (7, ["BAD_ERROR"]),
        (9, ["FEW_GOOD_PIXELS"]),
    ]
    assert {row["file"] for row in summary["bad_rows"]} == {str(first)}
    assert summary["masked_fraction"] == 64 / (50 * 64)
    assert summary["bad_fraction"] == pytest.approx((64 + 1 + 40) / (50 * 64))
    assert summary["files"][0]["arrays"]["flux"] == {"dtype": "float32", "layout": "contiguous"}
    ranges = summary["files"][1]["ranges"]["log_g"]
    assert ranges["minimum"] == other["log_g"].min()
    assert ranges["maximum"] == other["log_g"].max()
    assert 1.4 < summary["flux_median"] < 1.6
    ratios = [np.median(v["flux"] / v["error"], axis=1) for v in (values, other)]
    assert summary["snr_median"]["50"] == pytest.approx(np.median(np.concatenate(ratios)), rel=0.02)


def test_identifiers_are_shown_with_all_their_digits(make_file):
    path, _ = make_file(n=2, labels=None)
    with h5py.File(path, "r+") as file:
        table = np.array([(2**62 + 1, 0.1234567), (25769842441, 2.0)], [("objId", "i8"), ("log_g", "f8")])
        file["dataset/params"] = table
    summary = summarise(open_spectra(path))
    assert summary["files"][0]["ranges"]["objId"]["maximum"] == 2**62 + 1
    lines = [line.split() for line in format_text(summary).splitlines()]
    assert ["objId", "25769842441", "4611686018427387905"] in lines
    assert ["log_g", "0.123457", "2", "dex"] in lines


def test_summary_of_some_rows(make_file):
    spectra = open_spectra(make_file(n=500)[0])
    assert summarise(spectra, max_rows=100)["rows_examined"] == 96
    assert summarise(spectra, max_rows=3)["rows_examined"] == 3
    assert summarise(spectra, max_rows=1000)["rows_examined"] == 500
    with pytest.raises(ValueError, match="max_rows"):
        summarise(spectra, max_rows=0)


def test_summary_without_anything_good(make_file):
    path, _ = make_file(n=3, labels=None)
    with h5py.File(path, "r+") as file:
        file["dataset/arrays/error/value"][...] = 0
    summary = summarise(open_spectra(path))
    json.dumps(summary, allow_nan=False)
    assert summary["snr_norm"] is None
    assert summary["flags"]["NO_DATA"] == 3
    assert summary["bad_fraction"] == 1


def test_summary_of_a_damaged_file(make_file):
    path, _ = make_file(n=100)
    spectra = open_spectra(path)
    with open(path, "rb+") as file:
        file.truncate(path.stat().st_size - 100 * 32 * 8)
    summary = summarise(spectra)
    assert summary["rows_unreadable"] == 100
    assert "truncated" in summary["files"][0]["problem"]
    assert "cannot be read" in summary["failures"][0]["message"]


@pytest.mark.parametrize("n", [1, 3, 50])
def test_picture(make_file, tmp_path, n):
    path, _ = make_file(n=n, arrays=("flux", "error", "mask"))
    out = draw_files(open_spectra(path), tmp_path / "look.png")
    assert out.read_bytes().startswith(b"\x89PNG")
    assert out.stat().st_size > 10_000
    with pytest.raises(OutputError, match="exists already"):
        draw_files(open_spectra(path), out, overwrite=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dataset.h5", "look.png"]


def test_picture_of_nothing_good(make_file, tmp_path):
    path, _ = make_file(n=3, labels=None)
    with h5py.File(path, "r+") as file:
        file["dataset/arrays/error/value"][...] = 0
    assert draw_files(open_spectra(path), tmp_path / "look.png").exists()
