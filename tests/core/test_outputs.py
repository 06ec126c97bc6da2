"""The schema of outputs: complete, plain, and what tables, graph, parity check and documentation say."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from astropy.io import fits

from moefast.core import outputs
from moefast.core.outputs import Output
from moefast.export import build
from moefast.export.parity import POSTERIOR_TOLERANCES, TOLERANCES
from moefast.mixture import Prediction
from moefast.predicting.columns import table_columns
from moefast.predicting.files import predict
from moefast.spectra.quality import Flag
from moefast.spectra.tables import Column, open_table

PAGE = Path(__file__).parents[2] / "docs/outputs.md"


def test_names_differ_and_units_are_known():
    every = outputs.prediction_columns(9, ["log_g", *outputs.LABELS])
    names = [one.name for one in outputs.INPUTS] + [name for name, _, _ in every]
    assert len(set(names)) == len(names)
    assert {output.unit for _, output, _ in every} == {"", "K", "dex"}


def test_what_onnx_gives_is_in_the_schema_and_of_a_prediction():
    given = [one.onnx for one in outputs.PREDICTIONS if one.onnx]
    assert sorted(given) == sorted((*outputs.ONNX, *outputs.POSTERIOR_ONNX))
    assert set(given) <= Prediction.__dataclass_fields__.keys()
    assert list(TOLERANCES) == list(outputs.ONNX)
    # As they were published with the first files; they may be made smaller, never larger.
    assert TOLERANCES == {
        "log_g": 1e-4, "log_g_err": 1e-3, "weights": 1e-4, "expert_log_g": 1e-4, "log_g_err_raw": 1e-3,
        "chi2": 1e-3, "log_level": 1e-4,
    }  # fmt: skip
    assert POSTERIOR_TOLERANCES == {
        "distance": 1e-3, "strength": 1e-4, "scale": 1e-4, "foreign": 1e-4, "blend": 1e-4, "labels": 1e-3,
            "label_errors": 1e-3,
        "label_correlations": 1e-3,
    }  # fmt: skip


def test_the_graph_says_what_the_schema_says(model):
    graph = build(model.mixture).graph
    assert [one.name for one in graph.output] == list(outputs.ONNX)
    for one in graph.output:
        expected = outputs.by_onnx(one.name)
        assert expected.meaning in one.doc_string
        assert one.doc_string.endswith(expected.unit)
        assert len(one.type.tensor_type.shape.dim) == 1 + (expected.per == "expert")


def test_order_and_types_of_a_prediction_table(model):
    k = model.mixture.n_experts
    layout = table_columns(model.mixture, {"id": np.dtype("int64")}, True)
    assert [(column.name, column.dtype.str[1:]) for column in layout] == [
        ("file", "i4"), ("row", "i8"), ("id", "i8"), ("log_g", "f4"), ("log_g_err", "f4"), ("log_g_err_raw", "f4"),
        *[(f"weight_{i}", "f4") for i in range(k)], ("expert", "i2"), ("snr_norm", "f4"), ("snr_median", "f4"),
        ("chi2", "f4"), ("flag", "u4"),
    ]  # fmt: skip
    assert [column.name for column in table_columns(model.mixture, {}, False)][:2] == [
        "row",
        "log_g",
    ]


def test_files_carry_unit_and_meaning(stars_file, model_folder, tmp_path):
    for ending in ("h5", "fits"):
        predict(stars_file, model_folder, tmp_path / f"log_g.{ending}")
    schema = {name: output for name, output, _ in outputs.prediction_columns(1)}
    with h5py.File(tmp_path / "log_g.h5") as file:
        for name in ("log_g", "log_g_err", "weight_0", "chi2"):
            dataset = file[f"predictions/{name}"]
            assert dataset.attrs["unit"] == schema[name].unit
            assert dataset.attrs["description"] == schema[name].meaning
        flags = file["predictions/flag"].attrs["description"]
        assert all(f"{flag.value} {flag.name}" in flags for flag in Flag)
    with fits.open(tmp_path / "log_g.fits") as file:
        header, names = file[1].header, file[1].columns.names
        for name in ("log_g_err_raw", "weight_0", "snr_norm"):
            assert schema[name].meaning in header[f"TCOMM{names.index(name) + 1}"]


def test_a_label_brings_value_error_and_correlation():
    columns = outputs.label_columns(["log_g", "T_eff", "M_H"])
    assert [(name, output.unit, number) for name, output, number in columns] == [
        ("T_eff", "K", 0), ("T_eff_err", "K", 0), ("T_eff_corr", "", 0),
        ("M_H", "dex", 1), ("M_H_err", "dex", 1), ("M_H_corr", "", 1),
    ]  # fmt: skip
    assert columns[1].output.meaning == "calibrated 1 sigma of T_eff"
    assert outputs.label_unit("C_M") == "dex"
    names = [name for name, _, _ in outputs.prediction_columns(1, ["log_g", "T_eff"])]
    assert names[:7] == ["log_g", "log_g_err", "log_g_err_raw", "T_eff", "T_eff_err", "T_eff_corr", "scale"]
    assert [name for name in names if not name.startswith(("T_eff", "scale", "foreign"))] == [
        name for name, _, _ in outputs.prediction_columns(1)
    ]
    assert "blend" not in names
    with_blends = [name for name, _, _ in outputs.prediction_columns(1, ["log_g", "T_eff"], blends=True)]
    assert with_blends == [*names[:8], "blend", *names[8:]]


@pytest.mark.skipif(not PAGE.is_file(), reason="only in a checkout")
def test_the_page_of_columns_says_what_the_schema_says():
    expected = outputs.markdown()
    assert expected in PAGE.read_text(encoding="utf-8"), f"put this table into docs/outputs.md:\n{expected}"


def test_a_column_of_an_output(tmp_path):
    with open_table(tmp_path / "t.fits", 1, [Column.of(one) for one in outputs.KEPT]) as table:
        table.write(0, {"log_g_true": np.array([4.0]), "T_eff": np.array([5000.0]), "M_H": np.array([0.0])})
    with fits.open(tmp_path / "t.fits") as file:
        assert file[1].columns["T_eff"].unit == "K"
        assert file[1].data["T_eff"].tolist() == [5000.0]


def test_an_output_that_no_header_can_hold_is_refused():
    with pytest.raises(ValueError, match="ASCII without a full stop"):
        Output("x", "1σ")
    with pytest.raises(ValueError, match="tolerance"):
        Output("x", "a number", onnx="x")
