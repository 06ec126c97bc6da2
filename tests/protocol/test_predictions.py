"""Tables of predictions: read in any order and format, refused with the rows named, kept whole."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from astropy.table import Table

from moefast.core.errors import InputError
from moefast.predicting.files import predict
from moefast.protocol.evaluate import evaluate
from moefast.protocol.predictions import read_predictions
from moefast.protocol.report_folder import write_report
from moefast.spectra import open_spectra, read_table
from moefast.spectra.tables import Column, open_table

N = 300


@pytest.fixture(scope="module")
def noisy_file(stars, tmp_path_factory):
    return stars.take(slice(0, N)).write(
        tmp_path_factory.mktemp("noisy") / "noisy.h5", arrays=("flux", "error", "noisy")
    )


@pytest.fixture(scope="module")
def spectra(noisy_file):
    return open_spectra(noisy_file)


@pytest.fixture(scope="module")
def own(noisy_file, model):
    return evaluate(noisy_file, model)


def write_csv(path, columns):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def refused(path, spectra, words):
    with pytest.raises(InputError, match=words) as caught:
        read_predictions(path, spectra)
    assert str(path) in str(caught.value)
    return str(caught.value)


# -- read --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".h5", ".parquet", ".fits"])
def test_tables_of_predict_give_the_report_of_the_model(suffix, noisy_file, model, own, tmp_path):
    predict(noisy_file, model, tmp_path / f"t{suffix}")
    found = evaluate(noisy_file, tmp_path / f"t{suffix}")
    np.testing.assert_array_equal(found.predicted, own.predicted)
    assert found.report["overall"] == own.report["overall"]
    assert found.report["snr_norm"] == own.report["snr_norm"]
    assert found.report["model"]["kind"] == "table"
    assert found.report["routing"]["usage"] == own.report["routing"]["usage"]
    assert found.run["spectra_per_second"] is None


def test_csv_in_any_order(noisy_file, own, tmp_path):
    order = np.random.default_rng(1).permutation(N)
    path = write_csv(
        tmp_path / "other.csv",
        {
            "name": [f"star {i}, faint" for i in order],
            "log_g": [repr(float(v)) for v in own.predicted[order]],
            "row": order,
            "log_g_err": [repr(float(v)) for v in own.stars["log_g_err"][order]],
        },
    )
    path.write_text("# made by somebody\n\n" + path.read_text())
    found = evaluate(noisy_file, path)
    assert found.report["overall"] == own.report["overall"]
    assert found.report["calibration"] == own.report["calibration"]
    assert found.report["routing"] is None
    assert found.report["model"]["name"] == "other.csv"


def test_fits_tables_of_others(noisy_file, spectra, own, tmp_path):
    values = {"row": np.arange(N)[::-1], "log_g": own.predicted[::-1], "name": ["x"] * N}
    Table(values).write(tmp_path / "others.fits")
    found = read_predictions(tmp_path / "others.fits", spectra)
    np.testing.assert_array_equal(found.columns["log_g"], own.predicted)
    Table({"row": np.arange(N), "logg": own.predicted}).write(tmp_path / "lacking.fits")
    refused(tmp_path / "lacking.fits", spectra, "no table with a column log_g")


def test_what_an_evaluation_keeps_can_be_evaluated(noisy_file, own, tmp_path):
    write_report(own, tmp_path / "report", pictures=False)
    again = evaluate(noisy_file, tmp_path / "report" / "predictions.h5")
    different = {key for key in own.report if own.report[key] != again.report[key]}
    # The shipped model, whose fits are the references of tables, lies on another wave grid.
    assert different == {"model", "references", "rho", "snr_oracle"}
    assert again.report["references"] == {}
    columns, attrs = read_table(tmp_path / "report" / "predictions.h5")
    for name, values in own.stars.items():
        np.testing.assert_array_equal(columns[name], values, err_msg=name)
    assert attrs["input_sha256"] == own.report["data_set"]["fingerprint"]
    first = (tmp_path / "report" / "predictions.h5").read_bytes()
    write_report(own, tmp_path / "report", pictures=False, overwrite=True)
    assert (tmp_path / "report" / "predictions.h5").read_bytes() == first


def test_several_files(stars, model, tmp_path):
    for i, rows in enumerate((slice(0, 60), slice(60, 150))):
        stars.take(rows).write(tmp_path / f"set_{i}.h5", arrays=("flux", "error", "noisy"))
    files = [tmp_path / "set_0.h5", tmp_path / "set_1.h5"]
    predict(files, model, tmp_path / "t.h5")
    own = evaluate(files, model)
    np.testing.assert_array_equal(evaluate(files, tmp_path / "t.h5").predicted, own.predicted)
    columns, _ = read_table(tmp_path / "t.h5")
    columns["file"][3], columns["row"][3] = 1, 90
    path = write_csv(tmp_path / "t.csv", {name: columns[name] for name in ("file", "row", "log_g")})
    message = refused(path, open_spectra(files), "missing rows: 0:3;")
    assert "rows that the test set has not: 1:90" in message


def test_values_that_are_not_finite_count_as_the_mean_and_are_reported(noisy_file, own, tmp_path):
    text = [repr(float(v)) for v in own.predicted]
    text[5], text[17], text[200] = "", "nan", "inf"
    found = evaluate(noisy_file, write_csv(tmp_path / "t.csv", {"row": range(N), "log_g": text}))
    overall = found.report["overall"]
    assert (overall["n"], overall["n_nan"]) == (N, 3)
    y, filled = own.log_g, own.predicted.copy()
    filled[[5, 17, 200]] = y.mean()
    assert overall["r2"] == pytest.approx(1 - ((y - filled) ** 2).sum() / ((y - y.mean()) ** 2).sum())


# -- refused -----------------------------------------------------------------------------------------------------


def test_rows_are_named(spectra, tmp_path):
    rows = np.arange(N)
    values = np.zeros(N)
    keep = ~np.isin(rows, [7, 250])
    message = refused(
        write_csv(tmp_path / "a.csv", {"row": rows[keep], "log_g": values[keep]}),
        spectra,
        "missing rows: 7, 250",
    )
    assert "more than once" not in message
    assert "as NaN" in message
    twice = np.concatenate([rows, [11, 12, 12]])
    message = refused(
        write_csv(tmp_path / "b.csv", {"row": twice, "log_g": np.zeros(N + 3)}),
        spectra,
        "rows given more than once: 11, 12",
    )
    assert "missing" not in message
    more = np.concatenate([rows, [-1, N]])
    refused(
        write_csv(tmp_path / "c.csv", {"row": more, "log_g": np.zeros(N + 2)}),
        spectra,
        f"rows that the test set has not: -1, {N}",
    )
    refused(
        write_csv(tmp_path / "d.csv", {"row": rows[:100], "log_g": values[:100]}),
        spectra,
        r"… \(200 in all\)",
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("row,log_g\n0,1\n1.5,2\n", "whole numbers; found 1.5"),
        ("row,log_g\n0,1\n,2\n", "whole numbers; found nan"),
        ("row,log_g\n0,1\n1,high\n", "line 3: log_g must be a number; found 'high'"),
        ("# c\nrow,log_g\n0,1\n1,2,3\n", "line 4: 2 fields expected; found 3"),
        ("row,logg\n0,1\n", "column log_g is missing; found row"),
        ("star,log_g\n0,1\n", "column row, or an identifier, is missing; found star, log_g"),
        ("objId,log_g\n0,1\n", "found objId, log_g, the test set has"),
        ("row log_g\n0 1\n", "separated by commas"),
        ("row,row,log_g\n0,0,1\n", "names must differ"),
        ('row,log_g\n0,"1\n1",2\n', "several lines"),
        (
            "row,log_g\n" + "".join(f"{i},{-9999 if i in (3, 8) else 3}\n" for i in range(N)),
            "log_g holds -9999 as number 3 of the column .* 2 of 300 numbers outside -90 to 90",
        ),
        (
            "row,log_g\n" + "".join(f"{i},{1e200 if i == 3 else 3}\n" for i in range(N)),
            r"log_g holds 1e\+200",
        ),
        (
            "row,log_g,log_g_err\n" + "".join(f"{i},3,{-1 if i == 9 else 0.1}\n" for i in range(N)),
            "log_g_err holds -1 as number 9",
        ),
        ("row,log_g,weight_0,weight_2\n" + "".join(f"{i},1,1,0\n" for i in range(N)), "weight_0 to weight_1"),
    ],
)
def test_other_nonsense(text, words, spectra, tmp_path):
    (tmp_path / "t.csv").write_text(text)
    refused(tmp_path / "t.csv", spectra, words)


def test_stars_are_matched_by_their_identifiers(stars, tmp_path):
    few = stars.take(slice(0, 40))
    few.params["catId"] = np.repeat([1, 2], 20)
    # One beyond what a double holds exactly.
    few.params["objId"] = np.tile(2**60 + np.arange(20), 2)
    path = few.write(tmp_path / "x.h5")
    order = np.random.default_rng(1).permutation(40)
    columns = {name: few.params[name][order] for name in ("objId", "catId")} | {
        "log_g": few.params["log_g"][order]
    }
    expected = np.asarray(few.params["log_g"], np.float64)
    spectra = open_spectra(path)
    found = read_predictions(write_csv(tmp_path / "t.csv", columns), spectra)
    np.testing.assert_allclose(found.columns["log_g"], expected, rtol=1e-6)
    layout = [Column(name, values.dtype) for name, values in columns.items()]
    with open_table(tmp_path / "t.parquet", 40, layout) as table:
        table.write(0, columns)
    found = read_predictions(tmp_path / "t.parquet", spectra)
    np.testing.assert_array_equal(found.columns["log_g"], few.params["log_g"])
    some = {name: values[:39] for name, values in columns.items()}
    words = refused(write_csv(tmp_path / "u.csv", some), spectra, "catId and objId .* expected; missing: ")
    assert f"missing: {columns['catId'][39]} {columns['objId'][39]}" in words
    twice = {name: np.append(values, values[:1]) for name, values in columns.items()}
    refused(write_csv(tmp_path / "v.csv", twice), spectra, "given more than once: ")
    other = columns | {"objId": np.append(columns["objId"][:39], 7)}
    refused(write_csv(tmp_path / "w.csv", other), spectra, "not in the test set: . 7")
    text = columns | {"objId": [f"star {i}" for i in order]}
    refused(write_csv(tmp_path / "y.csv", text), spectra, "whole numbers in both")
    alone = {name: columns[name] for name in ("objId", "log_g")}
    refused(write_csv(tmp_path / "z.csv", alone), spectra, "cannot be told apart by objId")


def test_absent_tables(spectra, tmp_path):
    refused(tmp_path / "t.csv", spectra, "no such file")
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path / "t.csv", spectra, "cannot be read")
    with open_table(
        tmp_path / "t.h5", 2, [Column("row", np.dtype("i8")), Column("log_g", np.dtype("S3"))]
    ) as table:
        table.write(0, {"row": np.arange(2), "log_g": np.array([b"1", b"2"])})
    refused(tmp_path / "t.h5", spectra, "missing rows: 2, 3")
    with open_table(
        tmp_path / "u.h5", N, [Column("row", np.dtype("i8")), Column("log_g", np.dtype("S3"))]
    ) as table:
        table.write(0, {"row": np.arange(N), "log_g": np.full(N, b"1")})
    refused(tmp_path / "u.h5", spectra, "log_g must hold numbers")


def test_predictions_for_other_spectra_or_other_noise(stars, noisy_file, spectra, model, own, tmp_path):
    other = stars.take(slice(N, 2 * N)).write(tmp_path / "other.h5", arrays=("flux", "error", "noisy"))
    predict(other, model, tmp_path / "other.parquet")
    refused(tmp_path / "other.parquet", spectra, "predictions for other spectra")
    predict(noisy_file, model, tmp_path / "clean.h5", array="flux")
    with pytest.raises(InputError, match="made of the array flux; this evaluation measures on noisy"):
        evaluate(noisy_file, tmp_path / "clean.h5")
    assert evaluate(noisy_file, tmp_path / "clean.h5", noise="none").report["overall"]["r2"] > 0.5
    path = write_csv(tmp_path / "t.csv", {"row": range(N), "log_g": own.predicted})
    with pytest.raises(InputError, match="no table can have met it"):
        evaluate(noisy_file, path, noise="draw")
    write_report(own, tmp_path / "report", pictures=False)
    with pytest.raises(InputError, match=r"was made with .*stored"):
        evaluate(noisy_file, tmp_path / "report" / "predictions.h5", noise="none")
    drawn = evaluate(noisy_file, model, noise="draw")
    write_report(drawn, tmp_path / "drawn", pictures=False)
    table = tmp_path / "drawn" / "predictions.h5"
    assert evaluate(noisy_file, table, noise="draw").report["overall"] == drawn.report["overall"]
    with pytest.raises(InputError, match="was made with"):
        evaluate(noisy_file, table)


def test_the_report_is_json_throughout(own):
    json.dumps(own.report, allow_nan=False)
    json.dumps(own.run, allow_nan=False)
