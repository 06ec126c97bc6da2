"""A posterior as a model: kept in a folder, scored by every engine, flagged, evaluated, exported."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from made_posterior import SUMMARY, model_of, posterior_of, random_posterior
from small import same_rows

from moefast.benchmarks.score import mixture_arrays
from moefast.cli import cli
from moefast.core.errors import BackendError, ModelError
from moefast.core.grids import PHYSICAL_GRID
from moefast.model import MANIFEST, SCHEMA, Model
from moefast.predicting.columns import columns_of, table_columns
from moefast.predicting.engines import CudaEngine, OnnxEngine, joined, make_engine, without_kernels
from moefast.predicting.files import predict
from moefast.protocol.evaluate import evaluate
from moefast.spectra import Flag, read_table
from moefast.spectra.quality import assess

LABELS = ("T_eff", "M_H", "a_M", "C_M")


@pytest.fixture(scope="module")
def fitted(stars):
    return posterior_of(stars.take(slice(0, 1200)))


@pytest.fixture(scope="module")
def few(stars):
    return stars.take(slice(2400, 2600))


@pytest.fixture(scope="module")
def few_file(few, tmp_path_factory):
    return few.write(tmp_path_factory.mktemp("few") / "few.h5", arrays=("flux", "error", "noisy"))


@pytest.fixture(scope="module")
def folder(fitted, tmp_path_factory):
    return model_of(fitted).save(tmp_path_factory.mktemp("posterior") / "model").path


@pytest.fixture(scope="module")
def model(folder):
    return Model.load(folder)


@pytest.fixture(scope="module")
def table(few_file, model):
    return predict(few_file, model)


# -- folder ----------------------------------------------------------------------------------------------------


def test_round_trip_is_exact(fitted, model):
    again = model.mixture
    assert type(again) is type(fitted)
    assert again.wave.tobytes() == fitted.wave.tobytes()
    for name, array in fitted.stored().items():
        assert array.tobytes() == again.stored()[name].tobytes(), name


def test_the_manifest_says_what_a_reader_needs(model):
    manifest = model.manifest
    assert (manifest["schema"], manifest["kind"]) == (SCHEMA, "posterior")
    assert manifest["labels"] == ["log_g", *LABELS]
    assert manifest["nuisances"] == {
        "scale_width": float(np.float32(0.3)),
        "slope_widths": [0.05],
        "calibrated": [0.0],
        "sky_width": 0.0,
    }
    assert manifest["limits"] == {
        "chi2": 1.3,
        "log_g_err": pytest.approx(0.96),
        "log_level": [-2.0, 2.0],
        "distance": SUMMARY["distance_limit"],
        "strength": 10.0,
    }
    assert "any unit" in manifest["preprocessing"]["flux"]


def test_limits_of_distance_and_strength_may_be_absent(fitted):
    summary = {key: SUMMARY[key] for key in ("chi2_limit", "log_level", "library")}
    made = Model.of_mixture(
        fitted, {}, recipe="posterior", grid=PHYSICAL_GRID, training={"log_g_std": 1.0}, summary=summary
    )
    assert set(made.manifest["limits"]) == {"chi2", "log_g_err", "log_level"}


@pytest.mark.parametrize(
    "change",
    [
        {"library": {"slope_widths": (), "sky_width": 0.0}},
        {"distance_limit": {"log_strength": [6.0, 3.0], "limit": [2.0, 4.0]}},
        {"distance_limit": {"log_strength": [3.0], "limit": [2.0, 4.0]}},
    ],
)
def test_a_summary_that_does_not_fit_is_refused(fitted, change):
    with pytest.raises(ValueError, match=r"expected|ascending"):
        model_of(fitted, **change)


def test_a_manifest_of_another_kind_or_with_a_broken_table_is_refused(folder, tmp_path):
    from moefast.model import _checksum

    def changed(change):
        target = tmp_path / "changed"
        target.mkdir(exist_ok=True)
        for item in folder.iterdir():
            (target / item.name).write_bytes(item.read_bytes())
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        manifest["checksum"] = _checksum(manifest)
        (target / MANIFEST).write_text(json.dumps(manifest))
        return target

    with pytest.raises(ModelError, match=r"that of a mixture, but model.onnx holds a posterior"):
        Model.load(changed(lambda manifest: manifest.pop("kind")))
    with pytest.raises(ModelError, match="ascending"):
        Model.load(changed(lambda manifest: manifest["limits"]["distance"].update(limit=[1.0])))


# -- prediction ------------------------------------------------------------------------------------------------


def test_all_labels_are_in_the_table_and_right(table, few):
    columns = table.columns
    assert table.n_rows == len(few)
    for name in ("log_g", *LABELS):
        value, error, truth = columns[name], columns[f"{name}_err"], few.params[name]
        assert 0.5 < np.mean(np.abs(value - truth) < error) < 0.85, name
        assert np.corrcoef(value, truth)[0, 1] > (0.3 if name in {"a_M", "C_M"} else 0.7), name
    for name in LABELS:
        assert np.abs(columns[f"{name}_corr"]).max() <= 1
        assert columns[f"{name}_corr"].std() > 0.01
    np.testing.assert_allclose(np.median(columns["scale"]), 1, atol=0.1)
    assert table.r2 > 0.5


@pytest.mark.parametrize("suffix", [".h5", ".parquet", ".fits"])
def test_formats_hold_the_same_columns(suffix, table, few_file, model, tmp_path):
    predict(few_file, model, tmp_path / f"t{suffix}")
    columns, _ = read_table(tmp_path / f"t{suffix}")
    assert list(columns) == list(table.columns)
    same_rows(columns, table.columns, but=())


def test_the_layout_is_that_of_the_columns_and_has_units(model, table):
    layout = {column.name: column for column in table_columns(model.mixture, {}, False)}
    assert [name for name in table.columns if name != "id"] == list(layout)
    assert layout["T_eff"].unit == layout["T_eff_err"].unit == "K"
    assert layout["T_eff_corr"].unit == ""
    two = table_columns(random_posterior(labels=2), {}, False)
    assert [c.name for c in two if c.name.startswith(("T_eff", "M_H", "scale"))] == [
        *("T_eff", "T_eff_err", "T_eff_corr", "scale")
    ]


def test_another_unit_of_flux_changes_the_scale_alone(few, model, table, tmp_path):
    other = replace(few, flux=few.noisy * 1e-17, error=few.error * 1e-17)
    found = predict(other.write(tmp_path / "cgs.h5"), model).columns
    np.testing.assert_allclose(found["scale"], 1e-17 * table.columns["scale"], rtol=1e-4)
    np.testing.assert_allclose(found["log_g"], table.columns["log_g"], atol=1e-3)
    np.testing.assert_array_equal(
        found["flag"] & Flag.UNLIKE_TRAINING, table.columns["flag"] & Flag.UNLIKE_TRAINING
    )


def test_rows_without_data_have_no_numbers(few, model, tmp_path):
    spoilt = few.take(slice(0, 3))
    spoilt.noisy[1] = np.nan
    columns = predict(spoilt.write(tmp_path / "x.h5", arrays=("flux", "error", "noisy")), model).columns
    for name, values in columns.items():
        if values.dtype.kind == "f" and not name.startswith("snr"):
            assert np.isnan(values).tolist() == [False, True, False], name
    assert columns["expert"][1] == -1


def test_onnx_runtime_gives_the_same_table(few, fitted):
    engine = OnnxEngine(fitted, "cpu")
    flux, error = few.noisy.astype(np.float32), few.error.astype(np.float32)
    mask = np.zeros(flux.shape, bool)
    mask[::2, 100:300] = True
    found, _ = engine(flux, error, mask, 0)
    expected, _ = make_engine(fitted, _cpu())(flux, error, mask, 0)
    unmasked, _ = engine(flux, error, None, 0)
    np.testing.assert_allclose(found.log_g, expected.log_g, atol=1e-4)
    np.testing.assert_allclose(found.labels, expected.labels, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.scale, expected.scale, rtol=1e-4)
    assert np.abs(found.log_g - unmasked.log_g)[::2].max() > 0.01


def _cpu():
    from moefast.backend import resolve_backend

    return resolve_backend("cpu")


def test_blocks_for_onnx_runtime_hold_no_more_than_fits():
    small_one, large = random_posterior(), random_posterior(p=512, m=2000, n=49, t=5, n_experts=9)
    assert OnnxEngine(small_one, "cpu").block_rows == 1024
    rows = OnnxEngine(large, "cpu").block_rows
    assert 16 <= rows < 64


def test_the_cuda_kernels_know_a_posterior_unless_it_is_too_large(fitted, monkeypatch):
    assert without_kernels(fitted) == ""
    monkeypatch.setattr("moefast.kernels.clouds.CUDA_TANGENTS", 0)
    assert "posterior" in without_kernels(fitted)
    with pytest.raises(BackendError, match="no kernels for a posterior"):
        CudaEngine(fitted)


def test_parts_are_joined_with_what_they_lack(fitted, few):
    one = fitted.predict(few.noisy[:2].astype(np.float32), few.error[:2].astype(np.float32))
    bare = replace(one, scale=None)
    assert joined([bare, bare]).scale is None
    np.testing.assert_array_equal(joined([one, one]).scale, np.tile(one.scale, 2))


# -- flags -----------------------------------------------------------------------------------------------------


def _flags(model, few, **changes):
    flux, error = few.noisy[:5].astype(np.float32), few.error[:5].astype(np.float32)
    result = model.mixture.predict(flux, error)
    plain = {
        "chi2": np.ones(5),
        "strength": np.exp(np.full(5, 4.5)),
        "distance": np.zeros(5),
        "log_level": np.zeros(5),
    }
    columns = columns_of(model, replace(result, **(plain | changes)), assess(flux, error, None))
    return (columns["flag"] & np.uint32(Flag.UNLIKE_TRAINING)).astype(bool).tolist()


def test_spectra_beyond_a_limit_are_unlike_those_of_the_training_set(model, few):
    """Halfway between the entries of the table, at ln strength 4.5, the limit of distance is 3."""
    assert _flags(model, few) == [False] * 5
    assert _flags(model, few, chi2=np.array([1, 1.29, 1.31, np.nan, 1])) == [False, False, True, True, False]
    distance = np.array([2.99, 3.01, -1, np.nan, 5])
    assert _flags(model, few, distance=distance) == [False, True, False, True, True]
    strength = np.array([9.9, 10.1, -3, np.nan, np.exp(9)])
    assert _flags(model, few, strength=strength) == [True, False, True, True, False]
    far = {"distance": np.full(5, 3.5), "strength": np.exp([3.0, 5.2, 5.3, 6.0, 9.0])}
    assert _flags(model, few, **far) == [True, True, False, False, False]


# -- everything else that takes a model ------------------------------------------------------------------------


def test_evaluation(few_file, few, model, table):
    found = evaluate(few_file, model)
    np.testing.assert_allclose(found.predicted, table.columns["log_g"])
    references = found.report["references"]
    assert set(references) == {"global-ridge", "binned", "oracle-hybrid"}
    assert found.report["rho"]["oracle"] == "oracle-hybrid"
    bins = PHYSICAL_GRID.assign(few.params["T_eff"], few.params["M_H"])
    result = model.mixture.predict(few.noisy.astype(np.float32), few.error.astype(np.float32))
    own = result.expert_log_g[np.arange(len(bins)), bins]
    truth = few.params["log_g"]
    r2 = 1 - np.sum((truth - own) ** 2) / np.sum((truth - truth.mean()) ** 2)
    assert references["oracle-hybrid"]["r2"] == pytest.approx(r2, abs=1e-3)


def test_export_and_evaluation_of_the_file(few_file, folder, model, tmp_path):
    out = tmp_path / "m.onnx"
    done = CliRunner().invoke(cli, ["export", str(folder), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "label_correlations" in done.output
    found = evaluate(few_file, out)
    np.testing.assert_allclose(found.predicted, evaluate(few_file, model).predicted, atol=1e-4)
    refused = CliRunner().invoke(cli, ["export", str(folder), "-o", str(tmp_path / "h.onnx"), "--half"])
    assert refused.exit_code == ModelError.exit_code


def test_benchmarks_that_take_a_mixture_apart_say_that_they_cannot(fitted):
    with pytest.raises(BackendError, match="posterior of all labels"):
        mixture_arrays(fitted)
